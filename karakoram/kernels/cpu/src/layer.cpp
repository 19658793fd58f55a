// A decoder layer for tokens that attend absorbed, as one call: what some fourteen calls from Python would do, in the same
// order, through the same functions, with results rounded to bf16 at the same places: the bits are the same. What is saved is
// what lies between: describing tensors, allocating results, calling modules: 100 µs a layer, three quarters of the time
// of a small model.
//
//   x += o(values(attention(queries, cache)))      with the new tokens' latents and rope keys written into the cache
//   x += experts(norm(x))                          or a dense SwiGLU
//
// Room for what lies between belongs to the calling thread and stays between calls.
//
// Legend: n tokens, D hidden, H heads, N nope, R rope, V value, L latent, W = L + R, E experts, K experts per token.
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "feed_forward.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

struct Sizes {
  int64_t n, hidden, heads, nope, rope, value, latent, rank, experts, chosen;

  int64_t width() const { return latent + rope; }
  int64_t query() const { return heads * (nope + rope); }
};

struct Pass {  // where the tokens stand
  const k2_tensor *cos, *sin, *lengths;
  k2_tensor blocks, slots;
};

k2_tensor rows_of(void* data, int32_t dtype, int64_t rows, int64_t columns) {
  return {data, dtype, 2, {rows, columns}, {columns, 1}};
}

k2_tensor heads_of(void* data, int64_t n, int64_t heads, int64_t columns) {
  return {data, K2_BF16, 3, {n, heads, columns}, {heads * columns, columns, 1}};
}

// Columns [first, first + count) of every head.
k2_tensor part_of(const k2_tensor& t, int64_t first, int64_t count) {
  k2_tensor part = t;
  part.data = static_cast<uint16_t*>(t.data) + first;
  part.shape[2] = count;
  return part;
}

// What lies between, of one layer, in one stretch of memory; before it what holds for all layers.
struct Room {
  int64_t* slots;
  int32_t* turns;
  uint16_t *normed, *query_latent, *query, *kv, *queries, *mixed, *values, *out;
  float *logits, *weights;
  int64_t* ids;

  // Places from `base` on; from 0 on only the bytes are counted.
  size_t lay_out(const Sizes& s, uintptr_t base) {
    uintptr_t at = base;
    const auto place = [&](auto** pointer, int64_t count) {
      *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(at);
      at += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof **pointer), 64));
    };
    place(&slots, s.n);
    place(&turns, s.n);
    place(&normed, s.n * s.hidden);
    place(&query_latent, s.n * s.rank);
    place(&query, s.n * s.query());
    place(&kv, s.n * s.width());
    place(&queries, s.n * s.heads * s.width());
    place(&mixed, s.n * s.heads * s.latent);
    place(&values, s.n * s.heads * s.value);
    place(&out, s.n * s.hidden);
    place(&logits, s.n * s.experts);
    place(&weights, s.n * s.chosen);
    place(&ids, s.n * s.chosen);
    return at - base;
  }
};

void add(const k2_tensor& x, const uint16_t* y) {
  for (int64_t r = 0; r < x.shape[0]; r++)
    kernels().add_bf16(static_cast<uint16_t*>(x.data) + r * x.strides[0], y + r * x.shape[1], x.shape[1]);
}

