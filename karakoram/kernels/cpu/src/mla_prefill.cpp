// Expanded latent attention for pieces of prompts: keys and values are multiplied out from the latents, head by head, and many
// queries go over them. Per head and stretch of 128 tokens:
//
//   keys [tokens, N + R], values [tokens, V]              latents · kv_bᵀ, and the rope keys beside; once for all queries
//   scores [tokens, queries] = keys · queriesᵀ            64 queries at a time, packed once as panels of 16
//   probabilities = exp(scores − running maximum)          as in flash attention: sums are rescaled when it grows
//   sums [queries, V] += probabilitiesᵀ · values
//
// Stretches begin at multiples of 128 tokens and keys are rounded to bf16, as a projection of its own would do: a query's bits
// do not depend on which other queries are in the call. Tokens that none of the 64 queries sees are not looked at.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "feed_forward.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

constexpr int64_t kStretch = 128, kQueries = 64;
constexpr int64_t kExpandedBytes = 64 << 20;  // of keys and values at a time: as many heads as fit, at least one

using Memory = std::unique_ptr<void, void (*)(void*)>;

struct Prompt {
  const Kernels* k;
  const k2_tensor *q_nope, *q_rope, *latent, *k_rope, *out;
  const int64_t* seen;  // how many tokens each query sees
  Matrix kv_b;
  int64_t queries, heads, nope, rope, value, tokens, depth;  // depth: nope + rope, padded to the block
  float scale;
  const void* latents = nullptr;  // activations, ldx apart
  int64_t ldx = 0;

  int64_t stretches() const { return (tokens + kStretch - 1) / kStretch; }
  int64_t key_bytes() const { return kStretch * depth * k->activation_bytes; }  // of a stretch
  int64_t head_bytes() const { return stretches() * (key_bytes() + kStretch * value * k->activation_bytes); }
  const uint16_t* query(const k2_tensor* part, int64_t i, int64_t h) const {
    return static_cast<const uint16_t*>(part->data) + i * part->strides[0] + h * part->strides[1];
  }
};

// Keys (activations [tokens][depth]) and values (tiles) of one head and stretch.
bool expand(const Prompt& p, int64_t head, int64_t stretch, char* keys, char* values) {
  const Kernels& k = *p.k;
  const int64_t from = stretch * kStretch, tokens = std::min(kStretch, p.tokens - from), width = p.nope + p.value;
  float* sums = static_cast<float*>(thread_scratch(1, kStretch * 32 * sizeof(float)));
  uint16_t* rows = static_cast<uint16_t*>(thread_scratch(2, static_cast<size_t>(kStretch * width) * sizeof(uint16_t)));
  if (!sums || !rows) return false;
  const char* x = static_cast<const char*>(p.latents) + from * p.ldx * k.activation_bytes;
  for (int64_t at = 0; at < width; at += 2 * kPanel) {
    const int64_t panel = (head * width + at) / kPanel, count = at + kPanel < width ? 2 : 1;
    const Side sides[2] = {{&p.kv_b, panel}, {&p.kv_b, panel + 1}};
    if (!multiply(k, tokens, x, p.ldx, sides, static_cast<int>(count), sums, 32)) return false;
    for (int64_t t = 0; t < tokens; t++) k.store_bf16(sums + 32 * t, kPanel * count, rows + t * width + at);
  }
  const uint16_t* of_values[kStretch];
  for (int64_t t = 0; t < tokens; t++) {
    char* key = keys + t * p.depth * k.activation_bytes;
    k.load(rows + t * width, p.nope, key);
    k.load(static_cast<const uint16_t*>(p.k_rope->data) + (from + t) * p.k_rope->strides[0], p.rope,
           key + p.nope * k.activation_bytes);
    memset(key + (p.nope + p.rope) * k.activation_bytes, 0, (p.depth - p.nope - p.rope) * k.activation_bytes);
    of_values[t] = rows + t * width + p.nope;
  }
  k.tile_values(of_values, tokens, round_up(tokens, kGroup), p.value, values);
  return true;
}

struct Space {  // of one thread, for a block of queries
  char *queries, *turned;
  float *scores, *values, *most, *sum, *fade;

  bool take(const Prompt& p) {
    const int64_t a = p.k->activation_bytes, queries_bytes = kQueries * p.depth * a, turned_bytes = kQueries * kStretch * a;
    const int64_t floats = kStretch * kQueries + kQueries * p.value + 3 * kQueries;
    queries = static_cast<char*>(thread_scratch(3, queries_bytes + turned_bytes + floats * 4));
    turned = queries + queries_bytes;
    scores = reinterpret_cast<float*>(turned + turned_bytes), values = scores + kStretch * kQueries;
    most = values + kQueries * p.value, sum = most + kQueries, fade = sum + kQueries;
    return queries;
  }
};

