// Absorbed latent attention for decoding: all heads of a query look at the same rows of the cache, so the heads are folded
// into the matrix unit. Per stretch of 128 tokens:
//
//   scores [tokens, heads] = cache rows · queriesᵀ        queries packed once as panels of 16 heads
//   probabilities = exp(scores − running maximum)          as in flash attention: sums are rescaled when it grows
//   sums [heads, latent] += probabilitiesᵀ · cache rows    rows turned into panels of 16 latent values
//
// Few heads would leave most of a panel empty: each is multiplied by itself, 16 tokens at a time.
//
// A context is cut into pieces of 1,024 tokens, whatever the number of threads, and the pieces are merged in order: results
// do not depend on who computed what. Neighbouring queries that see the same rows (new tokens of one sequence, sequences with a
// prefix in common) go over a piece together, as if they were more heads: what lies behind the shorter ones counts for them as
// -infinity, which changes no bit. Source of the absorbed form: DeepSeek-V2 (arXiv 2405.04434, §2.1.2).
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

constexpr int64_t kPiece = 1024, kStretch = 128;
constexpr int64_t kFewHeads = 8;  // 9 heads padded to 16 take as long as 9 one by one
constexpr int64_t kTogether = 128;  // heads of neighbouring queries that share rows: their sums are 256 KB at latents of 512
constexpr int64_t kPartialBytes = 64 << 20;  // of pieces that wait to be merged
constexpr int64_t kAhead = 32;  // tokens: rows are fetched so far before they are multiplied

struct Problem {
  const Kernels* k;
  const k2_tensor *q, *cache, *blocks;
  const int64_t* lengths;
  int64_t batch, heads, latent, width;              // width = latent + rope
  int64_t padded_heads, padded_latent, padded_width;
  float scale;

  bool few() const { return heads <= kFewHeads; }
  int64_t lanes() const { return few() ? heads : padded_heads; }  // of a query, in everything that has one for each head
  int64_t query_bytes() const { return lanes() * padded_width * k->activation_bytes; }
  const uint16_t* row(int64_t b, int64_t t) const {
    const uint16_t* base = static_cast<const uint16_t*>(cache->data);
    if (!blocks) return base + b * cache->strides[0] + t * cache->strides[1];
    const int64_t size = cache->shape[1];
    const int64_t block = static_cast<const int32_t*>(blocks->data)[b * blocks->strides[0] + t / size];
    return base + block * cache->strides[0] + t % size * cache->strides[1];
  }
};

struct Piece {  // tokens [from, to) of `count` queries from b on, which share rows; `longest` of them sees all these tokens
  int64_t b, count, longest, from, to;
};

struct Partial {  // of a piece: [lanes] maxima and sums, [lanes, latent] weighted values; query after query
  float *most, *sum, *values;

  Partial of(const Problem& p, int64_t query) const {
    return {most + query * p.lanes(), sum + query * p.lanes(), values + query * p.lanes() * p.padded_latent};
  }
};

// Which queries' rows are in the same places: of tokens [from, to), which both see.
bool share_rows(const Problem& p, int64_t a, int64_t b, int64_t from, int64_t to) {
  if (!p.blocks) return p.cache->strides[0] == 0;
  const int64_t size = p.cache->shape[1], first = from / size, last = (to - 1) / size;
  const int32_t* table = static_cast<const int32_t*>(p.blocks->data);
  return !memcmp(table + a * p.blocks->strides[0] + first, table + b * p.blocks->strides[0] + first,
                 static_cast<size_t>(last - first + 1) * sizeof(int32_t));
}

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
  for_rows(p, piece.longest, from, from + tokens < piece.to ? from + tokens : piece.to, [&](int64_t, const uint16_t* row) {
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
    const uint16_t* first = p.row(piece.longest, from + t);
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
    const int64_t stride = p.padded_width * kPanel, heads = piece.count * p.padded_heads;
    for (int64_t h = 0; h < heads; h += 2 * kPanel)
      k.gemm(run, a, lda, queries + h / kPanel * stride * k.activation_bytes, stride, h + kPanel < heads ? 2 : 1, depth,
             scores + t * heads + h, heads, false);
    t += run;
  }
}

// How many of a stretch's tokens a query of a piece sees.
int64_t seen(const Problem& p, const Piece& piece, int64_t query, int64_t from, int64_t tokens) {
  const int64_t left = p.lengths[piece.b + query] - from;
  return left < 0 ? 0 : left < tokens ? left : tokens;
}

void hide_unseen(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, float* scores) {
  for (int64_t i = 0; i < piece.count; i++)
    for (int64_t t = seen(p, piece, i, from, tokens); t < tokens; t++)
      std::fill_n(scores + (t * piece.count + i) * p.padded_heads, p.padded_heads, -INFINITY);
}

// Few heads: a panel of 16 would mostly be padding. Every head is multiplied with 16 rows at a time, so that scores [head][t]
// are as the second product wants them, and exponentials fill whole vectors.
void score_few(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, const uint16_t* const* rows,
               const char* queries, float* scores) {
  for (int64_t t = 0; t < tokens; t += 16) {
    if (p.blocks) fetch(p, piece, from + t + kAhead, 16);
    for (int64_t h = 0; h < piece.count * p.heads; h++)
      p.k->dots(rows + t, p.width, queries + h * p.padded_width * p.k->activation_bytes, scores + h * kStretch + t);
  }
}