k2_status attend(const k2_layer& l, const Sizes& s, const Pass& pass, const Room& room, const k2_tensor& cache,
                 const k2_tensor& x) {
  k2_tensor normed = rows_of(room.normed, K2_BF16, s.n, s.hidden), q_in = normed;
  K2_TRY(k2_rms_norm(&x, &l.input_norm, l.eps, &normed));
  if (s.rank) {
    q_in = rows_of(room.query_latent, K2_BF16, s.n, s.rank);
    K2_TRY(k2_linear(&normed, &l.q_a, &q_in));
    K2_TRY(k2_rms_norm(&q_in, &l.q_a_norm, l.latent_eps, &q_in));
  }
  k2_tensor q = rows_of(room.query, K2_BF16, s.n, s.query()), kv = rows_of(room.kv, K2_BF16, s.n, s.width());
  K2_TRY(k2_linear(&q_in, &l.q, &q));
  K2_TRY(k2_linear(&normed, &l.kv_a, &kv));
  const k2_tensor q_by_head = heads_of(room.query, s.n, s.heads, s.nope + s.rope);
  const k2_tensor q_nope = part_of(q_by_head, 0, s.nope), q_rope = part_of(q_by_head, s.nope, s.rope);
  k2_tensor queries = heads_of(room.queries, s.n, s.heads, s.width()), absorbed = part_of(queries, 0, s.latent);
  k2_tensor by_slot{cache.data, K2_BF16, 3, {1, cache.shape[0] * cache.shape[1], s.width()}, {0, s.width(), 1}};
  K2_TRY(k2_latent_append(&kv, &l.kv_a_norm, l.latent_eps, &q_rope, pass.cos, pass.sin, &pass.slots, s.n, &by_slot, &queries));
  K2_TRY(k2_linear_by_head(&q_nope, &l.keys, 0, &absorbed));
  k2_tensor mixed = heads_of(room.mixed, s.n, s.heads, s.latent), values = heads_of(room.values, s.n, s.heads, s.value);
  K2_TRY(k2_mla_decode(&queries, &cache, &pass.blocks, pass.lengths, s.latent, l.softmax_scale, &mixed));
  K2_TRY(k2_linear_by_head(&mixed, &l.kv_b, s.nope, &values));
  const k2_tensor side_by_side = rows_of(room.values, K2_BF16, s.n, s.heads * s.value);
  k2_tensor out = rows_of(room.out, K2_BF16, s.n, s.hidden);
  K2_TRY(k2_linear(&side_by_side, &l.o, &out));
  add(x, room.out);
  return K2_OK;
}

k2_status feed(const k2_layer& l, const Sizes& s, const Room& room, const k2_tensor& x) {
  k2_tensor normed = rows_of(room.normed, K2_BF16, s.n, s.hidden), out = rows_of(room.out, K2_BF16, s.n, s.hidden);
  K2_TRY(k2_rms_norm(&x, &l.post_norm, l.eps, &normed));
  if (!s.experts) {
    K2_TRY(k2_mlp(&normed, &l.mlp[0], &l.mlp[1], &l.mlp[2], &out));
  } else {
    k2_tensor logits = rows_of(room.logits, K2_F32, s.n, s.experts), weights = rows_of(room.weights, K2_F32, s.n, s.chosen);
    k2_tensor ids = rows_of(room.ids, K2_I64, s.n, s.chosen);
    K2_TRY(k2_linear(&normed, &l.router, &logits));
    K2_TRY(k2_route(&logits, &l.bias, l.groups, l.best_groups, l.normalise, l.routed_scale, &ids, &weights));
    K2_TRY(k2_moe_at_once(&normed, &ids, &weights, l.records, s.experts, l.intermediate, l.experts_dtype,
                          l.mlp[0].data ? l.mlp : nullptr, &out));
  }
  add(x, room.out);
  return K2_OK;
}

k2_status check_attention(const k2_layer& l, const k2_tensor& x, const k2_tensor& cache, Sizes* s) {
  Matrix q_a, q, kv_a, keys, kv_b, o;
  if (l.q_a.data) K2_TRY(as_matrix("q_a", &l.q_a, &q_a));
  K2_TRY(as_matrix("q", &l.q, &q));
  K2_TRY(as_matrix("kv_a", &l.kv_a, &kv_a));
  K2_TRY(as_matrix("keys", &l.keys, &keys));
  K2_TRY(as_matrix("kv_b", &l.kv_b, &kv_b));
  K2_TRY(as_matrix("o", &l.o, &o));
  K2_TRY(check_tensor("the norm of the latent", &l.kv_a_norm, K2_BF16, 1));
  s->n = x.shape[0], s->hidden = x.shape[1], s->heads = l.heads, s->rank = q_a.outputs;
  s->latent = l.kv_a_norm.shape[0], s->nope = keys.inputs;
  if (s->heads < 1) return fail(K2_BAD_SHAPE, "a layer with %lld heads", static_cast<long long>(s->heads));
  const auto of_head = [&](int64_t size) { return size % s->heads ? -1 : size / s->heads; };
  s->rope = kv_a.outputs - s->latent, s->value = of_head(kv_b.outputs) - s->nope;
  if (s->latent < 1 || s->rope < 2 || s->value < 1 || kv_a.inputs != s->hidden || of_head(keys.outputs) != s->latent ||
      kv_b.inputs != s->latent || q.inputs != (s->rank ? s->rank : s->hidden) || (s->rank && q_a.inputs != s->hidden) ||
      of_head(q.outputs) != s->nope + s->rope || of_head(o.inputs) != s->value || o.outputs != s->hidden ||
      cache.shape[3] != s->width())
    return fail(K2_BAD_SHAPE, "the projections of attention do not fit each other, x or the cache");
  return K2_OK;
}

