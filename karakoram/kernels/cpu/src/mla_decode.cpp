// Absorbed latent attention for decoding: all heads of a query look at the same rows of the cache, so the heads are folded
// into the matrix unit. Per stretch of 128 tokens:
//
//   scores [tokens, heads] = cache rows · queriesᵀ        queries packed once as panels of 16 heads
//   probabilities = exp(scores − running maximum)          as in flash attention: sums are rescaled when it grows
//   sums [heads, latent] += probabilitiesᵀ · cache rows    rows turned into panels of 16 latent values
//
// A context is cut into pieces of 1,024 tokens, whatever the number of threads, and the pieces are merged in order: results
// do not depend on who computed what. Source of the absorbed form: DeepSeek-V2 (arXiv 2405.04434, §2.1.2).
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

constexpr int64_t kPiece = 1024, kStretch = 128;
constexpr int64_t kFewHeads = 8;
constexpr int64_t kAhead = 32;  // tokens: rows are fetched so far before they are multiplied

struct Problem {
  const Kernels* k;
  const k2_tensor *q, *cache, *blocks;
  const int64_t* lengths;
  int64_t batch, heads, latent, width;              // width = latent + rope
  int64_t padded_heads, padded_latent, padded_width;
  float scale;

  bool few() const { return heads <= kFewHeads; }
  const uint16_t* row(int64_t b, int64_t t) const {
    const uint16_t* base = static_cast<const uint16_t*>(cache->data);
    if (!blocks) return base + b * cache->strides[0] + t * cache->strides[1];
    const int64_t size = cache->shape[1];
    const int64_t block = static_cast<const int32_t*>(blocks->data)[b * blocks->strides[0] + t / size];
    return base + block * cache->strides[0] + t % size * cache->strides[1];
  }
};

struct Piece {  // one sequence's tokens [from, to)
  int64_t b, from, to;
};

struct Partial {  // of a piece: [heads] maxima and sums, [heads, latent] weighted values
  float *most, *sum, *values;
};

// Queries of one sequence as tiles: [heads / 16][padded width] in the kernels' operand order; few heads one after another.
void pack_queries(const Problem& p, int64_t b, char* tiles) {
  if (p.few()) {
    const uint16_t* q = static_cast<const uint16_t*>(p.q->data) + b * p.q->strides[0];
    const k2_tensor heads{const_cast<uint16_t*>(q), K2_BF16, 2, {p.heads, p.width}, {p.q->strides[1], 1}};
    return load_rows(*p.k, heads, nullptr, p.heads, tiles, p.padded_width);
  }
  std::vector<uint16_t> panel(p.padded_width * kPanel);
  for (int64_t h = 0; h < p.padded_heads; h += kPanel) {
    std::fill(panel.begin(), panel.end(), uint16_t(0));
    for (int64_t n = 0; n < kPanel && h + n < p.heads; n++) {
      const uint16_t* q = static_cast<const uint16_t*>(p.q->data) + b * p.q->strides[0] + (h + n) * p.q->strides[1];
      for (int64_t i = 0; i < p.width; i++) panel[16 * (i & ~int64_t(1)) + 2 * n + (i & 1)] = q[i];
    }
    p.k->tile_bf16(panel.data(), p.padded_width / kBlock, tiles + h * p.padded_width * p.k->activation_bytes);
  }
}

// Calls work(t, row) for the rows of tokens [from, to); a block is looked up once.
template <class F>
void for_rows(const Problem& p, int64_t b, int64_t from, int64_t to, const F& work) {
  const int64_t size = p.blocks ? p.cache->shape[1] : to;
  while (from < to) {
    const uint16_t* row = p.row(b, from);
    const int64_t end = p.blocks ? from + size - from % size : to;
    for (; from < to && from < end; from++, row += p.cache->strides[1]) work(from, row);
  }
}

// Blocks lie anywhere: the processor cannot guess the next one, and short contexts would wait for memory half of the time.
void fetch(const Problem& p, const Piece& piece, int64_t from, int64_t tokens) {
  for_rows(p, piece.b, from, from + tokens < piece.to ? from + tokens : piece.to, [&](int64_t, const uint16_t* row) {
    for (int64_t i = 0; i < p.width; i += 32) __builtin_prefetch(row + i);
  });
}

