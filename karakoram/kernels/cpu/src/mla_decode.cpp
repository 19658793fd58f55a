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

#include "matrix.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

constexpr int64_t kPiece = 1024, kStretch = 128;

struct Problem {
  const Kernels* k;
  const k2_tensor *q, *cache, *blocks;
  const int64_t* lengths;
  int64_t batch, heads, latent, width;              // width = latent + rope
  int64_t padded_heads, padded_latent, padded_width;
  float scale;

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

// Queries of one sequence as tiles: [heads / 16][padded width] in the kernels' operand order.
void pack_queries(const Problem& p, int64_t b, void* tiles) {
  std::vector<uint16_t> panel(p.padded_width * kPanel);
  for (int64_t h = 0; h < p.padded_heads; h += kPanel) {
    std::fill(panel.begin(), panel.end(), uint16_t(0));
    for (int64_t n = 0; n < kPanel && h + n < p.heads; n++) {
      const uint16_t* q = static_cast<const uint16_t*>(p.q->data) + b * p.q->strides[0] + (h + n) * p.q->strides[1];
      for (int64_t i = 0; i < p.width; i++) panel[16 * (i & ~int64_t(1)) + 2 * n + (i & 1)] = q[i];
    }
    p.k->tile_bf16(panel.data(), p.padded_width / kBlock, static_cast<char*>(tiles) + h * p.padded_width * p.k->activation_bytes);
  }
}

// scores[t][head] of a stretch; rows are multiplied where they lie if they can be, else copied first.
void score(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, const void* queries, char* copy, float* scores) {
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
      k.gemm(run, a, lda, static_cast<const char*>(queries) + h / kPanel * stride * k.activation_bytes, stride,
             h + kPanel < p.padded_heads ? 2 : 1, depth, scores + t * p.padded_heads + h, p.padded_heads, false);
    t += run;
  }
}

// sums += probabilities · values, for the latent part of the rows
void weigh(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, const float* scores, char* turned,
           char* tiles, char* copy, float* values) {
  const Kernels& k = *p.k;
  const int64_t padded = round_up(tokens, kGroup);
  k.turn(scores, tokens, p.padded_heads, turned, kStretch);
  const uint16_t* rows[kStretch];
  for (int64_t t = 0; t < tokens; t++) {
    rows[t] = p.row(piece.b, from + t);
    if (p.padded_latent > p.width) {  // the last panel would read behind the row
      uint16_t* place = reinterpret_cast<uint16_t*>(copy) + t * p.padded_latent;
      memcpy(place, rows[t], p.width * 2);
      memset(place + p.width, 0, (p.padded_latent - p.width) * 2);
      rows[t] = place;
    }
  }
  k.tile_values(rows, tokens, padded, p.padded_latent, tiles);
  const int64_t stride = padded * kPanel;
  for (int64_t v = 0; v < p.padded_latent; v += 2 * kPanel)
    k.gemm(p.padded_heads, turned, kStretch, tiles + v / kPanel * stride * k.activation_bytes, stride,
           v + kPanel < p.padded_latent ? 2 : 1, padded, values + v, p.padded_latent, true);
}

bool attend(const Problem& p, const Piece& piece, const void* queries, const Partial& out) {
  const Kernels& k = *p.k;
  const int64_t a = k.activation_bytes, widest = p.padded_width > p.padded_latent ? p.padded_width : p.padded_latent;
  const int64_t scores_bytes = round_up(kStretch * p.padded_heads * 4, 64), turned_bytes = round_up(p.padded_heads * kStretch * a, 64);
  char* room = static_cast<char*>(thread_scratch(2, scores_bytes + turned_bytes + p.padded_heads * 4 + 64));
  char* tiles = static_cast<char*>(thread_scratch(0, kStretch * p.padded_latent * a));
  char* copy = static_cast<char*>(thread_scratch(3, kStretch * widest * 4));
  if (!room || !tiles || !copy) return false;
  float* scores = reinterpret_cast<float*>(room);
  char* turned = room + scores_bytes;
  float* fade = reinterpret_cast<float*>(turned + turned_bytes);
  for (int64_t h = 0; h < p.padded_heads; h++) out.most[h] = -INFINITY, out.sum[h] = 0;
  memset(out.values, 0, p.padded_heads * p.padded_latent * 4);
  for (int64_t from = piece.from; from < piece.to; from += kStretch) {
    const int64_t tokens = piece.to - from < kStretch ? piece.to - from : kStretch;
    score(p, piece, from, tokens, queries, copy, scores);
    k.softmax(scores, tokens, p.padded_heads, p.scale, out.most, out.sum, fade);
    if (from > piece.from) k.scale_rows(out.values, p.heads, p.padded_latent, p.padded_latent, fade);
    weigh(p, piece, from, tokens, scores, turned, tiles, copy, out.values);
  }
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

k2_status check_cache(const Problem& p) {
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
                                   const k2_tensor* lengths, int64_t latent, float scale, k2_tensor* out) {
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
  parallel(p.batch, [&](int64_t b, int) { pack_queries(p, b, queries.get() + b * query_bytes); });
  parallel(static_cast<int64_t>(pieces.size()), [&](int64_t i, int) {
    if (!attend(p, pieces[i], queries.get() + pieces[i].b * query_bytes, parts[i])) good = false;
  });
  if (!good) return fail(K2_NO_MEMORY, "no memory for a thread's stretch of attention");
  parallel(p.batch, [&](int64_t b, int) {
    std::vector<float> row(p.padded_latent);
    for (int64_t h = 0; h < p.heads; h++) {
      merge(p, parts, first[b], first[b + 1], h, row.data());
      const int64_t place = b * out->strides[0] + h * out->strides[1];
      if (out->dtype == K2_F32)
        memcpy(static_cast<float*>(out->data) + place, row.data(), p.latent * 4);
      else
        p.k->store_bf16(row.data(), p.latent, static_cast<uint16_t*>(out->data) + place);
    }
  });
  return K2_OK;
}