k2_status check_feed(const k2_layer& l, Sizes* s) {
  s->experts = s->chosen = 0;
  if (!l.router.data) return K2_OK;
  Matrix router;
  K2_TRY(as_matrix("the router", &l.router, &router));
  s->experts = router.outputs, s->chosen = l.chosen;
  if (l.chosen < 1 || l.chosen > s->experts || !l.records)
    return fail(K2_BAD_SHAPE, "%lld of %lld experts cannot be chosen", static_cast<long long>(l.chosen),
                static_cast<long long>(s->experts));
  return K2_OK;
}

k2_status check_pass(const k2_layer* layers, int64_t count, const k2_tensor* cache, const k2_tensor* x) {
  K2_TRY(check_tensor("x", x, K2_BF16, 2));
  K2_TRY(check_tensor("cache", cache, K2_BF16, 4));
  if (!layers || count < 1 || cache->shape[0] != count)
    return fail(K2_BAD_SHAPE, "%lld layers do not fit a cache of %lld", static_cast<long long>(count),
                static_cast<long long>(cache->shape[0]));
  if (cache->strides[1] != cache->shape[2] * cache->shape[3] || cache->strides[2] != cache->shape[3])
    return fail(K2_BAD_STRIDE, "the blocks of a layer's cache do not lie one after another");
  return K2_OK;
}

// The blocks of every token's sequence: those given, or without any the cache's blocks in turn, each for as many tokens.
k2_status find_blocks(const k2_tensor* given, int64_t n, int64_t count, int32_t* turns, k2_tensor* blocks) {
  if (given) {
    K2_TRY(check_tensor("blocks", given, K2_I32, 2));
    *blocks = *given;
    return K2_OK;
  }
  if (n && (!count || n % count))
    return fail(K2_BAD_SHAPE, "%lld tokens do not divide among %lld rows of the cache", static_cast<long long>(n),
                static_cast<long long>(count));
  for (int64_t t = 0; t < n; t++) turns[t] = static_cast<int32_t>(t / (n / count));
  *blocks = {turns, K2_I32, 2, {n, 1}, {1, 1}};
  return K2_OK;
}

// A token's own row is the last one that it sees. Refuses blocks and lengths outside the cache before anything is written.
k2_status find_slots(const k2_tensor& blocks, const k2_tensor* lengths, const k2_tensor& cache, int64_t n, int64_t* slots) {
  K2_TRY(check_tensor("lengths", lengths, K2_I64, 1));
  if (lengths->shape[0] != n || blocks.shape[0] != n)
    return fail(K2_BAD_SHAPE, "x, lengths and blocks are of %lld, %lld and %lld tokens", static_cast<long long>(n),
                static_cast<long long>(lengths->shape[0]), static_cast<long long>(blocks.shape[0]));
  const int64_t count = cache.shape[1], size = cache.shape[2], most = blocks.shape[1];
  for (int64_t t = 0; t < n; t++) {
    const int64_t length = static_cast<const int64_t*>(lengths->data)[t], at = length - 1;
    if (length < 1 || size < 1 || at / size >= most)
      return fail(K2_BAD_ID, "token %lld sees %lld tokens, its blocks hold 1 to %lld", static_cast<long long>(t),
                  static_cast<long long>(length), static_cast<long long>(most * size));
    const int64_t block = static_cast<const int32_t*>(blocks.data)[t * blocks.strides[0] + at / size];
    if (block < 0 || block >= count)
      return fail(K2_BAD_ID, "block %lld of token %lld is none of %lld", static_cast<long long>(block),
                  static_cast<long long>(t), static_cast<long long>(count));
    slots[t] = block * size + at % size;
  }
  return K2_OK;
}