// Queries [first, first + count) of a head as panels of 16, those that are missing as zeros.
void pack_queries(const Prompt& p, int64_t head, int64_t first, int64_t count, char* tiles) {
  std::vector<uint16_t> panel(p.depth * kPanel);
  for (int64_t at = 0; at < count; at += kPanel) {
    std::fill(panel.begin(), panel.end(), uint16_t(0));
    for (int64_t n = 0; n < kPanel && at + n < count; n++) {
      const uint16_t *nope = p.query(p.q_nope, first + at + n, head), *rope = p.query(p.q_rope, first + at + n, head);
      for (int64_t i = 0; i < p.nope; i++) panel[16 * (i & ~int64_t(1)) + 2 * n + (i & 1)] = nope[i];
      for (int64_t j = 0, i = p.nope; j < p.rope; j++, i++) panel[16 * (i & ~int64_t(1)) + 2 * n + (i & 1)] = rope[j];
    }
    p.k->tile_bf16(panel.data(), p.depth / kBlock, tiles + at * p.depth * p.k->activation_bytes);
  }
}

bool attend(const Prompt& p, int64_t head, int64_t first, const char* keys, const char* values) {
  const Kernels& k = *p.k;
  const int64_t count = std::min(kQueries, p.queries - first), lanes = round_up(count, kPanel), a = k.activation_bytes;
  Space s;
  if (!s.take(p)) return false;
  pack_queries(p, head, first, count, s.queries);
  std::fill_n(s.most, lanes, -INFINITY);
  std::fill_n(s.sum, lanes, 0.0f);
  const int64_t longest = *std::max_element(p.seen + first, p.seen + first + count);
  for (int64_t from = 0; from < longest; from += kStretch) {
    const int64_t tokens = std::min(kStretch, longest - from), stride = p.depth * kPanel;
    const char* stretch_keys = keys + from / kStretch * p.key_bytes();
    for (int64_t i = 0; i < lanes; i += 2 * kPanel)
      k.gemm(tokens, stretch_keys, p.depth, s.queries + i / kPanel * stride * a, stride, i + kPanel < lanes ? 2 : 1, p.depth,
             s.scores + i, lanes, false);
    for (int64_t i = 0; i < count; i++)
      for (int64_t t = std::max<int64_t>(0, p.seen[first + i] - from); t < tokens; t++) s.scores[t * lanes + i] = -INFINITY;
    k.softmax(s.scores, tokens, lanes, p.scale, s.most, s.sum, s.fade);
    k.turn(s.scores, tokens, lanes, s.turned, kStretch);
    if (from) k.scale_rows(s.values, count, p.value, p.value, s.fade);
    // a stretch's tiles lie as if it were as long as it is for the longest of all queries
    const int64_t padded = round_up(std::min(kStretch, p.tokens - from), kGroup);
    const char* tiles = values + from / kStretch * kStretch * p.value * a;
    for (int64_t v = 0; v < p.value; v += 2 * kPanel)
      k.gemm(count, s.turned, kStretch, tiles + v * padded * a, padded * kPanel, v + kPanel < p.value ? 2 : 1, padded,
             s.values + v, p.value, from > 0);
  }
  for (int64_t i = 0; i < count; i++) {
    float* row = s.values + i * p.value;
    k.axpy(row, 1.0f / s.sum[i], p.value, row, false);
    const int64_t place = (first + i) * p.out->strides[0] + head * p.out->strides[1];
    if (p.out->dtype == K2_F32)
      memcpy(static_cast<float*>(p.out->data) + place, row, p.value * sizeof(float));
    else
      k.store_bf16(row, p.value, static_cast<uint16_t*>(p.out->data) + place);
  }
  return true;
}