// scores[t][head] of a stretch; rows are multiplied where they lie if they can be, else copied first.
void score(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, const char* queries, char* copy,
           float* scores) {
  const Kernels& k = *p.k;
  const bool in_place = k.activation_bytes == 2 && p.width % kGroup == 0;
  const int64_t depth = in_place ? p.width : p.padded_width;
  int64_t t = 0;
  while (t < tokens) {
    const uint16_t* first = p.row(piece.b, from + t);
    int64_t run = tokens - t;
    if (p.blocks) {
      const int64_t left = p.cache->shape[1] - (from + t) % p.cache->shape[1];
      if (left < run) run = left;
      fetch(p, piece, from + t + kAhead, run);
    }
    const void* a = first;
    int64_t lda = p.cache->strides[1];
    if (!in_place) {
      for (int64_t i = 0; i < run; i++) {
        char* place = copy + i * p.padded_width * k.activation_bytes;
        k.load(first + i * lda, p.width, place);
        memset(place + p.width * k.activation_bytes, 0, (p.padded_width - p.width) * k.activation_bytes);
      }
      a = copy, lda = p.padded_width;
    }
    const int64_t stride = p.padded_width * kPanel;
    for (int64_t h = 0; h < p.padded_heads; h += 2 * kPanel)
      k.gemm(run, a, lda, queries + h / kPanel * stride * k.activation_bytes, stride,
             h + kPanel < p.padded_heads ? 2 : 1, depth, scores + t * p.padded_heads + h, p.padded_heads, false);
    t += run;
  }
}

// Few heads: a panel of 16 would mostly be padding. Every head is multiplied with 16 rows at a time, so that scores [head][t]
// are as the second product wants them, and exponentials fill whole vectors.
void score_few(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, const uint16_t* const* rows,
               const char* queries, float* scores) {
  for (int64_t t = 0; t < tokens; t += 16) {
    if (p.blocks) fetch(p, piece, from + t + kAhead, 16);
    for (int64_t h = 0; h < p.heads; h++)
      p.k->dots(rows + t, p.width, queries + h * p.padded_width * p.k->activation_bytes, scores + h * kStretch + t);
  }
}

// scores -> probabilities, 0 behind the tokens; `sum` has 16 lanes a head, all on the scale of the head's maximum.
void soften_few(const Problem& p, int64_t tokens, float* scores, float* most, float* sum, float* fade) {
  const int64_t padded = round_up(tokens, kGroup);
  for (int64_t h = 0; h < p.heads; h++, scores += kStretch, sum += 16) {
    for (int64_t t = tokens; t < padded; t++) scores[t] = -INFINITY;
    alignas(64) float top[16], unused[16];
    for (int i = 0; i < 16; i++) top[i] = most[h];
    for (int64_t t = 0; t < padded; t += 16)
      for (int i = 0; i < 16; i++) top[i] = scores[t + i] * p.scale > top[i] ? scores[t + i] * p.scale : top[i];
    float largest = top[0];
    for (int i = 1; i < 16; i++) largest = top[i] > largest ? top[i] : largest;
    fade[h] = std::exp(most[h] - largest);  // 0 before the first stretch
    most[h] = largest;
    for (int i = 0; i < 16; i++) top[i] = largest, sum[i] *= fade[h];
    p.k->softmax(scores, padded / 16, 16, p.scale, top, sum, unused);
  }
}

// sums += probabilities · values, for the latent part of the rows; probabilities are activations [head][t]
void weigh(const Problem& p, int64_t tokens, const uint16_t** rows, const void* probabilities, char* tiles, char* copy,
           float* values) {
  const Kernels& k = *p.k;
  const int64_t padded = round_up(tokens, kGroup);
  if (p.padded_latent > p.width)  // the last panel would read behind the row
    for (int64_t t = 0; t < tokens; t++) {
      uint16_t* place = reinterpret_cast<uint16_t*>(copy) + t * p.padded_latent;
      memcpy(place, rows[t], p.width * 2);
      memset(place + p.width, 0, (p.padded_latent - p.width) * 2);
      rows[t] = place;
    }
  k.tile_values(rows, tokens, padded, p.padded_latent, tiles);
  const int64_t stride = padded * kPanel;
  for (int64_t v = 0; v < p.padded_latent; v += 2 * kPanel)
    k.gemm(p.heads, probabilities, kStretch, tiles + v / kPanel * stride * k.activation_bytes, stride,
           v + kPanel < p.padded_latent ? 2 : 1, padded, values + v, p.padded_latent, true);
}

struct Space {  // of one thread, for one piece
  float *scores, *fade;
  char *turned, *tiles, *copy;

  bool take(const Problem& p) {
    const int64_t a = p.k->activation_bytes, widest = p.padded_width > p.padded_latent ? p.padded_width : p.padded_latent;
    const int64_t scores_bytes = kStretch * p.padded_heads * 4, turned_bytes = p.padded_heads * kStretch * a;
    char* room = static_cast<char*>(thread_scratch(2, scores_bytes + turned_bytes + p.padded_heads * 4 + 64));
    tiles = static_cast<char*>(thread_scratch(0, kStretch * p.padded_latent * a));
    copy = static_cast<char*>(thread_scratch(3, kStretch * widest * 4));
    scores = reinterpret_cast<float*>(room), turned = room + scores_bytes;
    fade = reinterpret_cast<float*>(turned + turned_bytes);
    return room && tiles && copy;
  }
};