struct Freed {
  void operator()(char* p) const { free(p); }
};

// A call: what was checked before anything is written, and its memory.
struct Call {
  std::vector<Sizes> sizes;
  Pass pass;
  uintptr_t base;
  std::unique_ptr<char, Freed> large;  // is not kept after the call

  k2_status take_room(int64_t n, size_t bytes) {
    constexpr size_t kKept = size_t(1) << 25;  // 32 MB: a few hundred tokens of K2
    void* room = bytes > kKept ? allocate(bytes) : thread_scratch(kLayerScratch, bytes);
    if (!room) return fail(K2_NO_MEMORY, "no memory for %lld tokens of a layer", static_cast<long long>(n));
    if (bytes > kKept) large.reset(static_cast<char*>(room));
    base = reinterpret_cast<uintptr_t>(room);
    return K2_OK;
  }

  k2_status begin(const k2_layer* layers, int64_t count, bool whole, const k2_tensor* cos, const k2_tensor* sin,
                  const k2_tensor* blocks, const k2_tensor* lengths, const k2_tensor* cache, const k2_tensor* x) {
    K2_TRY(check_pass(layers, count, cache, x));
    size_t bytes = 0;
    Room room;
    for (int64_t i = 0; i < count; i++) {
      Sizes s{};
      K2_TRY(check_attention(layers[i], *x, *cache, &s));
      if (whole) K2_TRY(check_feed(layers[i], &s));
      if (!fits({s.n, s.heads, s.width() + s.nope + s.rope + s.value, 4}) ||
          !fits({s.n, s.experts + s.chosen + s.rank + kBlock, 8}))
        return fail(K2_BAD_SHAPE, "%lld tokens of a layer are larger than any memory", static_cast<long long>(s.n));
      const size_t here = room.lay_out(s, 0);
      bytes = here > bytes ? here : bytes;
      sizes.push_back(s);
    }
    const int64_t n = x->shape[0];
    K2_TRY(take_room(n, bytes));
    room.lay_out(sizes[0], base);
    pass.cos = cos, pass.sin = sin, pass.lengths = lengths;
    pass.slots = {room.slots, K2_I64, 1, {n}, {1}};
    K2_TRY(find_blocks(blocks, n, cache->shape[1], room.turns, &pass.blocks));
    return find_slots(pass.blocks, lengths, *cache, n, room.slots);
  }
};

k2_tensor cache_of(const k2_tensor& cache, int64_t layer) {
  return {static_cast<uint16_t*>(cache.data) + layer * cache.strides[0], K2_BF16, 3,
          {cache.shape[1], cache.shape[2], cache.shape[3]}, {cache.strides[1], cache.strides[2], 1}};
}

}  // namespace

extern "C" {

k2_status k2_decode_layers(const k2_layer* layers, int64_t count, const k2_tensor* cos, const k2_tensor* sin,
                           const k2_tensor* blocks, const k2_tensor* lengths, k2_tensor* cache, k2_tensor* x) try {
  Call call;
  K2_TRY(call.begin(layers, count, true, cos, sin, blocks, lengths, cache, x));
  for (int64_t i = 0; i < count && x->shape[0]; i++) {
    Room room;
    room.lay_out(call.sizes[i], call.base);
    K2_TRY(attend(layers[i], call.sizes[i], call.pass, room, cache_of(*cache, i), *x));
    K2_TRY(feed(layers[i], call.sizes[i], room, *x));
  }
  return K2_OK;
} K2_CATCH

k2_status k2_decode_attention(const k2_layer* layer, const k2_tensor* cos, const k2_tensor* sin, const k2_tensor* blocks,
                              const k2_tensor* lengths, k2_tensor* cache, k2_tensor* x, k2_tensor* normed) try {
  Call call;
  K2_TRY(call.begin(layer, 1, false, cos, sin, blocks, lengths, cache, x));
  Room room;
  room.lay_out(call.sizes[0], call.base);
  if (x->shape[0]) K2_TRY(attend(*layer, call.sizes[0], call.pass, room, cache_of(*cache, 0), *x));
  return k2_rms_norm(x, &layer->post_norm, layer->eps, normed);
} K2_CATCH
}