k2_status check(Prompt& p, const k2_tensor* kv_b, const k2_tensor* lengths) {
  K2_TRY(check_tensor("q_nope", p.q_nope, K2_BF16, 3));
  K2_TRY(check_tensor("q_rope", p.q_rope, K2_BF16, 3));
  K2_TRY(check_tensor("latent", p.latent, K2_BF16, 2));
  K2_TRY(check_tensor("k_rope", p.k_rope, K2_BF16, 2));
  K2_TRY(check_tensor("lengths", lengths, K2_I64, 1));
  K2_TRY(as_matrix("kv_b", kv_b, &p.kv_b));
  if (!p.out || (p.out->dtype != K2_F32 && p.out->dtype != K2_BF16))
    return fail(K2_BAD_DTYPE, "out is %s, expected float32 or bfloat16", p.out ? dtype_name(p.out->dtype) : "missing");
  K2_TRY(check_tensor("out", p.out, p.out->dtype, 3));
  p.queries = p.q_nope->shape[0], p.heads = p.q_nope->shape[1], p.nope = p.q_nope->shape[2], p.rope = p.q_rope->shape[2];
  p.value = p.out->shape[2], p.tokens = p.latent->shape[0];
  if (p.heads < 1 || p.nope < 1 || p.value < 1 || p.q_rope->shape[0] != p.queries || p.q_rope->shape[1] != p.heads ||
      p.k_rope->shape[0] != p.tokens || p.k_rope->shape[1] != p.rope || p.kv_b.inputs != p.latent->shape[1] ||
      p.kv_b.outputs != p.heads * (p.nope + p.value) || p.out->shape[0] != p.queries || p.out->shape[1] != p.heads ||
      lengths->shape[0] != p.queries)
    return fail(K2_BAD_SHAPE, "q_nope, q_rope, latent, k_rope, kv_b, lengths and out do not fit each other");
  if (p.nope % kPanel || p.value % kPanel)
    return fail(K2_BAD_SHAPE, "heads of %lld and %lld rows are no whole panels", static_cast<long long>(p.nope),
                static_cast<long long>(p.value));
  p.seen = static_cast<const int64_t*>(lengths->data);
  for (int64_t i = 0; i < p.queries; i++)
    if (p.seen[i] < 1 || p.seen[i] > p.tokens)
      return fail(K2_BAD_ID, "query %lld sees %lld tokens, there are 1 to %lld", static_cast<long long>(i),
                  static_cast<long long>(p.seen[i]), static_cast<long long>(p.tokens));
  p.depth = round_up(p.nope + p.rope, kBlock);
  if (!fits({round_up(p.tokens, kStretch), p.depth + p.value, 4}))
    return fail(K2_BAD_SHAPE, "a head's keys and values are larger than any memory");
  return K2_OK;
}

}  // namespace

extern "C" k2_status k2_mla_prefill(const k2_tensor* q_nope, const k2_tensor* q_rope, const k2_tensor* latent,
                                    const k2_tensor* k_rope, const k2_tensor* kv_b, const k2_tensor* lengths, float scale,
                                    k2_tensor* out) try {
  Prompt p{};
  p.k = &kernels(), p.q_nope = q_nope, p.q_rope = q_rope, p.latent = latent, p.k_rope = k_rope, p.out = out, p.scale = scale;
  K2_TRY(check(p, kv_b, lengths));
  if (!p.queries) return K2_OK;
  const Kernels& k = *p.k;
  Memory copy(nullptr, free);
  p.latents = latent->data, p.ldx = latent->strides[0];
  if (k.activation_bytes != 2 || p.kv_b.inputs % kBlock) {
    p.ldx = row_stride(p.kv_b.inputs);
    copy.reset(allocate(static_cast<size_t>(p.tokens * p.ldx * k.activation_bytes)));
    if (!copy) return fail(K2_NO_MEMORY, "no memory for %lld latents", static_cast<long long>(p.tokens));
    load_rows(k, *latent, nullptr, p.tokens, copy.get(), p.ldx);
    p.latents = copy.get();
  }
  const int64_t together = std::min(p.heads, std::max<int64_t>(1, kExpandedBytes / p.head_bytes()));
  const Memory room(allocate(static_cast<size_t>(together * p.head_bytes())), free);
  if (!room) return fail(K2_NO_MEMORY, "no memory for the keys of %lld tokens", static_cast<long long>(p.tokens));
  const auto keys_of = [&](int64_t i) { return static_cast<char*>(room.get()) + i * p.head_bytes(); };
  const auto values_of = [&](int64_t i) { return keys_of(i) + p.stretches() * p.key_bytes(); };
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  std::atomic<bool> good{true};
  for (int64_t head = 0; head < p.heads; head += together) {
    const int64_t here = std::min(together, p.heads - head);
    parallel(here * p.stretches(), [&](int64_t item, int) {
      const int64_t i = item / p.stretches(), stretch = item % p.stretches();
      char *keys = keys_of(i) + stretch * p.key_bytes(), *values = values_of(i) + stretch * kStretch * p.value * k.activation_bytes;
      if (!expand(p, head + i, stretch, keys, values)) good = false;
    });
    parallel(here * blocks, [&](int64_t item, int) {
      if (!attend(p, head + item / blocks, item % blocks * kQueries, keys_of(item / blocks), values_of(item / blocks))) good = false;
    });
  }
  return good ? K2_OK : fail(K2_NO_MEMORY, "no memory for a thread's stretch of attention");
} K2_CATCH