bool attend(const Problem& p, const Piece& piece, const char* queries, const Partial& out) {
  const Kernels& k = *p.k;
  Space space;
  if (!space.take(p)) return false;
  for (int64_t h = 0; h < p.padded_heads; h++) out.most[h] = -INFINITY, out.sum[h] = 0;
  memset(out.values, 0, p.padded_heads * p.padded_latent * 4);
  alignas(64) float sums[16 * kFewHeads] = {};
  if (p.blocks) fetch(p, piece, piece.from, kAhead);
  for (int64_t from = piece.from; from < piece.to; from += kStretch) {
    const int64_t tokens = piece.to - from < kStretch ? piece.to - from : kStretch;
    const uint16_t* rows[kStretch];
    for_rows(p, piece.b, from, from + tokens, [&](int64_t t, const uint16_t* row) { rows[t - from] = row; });
    for (int64_t t = tokens; t < round_up(tokens, 16); t++) rows[t] = rows[tokens - 1];
    const void* probabilities = space.turned;
    if (p.few()) {
      score_few(p, piece, from, tokens, rows, queries, space.scores);
      soften_few(p, tokens, space.scores, out.most, sums, space.fade);
      if (k.activation_bytes == 4) probabilities = space.scores;
      else k.store_bf16(space.scores, p.heads * kStretch, reinterpret_cast<uint16_t*>(space.turned));
    } else {
      score(p, piece, from, tokens, queries, space.copy, space.scores);
      k.softmax(space.scores, tokens, p.padded_heads, p.scale, out.most, out.sum, space.fade);
      k.turn(space.scores, tokens, p.padded_heads, space.turned, kStretch);
    }
    if (from > piece.from) k.scale_rows(out.values, p.heads, p.padded_latent, p.padded_latent, space.fade);
    weigh(p, tokens, rows, probabilities, space.tiles, space.copy, out.values);
  }
  for (int64_t h = 0; p.few() && h < p.heads; h++)
    for (int i = 0; i < 16; i++) out.sum[h] += sums[16 * h + i];
  return true;
}

// Pieces of one head of one sequence, in order, into its row of the result.
void merge(const Problem& p, const std::vector<Partial>& parts, size_t first, size_t last, int64_t h, float* row) {
  float most = -INFINITY, total = 0;
  for (size_t i = first; i < last; i++) most = parts[i].most[h] > most ? parts[i].most[h] : most;
  for (size_t i = first; i < last; i++) {
    const float share = std::exp(parts[i].most[h] - most);
    total += parts[i].sum[h] * share;
    p.k->axpy(parts[i].values + h * p.padded_latent, share, p.padded_latent, row, i > first);
  }
  p.k->axpy(row, 1.0f / total, p.padded_latent, row, false);
}

void merge_heads(const Problem& p, const std::vector<Partial>& parts, size_t first, size_t last, int64_t b,
                 const k2_tensor& out) {
  std::vector<float> row(p.padded_latent);
  for (int64_t h = 0; h < p.heads; h++) {
    merge(p, parts, first, last, h, row.data());
    const int64_t place = b * out.strides[0] + h * out.strides[1];
    if (out.dtype == K2_F32)
      memcpy(static_cast<float*>(out.data) + place, row.data(), p.latent * 4);
    else
      p.k->store_bf16(row.data(), p.latent, static_cast<uint16_t*>(out.data) + place);
  }
}

k2_status check_cache(const Problem& p) {
  if (p.blocks && !fits({p.blocks->shape[1], p.cache->shape[1]}))
    return fail(K2_BAD_SHAPE, "blocks are larger than any memory");
  const int64_t room = p.blocks ? p.blocks->shape[1] * p.cache->shape[1] : p.cache->shape[1];
  for (int64_t b = 0; b < p.batch; b++) {
    if (p.lengths[b] < 1 || p.lengths[b] > room)
      return fail(K2_BAD_ID, "sequence %lld is %lld tokens long, the cache holds 1 to %lld", static_cast<long long>(b),
                  static_cast<long long>(p.lengths[b]), static_cast<long long>(room));
    for (int64_t i = 0; p.blocks && i * p.cache->shape[1] < p.lengths[b]; i++) {
      const int32_t block = static_cast<const int32_t*>(p.blocks->data)[b * p.blocks->strides[0] + i];
      if (block < 0 || block >= p.cache->shape[0])
        return fail(K2_BAD_ID, "block %d of sequence %lld is none of %lld", block, static_cast<long long>(b),
                    static_cast<long long>(p.cache->shape[0]));
    }
  }
  return K2_OK;
}