// scores -> probabilities, 0 behind the tokens that are seen, up to `padded`; `sum` has 16 lanes a head, all on the scale of the
// head's maximum.
void soften_few(const Problem& p, int64_t tokens, int64_t padded, float* scores, float* most, float* sum, float* fade) {
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

// sums += probabilities · values, for the latent part of the rows; probabilities are activations [lane][t]
void weigh(const Problem& p, int64_t queries, int64_t tokens, const uint16_t** rows, const char* probabilities, char* tiles,
           char* copy, float* values) {
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
  const bool no_gaps = p.lanes() == p.heads;  // all queries' heads are rows one after another
  for (int64_t i = 0; i < (no_gaps ? 1 : queries); i++)
    for (int64_t v = 0; v < p.padded_latent; v += 2 * kPanel)
      k.gemm(no_gaps ? queries * p.heads : p.heads, probabilities + i * p.lanes() * kStretch * k.activation_bytes, kStretch,
             tiles + v / kPanel * stride * k.activation_bytes, stride, v + kPanel < p.padded_latent ? 2 : 1, padded,
             values + i * p.lanes() * p.padded_latent + v, p.padded_latent, true);
}

struct Space {  // of one thread, for one piece
  float *scores, *fade, *sums;
  char *turned, *tiles, *copy;

  bool take(const Problem& p, int64_t queries) {
    const int64_t a = p.k->activation_bytes, widest = p.padded_width > p.padded_latent ? p.padded_width : p.padded_latent;
    const int64_t lanes = queries * p.lanes(), scores_bytes = kStretch * lanes * 4, turned_bytes = lanes * kStretch * a;
    char* room = static_cast<char*>(thread_scratch(2, scores_bytes + turned_bytes + 17 * lanes * 4 + 64));
    tiles = static_cast<char*>(thread_scratch(0, kStretch * p.padded_latent * a));
    copy = static_cast<char*>(thread_scratch(3, kStretch * widest * 4));
    scores = reinterpret_cast<float*>(room), turned = room + scores_bytes;
    sums = reinterpret_cast<float*>(turned + turned_bytes), fade = sums + 16 * lanes;
    return room && tiles && copy;
  }
};

// Scores and probabilities of a stretch: activations [lane][t].
const char* probabilities_of(const Problem& p, const Piece& piece, int64_t from, int64_t tokens, const uint16_t* const* rows,
                             const char* queries, const Space& space, const Partial& out) {
  const Kernels& k = *p.k;
  const int64_t lanes = piece.count * p.lanes();
  if (!p.few()) {
    score(p, piece, from, tokens, queries, space.copy, space.scores);
    hide_unseen(p, piece, from, tokens, space.scores);
    k.softmax(space.scores, tokens, lanes, p.scale, out.most, out.sum, space.fade);
    k.turn(space.scores, tokens, lanes, space.turned, kStretch);
    return space.turned;
  }
  score_few(p, piece, from, tokens, rows, queries, space.scores);
  for (int64_t i = 0, h = 0; i < piece.count; i++, h += p.heads)
    soften_few(p, seen(p, piece, i, from, tokens), round_up(tokens, kGroup), space.scores + h * kStretch, out.most + h,
               space.sums + 16 * h, space.fade + h);
  if (k.activation_bytes == 4) return reinterpret_cast<const char*>(space.scores);
  k.store_bf16(space.scores, lanes * kStretch, reinterpret_cast<uint16_t*>(space.turned));
  return space.turned;
}

bool attend(const Problem& p, const Piece& piece, const char* queries, const Partial& out) {
  const Kernels& k = *p.k;
  const int64_t lanes = piece.count * p.lanes();
  Space space;
  if (!space.take(p, piece.count)) return false;
  std::fill_n(out.most, lanes, -INFINITY);
  std::fill_n(out.sum, lanes, 0.0f);
  std::fill_n(out.values, lanes * p.padded_latent, 0.0f);
  std::fill_n(space.sums, 16 * lanes, 0.0f);
  if (p.blocks) fetch(p, piece, piece.from, kAhead);
  for (int64_t from = piece.from; from < piece.to; from += kStretch) {
    const int64_t tokens = piece.to - from < kStretch ? piece.to - from : kStretch;
    const uint16_t* rows[kStretch];
    for_rows(p, piece.longest, from, from + tokens, [&](int64_t t, const uint16_t* row) { rows[t - from] = row; });
    for (int64_t t = tokens; t < round_up(tokens, 16); t++) rows[t] = rows[tokens - 1];
    const char* probabilities = probabilities_of(p, piece, from, tokens, rows, queries, space, out);
    if (from > piece.from) k.scale_rows(out.values, lanes, p.padded_latent, p.padded_latent, space.fade);
    weigh(p, piece.count, tokens, rows, probabilities, space.tiles, space.copy, out.values);
  }
  for (int64_t h = 0; p.few() && h < lanes; h++)
    for (int i = 0; i < 16; i++) out.sum[h] += space.sums[16 * h + i];
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

// Pieces of queries [first, last), piece by piece of the context, neighbours that share rows together. No bits depend on who
// is together, so that as many pieces may be made as threads can use.
std::vector<Piece> cut(const Problem& p, int64_t first, int64_t last) {
  int64_t all = 0, longest = 0;
  for (int64_t b = first; b < last; b++) all += (p.lengths[b] + kPiece - 1) / kPiece, longest = std::max(longest, p.lengths[b]);
  const int64_t most = std::min(kTogether / p.lanes(), all / (2 * pool_threads()));
  std::vector<Piece> pieces;
  pieces.reserve(all);
  for (int64_t from = 0; from < longest; from += kPiece)
    for (int64_t b = first; b < last; b++) {
      if (p.lengths[b] <= from) continue;
      const int64_t to = std::min(from + kPiece, p.lengths[b]);
      if (!pieces.empty()) {
        Piece& before = pieces.back();
        if (before.from == from && before.b + before.count == b && before.count < most &&
            share_rows(p, before.longest, b, from, std::min(before.to, to))) {
          before.count++;
          if (to > before.to) before.to = to, before.longest = b;
          continue;
        }
      }
      pieces.push_back({b, 1, b, from, to});
    }
  return pieces;
}

// Queries [first, last) from beginning to end.
k2_status decode(const Problem& p, int64_t first, int64_t last, const k2_tensor& out) {
  const std::vector<Piece> pieces = cut(p, first, last);
  std::vector<size_t> begin(last - first + 1, 0);  // of each query's parts
  for (int64_t b = first; b < last; b++) begin[b - first + 1] = begin[b - first] + (p.lengths[b] + kPiece - 1) / kPiece;
  const int64_t lane_floats = p.padded_latent + 2, each = p.lanes() * lane_floats;
  if (!fits({static_cast<int64_t>(begin.back()), each, 4}) || !fits({last - first, p.query_bytes()}))
    return fail(K2_BAD_SHAPE, "the sums of attention are larger than any memory");
  const std::unique_ptr<void, void (*)(void*)> queries(allocate((last - first) * p.query_bytes()), free);
  const std::unique_ptr<void, void (*)(void*)> room(allocate(begin.back() * each * sizeof(float)), free);
  if (!queries || !room) return fail(K2_NO_MEMORY, "no memory for %zu pieces of attention", pieces.size());
  std::vector<Partial> whole, parts(begin.back());
  float* at = static_cast<float*>(room.get());
  for (const Piece& piece : pieces) {
    const int64_t lanes = piece.count * p.lanes();
    whole.push_back({at, at + lanes, at + 2 * lanes});
    for (int64_t i = 0; i < piece.count; i++)
      parts[begin[piece.b - first + i] + piece.from / kPiece] = whole.back().of(p, i);
    at += piece.count * each;
  }
  std::atomic<bool> good{true};
  const auto query = [&](int64_t b) { return static_cast<char*>(queries.get()) + (b - first) * p.query_bytes(); };
  const auto attend_to = [&](int64_t i) {
    if (!attend(p, pieces[i], query(pieces[i].b), whole[i])) good = false;
  };
  const auto finish = [&](int64_t b) { merge_heads(p, parts, begin[b - first], begin[b - first + 1], b, out); };
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (static_cast<int64_t>(begin.back()) == last - first) {  // short contexts: all of a sequence at once
    parallel(count, [&](int64_t i, int) {
      const Piece& piece = pieces[i];
      for (int64_t b = piece.b; b < piece.b + piece.count; b++) pack_queries(p, b, query(b));
      attend_to(i);
      for (int64_t b = piece.b; b < piece.b + piece.count; b++) finish(b);
    });
  } else {
    parallel(last - first, [&](int64_t i, int) { pack_queries(p, first + i, query(first + i)); });
    parallel(count, [&](int64_t i, int) { attend_to(i); });
    if (good) parallel(last - first, [&](int64_t i, int) { finish(first + i); });
  }
  return good ? K2_OK : fail(K2_NO_MEMORY, "no memory for a thread's stretch of attention");
}

}  // namespace

extern "C" k2_status k2_mla_decode(const k2_tensor* q, const k2_tensor* cache, const k2_tensor* blocks,
                                   const k2_tensor* lengths, int64_t latent, float scale, k2_tensor* out) try {
  Problem p{};
  p.k = &kernels(), p.q = q, p.cache = cache, p.blocks = blocks, p.scale = scale;
  K2_TRY(check(p, lengths, latent, out));
  const int64_t piece_bytes = p.lanes() * (p.padded_latent + 2) * 4;
  for (int64_t first = 0, last = 0; first < p.batch; first = last) {
    int64_t bytes = 0;
    do bytes += (p.lengths[last++] + kPiece - 1) / kPiece * piece_bytes;
    while (last < p.batch && bytes + (p.lengths[last] + kPiece - 1) / kPiece * piece_bytes <= kPartialBytes);
    K2_TRY(decode(p, first, last, *out));
  }
  return K2_OK;
} K2_CATCH