k2_status check(Problem& p, const k2_tensor* lengths, int64_t latent, const k2_tensor* out) {
  K2_TRY(check_tensor("q", p.q, K2_BF16, 3));
  K2_TRY(check_tensor("cache", p.cache, K2_BF16, 3));
  K2_TRY(check_tensor("lengths", lengths, K2_I64, 1));
  if (p.blocks) K2_TRY(check_tensor("blocks", p.blocks, K2_I32, 2));
  if (!out || (out->dtype != K2_F32 && out->dtype != K2_BF16))
    return fail(K2_BAD_DTYPE, "out is %s, expected float32 or bfloat16", out ? dtype_name(out->dtype) : "missing");
  K2_TRY(check_tensor("out", out, out->dtype, 3));
  p.batch = p.q->shape[0], p.heads = p.q->shape[1], p.width = p.q->shape[2], p.latent = latent;
  if (latent < 1 || latent > p.width || p.heads < 1 || p.cache->shape[2] != p.width || lengths->shape[0] != p.batch ||
      (p.blocks ? p.blocks->shape[0] : p.cache->shape[0]) != p.batch || out->shape[0] != p.batch ||
      out->shape[1] != p.heads || out->shape[2] != latent)
    return fail(K2_BAD_SHAPE, "q, cache, blocks, lengths and out do not fit each other");
  p.lengths = static_cast<const int64_t*>(lengths->data);
  p.padded_heads = round_up(p.heads, kPanel), p.padded_latent = round_up(latent, kPanel);
  p.padded_width = round_up(p.width, kBlock);
  return check_cache(p);
}

}  // namespace

extern "C" k2_status k2_mla_decode(const k2_tensor* q, const k2_tensor* cache, const k2_tensor* blocks,
                                   const k2_tensor* lengths, int64_t latent, float scale, k2_tensor* out) try {
  Problem p{};
  p.k = &kernels(), p.q = q, p.cache = cache, p.blocks = blocks, p.scale = scale;
  K2_TRY(check(p, lengths, latent, out));
  std::vector<Piece> pieces;
  std::vector<size_t> first(p.batch + 1, 0);
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t from = 0; from < p.lengths[b]; from += kPiece)
      pieces.push_back({b, from, from + kPiece < p.lengths[b] ? from + kPiece : p.lengths[b]});
    first[b + 1] = pieces.size();
  }
  if (!fits({static_cast<int64_t>(pieces.size()), p.padded_heads, p.padded_width + 4, 4}))
    return fail(K2_BAD_SHAPE, "the sums of attention are larger than any memory");
  const int64_t query_bytes = p.padded_heads * p.padded_width * p.k->activation_bytes;
  const int64_t partial_floats = p.padded_heads * (p.padded_latent + 2);
  const int64_t each = round_up(partial_floats * 4, 64);
  std::unique_ptr<char, void (*)(void*)> queries(static_cast<char*>(aligned_alloc(64, round_up(p.batch * query_bytes + 64, 64))), free);
  std::unique_ptr<char, void (*)(void*)> room(static_cast<char*>(aligned_alloc(64, round_up(each * pieces.size() + 64, 64))), free);
  if (!queries || !room) return fail(K2_NO_MEMORY, "no memory for %zu pieces of attention", pieces.size());
  std::vector<Partial> parts;
  for (size_t i = 0; i < pieces.size(); i++) {
    float* at = reinterpret_cast<float*>(room.get() + i * each);
    parts.push_back({at, at + p.padded_heads, at + 2 * p.padded_heads});
  }
  std::atomic<bool> good{true};
  const auto prepare = [&](int64_t b) { pack_queries(p, b, queries.get() + b * query_bytes); };
  const auto attend_to = [&](int64_t i) {
    if (!attend(p, pieces[i], queries.get() + pieces[i].b * query_bytes, parts[i])) good = false;
  };
  const auto finish = [&](int64_t b) { merge_heads(p, parts, first[b], first[b + 1], b, *out); };
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (count == p.batch) {  // short contexts: all of a sequence at once, the others are waited for once
    parallel(count, [&](int64_t b, int) { prepare(b), attend_to(b), finish(b); });
  } else {
    parallel(p.batch, [&](int64_t b, int) { prepare(b); });
    parallel(count, [&](int64_t i, int) { attend_to(i); });
    if (good) parallel(p.batch, [&](int64_t b, int) { finish(b); });
  }
  return good ? K2_OK : fail(K2_NO_MEMORY, "no memory for a thread's stretch of attention");
} K2_CATCH
