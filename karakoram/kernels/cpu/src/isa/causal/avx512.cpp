// Causal attention with AVX-512 BF16. Everything that is multiplied lies in panels of 16, as pairs of what is summed (dpbf16):
//   by tokens  panel of 16 tokens: per pair of channels 16 lanes, lane t = (x[t, 2c], x[t, 2c + 1])
//   by channels panel of 16 channels: per pair of tokens 16 lanes, lane c = (x[2t, c], x[2t + 1, c])
// Scores are computed transposed, keys down and queries across, three panels of queries at a time: maxima and sums over keys are
// then operations on lanes, and two rows of probabilities, interleaved, are a panel of queries by pairs of keys.
//
// Forward: all scores of 48 queries (float32), their maxima, exponentials and sums, then values · probabilities. Backward: 32
// keys at a time; scores and probabilities are computed anew from the maxima and sums that the forward kept:
//   dV = Pᵀ · dO;   dS = P ∘ (dO · Vᵀ − D) · scale, D = Σ dO ∘ O;   dK = dSᵀ · Q;   dQ += dS · K
// (FlashAttention-2, arXiv 2307.08691, §3.1 and Algorithm 2). P and dS are rounded to bf16 for the products, sums are float32.
#include "kernels.hpp"
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace k2 {
namespace {

constexpr int64_t kSide = 16, kLanes = 2 * kSide;  // numbers of a pair's vector
constexpr int kAcross = 3;                          // panels of queries at once
constexpr int64_t kKeys = 32, kQueries = 96;        // of a block in the backward pass: all that it touches is some 60 KB
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m512 widen(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline int64_t panels_of(int64_t n) { return (n + kSide - 1) / kSide; }

// (even[i], odd[i]) as bf16 in lane i.
inline __m512i pairs_of(__m512 even, __m512 odd) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd)), 16);
  return _mm512_or_si512(high, _mm512_cvtepu16_epi32(narrow(even)));
}

// e^x, relative error 2e-7, for x ≤ 0: 0 from −104 on, −∞ too; NaN stays.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// sum[r][p] += Σ over pairs of left row r · right panel p. Rows of `left` are `row` numbers apart and its pairs `pair`.
template <int R, int P>
inline void add_products(const uint16_t* left, int64_t row, int64_t pair, const uint16_t* right, int64_t stride, int64_t pairs,
                         __m512 (&sum)[R][P]) {
  for (int64_t k = 0; k < pairs; k++, left += pair, right += kLanes) {
    __m512bh in[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) in[p] = (__m512bh)load512(right + p * stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t both;
      memcpy(&both, left + r * row, 4);
      const __m512bh lanes = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], lanes, in[p]);
    }
  }
}

template <int R, int P>
inline void clear(__m512 (&sum)[R][P]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) sum[r][p] = _mm512_setzero_ps();
}

// Zeros behind the last token, up to `panels` panels.
void by_tokens(const HeadRows& x, int64_t tokens, int64_t width, int64_t panels, uint16_t* out) {
  const int64_t s = x.step;
  const __m512i steps = _mm512_setr_epi64(0, s, 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7 * s);
  for (int64_t panel = 0; panel < panels; panel++, out += width * kSide) {
    const int64_t left = std::max<int64_t>(0, std::min(tokens - panel * kSide, kSide));
    const unsigned there = (1u << left) - 1;
    const uint16_t* from = x.data + panel * kSide * x.step;
    for (int64_t c = 0; c < width; c += 2) {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i low = _mm512_mask_i64gather_epi32(zero, static_cast<__mmask8>(there), steps, from + c, 2);
      const __m256i high =
          _mm512_mask_i64gather_epi32(zero, static_cast<__mmask8>(there >> 8), steps, from + c + 8 * x.step, 2);
      _mm512_storeu_si512(out + c * kSide, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
  }
}

void by_channels(const HeadRows& x, int64_t tokens, int64_t width, int64_t padded, uint16_t* out) {
  for (int64_t t = 0; t < padded; t += 2)
    for (int64_t c = 0; c < width; c += kSide) {
      const auto row = [&](int64_t token) {
        if (token >= tokens) return _mm512_setzero_si512();
        const auto* from = reinterpret_cast<const __m256i*>(x.data + token * x.step + c);
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
      };
      _mm512_storeu_si512(out + c * padded + t * kSide, _mm512_or_si512(row(t), _mm512_slli_epi32(row(t + 1), 16)));
    }
}

// Lanes of pairs of channels [width / 2][16 tokens], `step` numbers apart, to rows of the first `count` tokens.
void to_rows(const uint16_t* pairs, int64_t step, int64_t width, int64_t count, const HeadRows& out, int64_t first) {
  for (int64_t t = 0; t < count; t++) {
    uint16_t* row = out.data + (first + t) * out.step;
    for (int64_t c = 0; c < width; c += 2) memcpy(row + c, pairs + c / 2 * step + 2 * t, 4);
  }
}

// Memory in pieces of whole cache lines.
struct Room {
  char* at;

  template <class T>
  T* take(int64_t count) {
    char* piece = at;
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

// work(1, 2 or 3 panels as a constant).
template <class Work>
void by_count(int64_t left_over, const Work& work) {
  left_over >= 3 ? work(std::integral_constant<int, 3>())
                 : left_over == 2 ? work(std::integral_constant<int, 2>()) : work(std::integral_constant<int, 1>());
}

struct Forward {
  const CausalHead& h;
  int64_t panels;  // of tokens
  uint16_t *keys, *queries, *values, *p, *rows;
  float* scores;

  Forward(const CausalHead& head, Room room)
      : h(head), panels(panels_of(h.tokens)), keys(room.take<uint16_t>(panels * kSide * h.width)),
        queries(room.take<uint16_t>(panels * kSide * h.width)), values(room.take<uint16_t>(panels * kSide * h.value_width)),
        p(room.take<uint16_t>(kAcross * panels * kSide * kSide)), rows(room.take<uint16_t>(kAcross * kSide * h.value_width)),
        scores(room.take<float>(kAcross * kSide * panels * kSide)) {}

  // Scores of `P` panels of queries from panel `first` on -> the largest of each.
  template <int P>
  void score(int64_t first, __m512 (&largest)[P]) const {
    const int64_t panel = h.width * kSide;
    const __m512 scale = _mm512_set1_ps(h.scale), never = _mm512_set1_ps(-kInfinity);
    for (int p = 0; p < P; p++) largest[p] = never;
    for (int64_t key = 0; key < (first + P) * kSide; key += 8) {
      const int64_t kp = key / kSide, in_panel = key % kSide;
      __m512 sum[8][P];
      clear(sum);
      add_products(keys + kp * panel + 2 * in_panel, 2, kLanes, queries + first * panel, panel, h.width / 2, sum);
      float* out = scores + key * P * kSide;
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
          __m512 s = _mm512_mul_ps(sum[r][p], scale);
          if (kp >= first + p) {  // the diagonal, and what lies behind it
            const unsigned seen = kp > first + p ? 0 : 0xFFFFu << (in_panel + r);
            s = _mm512_mask_mov_ps(never, static_cast<__mmask16>(seen), s);
          }
          largest[p] = _mm512_max_ps(largest[p], s);
          _mm512_storeu_ps(out + (r * P + p) * kSide, s);
        }
    }
  }

  template <int P>
  void take(int64_t first, __m512* largest_of_all) const {
    const int64_t seen = (first + P) * kSide, stride = panels * kSide * kSide;  // of a panel of p
    __m512 largest[P], total[P];
    score<P>(first, largest);
    for (int p = 0; p < P; p++) total[p] = _mm512_setzero_ps();
    for (int64_t key = 0; key < seen; key += 2)
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) {
        const float* s = scores + (key * P + p) * kSide;
        const __m512 even = exponential(_mm512_sub_ps(_mm512_loadu_ps(s), largest[p]));
        const __m512 odd = exponential(_mm512_sub_ps(_mm512_loadu_ps(s + P * kSide), largest[p]));
        total[p] = _mm512_add_ps(total[p], _mm512_add_ps(even, odd));
        _mm512_storeu_si512(this->p + p * stride + key * kSide, pairs_of(even, odd));
      }
    for (int p = 0; p < P; p++) {
      total[p] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[p]);
      const int64_t at = (first + p) * kSide, count = std::min(kSide, h.tokens - at);
      const auto there = static_cast<__mmask16>((1u << count) - 1);
      *largest_of_all = _mm512_mask_max_ps(*largest_of_all, there, *largest_of_all, largest[p]);
      float m[16], inverse[16];
      _mm512_storeu_ps(m, largest[p]);
      _mm512_storeu_ps(inverse, total[p]);
      for (int64_t t = 0; t < count; t++) {
        float* of_token = h.stats + (at + t) * h.stats_step;
        of_token[0] = m[t];
        of_token[1] = inverse[t];
      }
    }
    for (int64_t c = 0; c < h.value_width; c += 8) {
      __m512 sum[8][P];
      clear(sum);
      const uint16_t* left = values + c / kSide * stride_of_values() + 2 * (c % kSide);
      add_products(left, 2, kLanes, this->p, stride, seen / 2, sum);
      for (int r = 0; r < 8; r += 2)
        for (int p = 0; p < P; p++) {
          const __m512 even = _mm512_mul_ps(sum[r][p], total[p]), odd = _mm512_mul_ps(sum[r + 1][p], total[p]);
          _mm512_storeu_si512(rows + (c + r) / 2 * kAcross * kLanes + p * kLanes, pairs_of(even, odd));
        }
    }
    for (int p = 0; p < P; p++) {
      const int64_t at = (first + p) * kSide;
      to_rows(rows + p * kLanes, kAcross * kLanes, h.value_width, std::min(kSide, h.tokens - at), h.out, at);
    }
  }

  int64_t stride_of_values() const { return panels * kSide * kSide; }

  float run() const {
    by_tokens(h.k, h.tokens, h.width, panels, keys);
    by_tokens(h.q, h.tokens, h.width, panels, queries);
    by_channels(h.v, h.tokens, h.value_width, panels * kSide, values);
    __m512 largest = _mm512_set1_ps(-kInfinity);
    for (int64_t first = 0; first < panels; first += kAcross)
      by_count(panels - first, [&](auto across) { take<decltype(across)::value>(first, &largest); });
    return _mm512_reduce_max_ps(largest);
  }
};

struct Backward {
  const CausalHead& h;
  int64_t panels, padded;                       // panels of queries; tokens up to whole blocks of keys
  uint16_t *keys, *values, *queries, *grads;    // by tokens
  uint16_t *query_rows, *grad_rows, *key_rows;  // by channels
  uint16_t *p, *ds, *ds_pairs, *rows;           // of one block of keys and one of queries
  float *m, *inverse, *d;                       // of each query
  float *grad_q, *grad_k, *grad_v;              // transposed, of all queries; of a block of keys

  Backward(const CausalHead& head, Room room) : h(head), panels(panels_of(h.tokens)) {
    padded = (h.tokens + kKeys - 1) / kKeys * kKeys;
    keys = room.take<uint16_t>(padded * h.width);
    values = room.take<uint16_t>(padded * h.value_width);
    queries = room.take<uint16_t>(padded * h.width);
    grads = room.take<uint16_t>(padded * h.value_width);
    query_rows = room.take<uint16_t>(padded * h.width);
    grad_rows = room.take<uint16_t>(padded * h.value_width);
    key_rows = room.take<uint16_t>(padded * h.width);
    p = room.take<uint16_t>(kKeys * kQueries);
    ds = room.take<uint16_t>(kKeys * kQueries);
    ds_pairs = room.take<uint16_t>(kKeys * kQueries);
    rows = room.take<uint16_t>(kSide * h.width);
    m = room.take<float>(padded);
    inverse = room.take<float>(padded);
    d = room.take<float>(padded);
    grad_q = room.take<float>(padded * h.width);
    grad_k = room.take<float>(kKeys * h.width);
    grad_v = room.take<float>(kKeys * h.value_width);
  }

  // Σ dO ∘ O of each token, and what the forward kept; tokens that are not there have probability 0.
  void prepare() const {
    by_tokens(h.k, h.tokens, h.width, padded / kSide, keys);
    by_tokens(h.v, h.tokens, h.value_width, padded / kSide, values);
    by_tokens(h.q, h.tokens, h.width, padded / kSide, queries);
    by_tokens(h.grad_out, h.tokens, h.value_width, padded / kSide, grads);
    by_channels(h.q, h.tokens, h.width, padded, query_rows);
    by_channels(h.grad_out, h.tokens, h.value_width, padded, grad_rows);
    by_channels(h.k, h.tokens, h.width, padded, key_rows);
    for (int64_t t = 0; t < padded; t++) {
      m[t] = inverse[t] = d[t] = 0;
      if (t >= h.tokens) continue;
      m[t] = h.stats[t * h.stats_step];
      inverse[t] = h.stats[t * h.stats_step + 1];
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < h.value_width; c += kSide)
        sum = _mm512_fmadd_ps(widen(h.grad_out.data + t * h.grad_out.step + c), widen(h.out.data + t * h.out.step + c), sum);
      d[t] = _mm512_reduce_add_ps(sum);
    }
    memset(grad_q, 0, static_cast<size_t>(padded * h.width) * sizeof(float));
  }

  // p and ds of a block of keys (of panel `block` on) and P panels of queries from panel `first` on, which are panels `at` on of
  // the block of queries.
  template <int P>
  void differentiate(int64_t block, int64_t first, int64_t at) const {
    const int64_t panel = h.width * kSide, value_panel = h.value_width * kSide;
    const __m512 scale = _mm512_set1_ps(h.scale);
    for (int64_t key = 0; key < kKeys; key += 8) {
      const int64_t kp = block + key / kSide, in_panel = key % kSide;
      uint16_t *p_here = p + key * kQueries + at * kSide, *ds_here = ds + key * kQueries + at * kSide;
      __m512 sum[8][P];
      clear(sum);
      add_products(keys + kp * panel + 2 * in_panel, 2, kLanes, queries + first * panel, panel, h.width / 2, sum);
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
          const int64_t lanes = (first + p) * kSide;
          __m512 e = exponential(_mm512_fmsub_ps(sum[r][p], scale, _mm512_loadu_ps(m + lanes)));
          e = _mm512_mul_ps(e, _mm512_loadu_ps(inverse + lanes));
          if (kp >= first + p) {
            const unsigned seen = kp > first + p ? 0 : 0xFFFFu << (in_panel + r);
            e = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen), e);
          }
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(p_here + r * kQueries + p * kSide), narrow(e));
        }
      clear(sum);
      add_products(values + kp * value_panel + 2 * in_panel, 2, kLanes, grads + first * value_panel, value_panel,
                   h.value_width / 2, sum);
#pragma GCC unroll 4
      for (int r = 0; r < 8; r += 2)
#pragma GCC unroll 3
        for (int p = 0; p < P; p++) {
          const __m512 d_q = _mm512_loadu_ps(d + (first + p) * kSide);
          const int64_t place = r * kQueries + p * kSide;
          const auto of_row = [&](int odd) {
            const __m512 share = _mm512_mul_ps(widen(p_here + place + odd * kQueries), scale);
            return narrow(_mm512_mul_ps(share, _mm512_sub_ps(sum[r + odd][p], d_q)));
          };
          const __m256i even = of_row(0), odd = of_row(1);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_here + place), even);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_here + place + kQueries), odd);
          const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
          _mm512_storeu_si512(ds_pairs + (at + p) * kKeys * kSide + (key + r) * kSide, both);
        }
    }
  }

  // grad_q of P panels of queries += what the block's ds says.
  template <int P>
  void add_to_queries(int64_t block, int64_t first, int64_t at) const {
    for (int64_t c = 0; c < h.width; c += 8) {
      const uint16_t* left = key_rows + c / kSide * padded * kSide + block * kSide * kSide + 2 * (c % kSide);
      add_into<P>(left, 2, kLanes, ds_pairs + at * kKeys * kSide, kKeys * kSide, kKeys / 2,
                  grad_q + c * padded + first * kSide, padded);
    }
  }

  // 8 rows of P panels in memory += products.
  template <int P>
  void add_into(const uint16_t* left, int64_t row, int64_t pair, const uint16_t* right, int64_t stride, int64_t pairs, float* out,
                int64_t step) const {
    __m512 sum[8][P];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) sum[r][p] = _mm512_loadu_ps(out + r * step + p * kSide);
    add_products(left, row, pair, right, stride, pairs, sum);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) _mm512_storeu_ps(out + r * step + p * kSide, sum[r][p]);
  }

  // [keys, width] += left [keys, a block's queries] · right, by channels.
  void add_to_keys(const uint16_t* left, int64_t queries_here, const uint16_t* right, int64_t width, float* out) const {
    const int64_t stride = padded * kSide;
    for (int64_t c = 0; c < width; c += kAcross * kSide) {
      const uint16_t* from = right + c / kSide * stride;
      const int64_t left_over = (width - c) / kSide;
      for (int64_t key = 0; key < kKeys; key += 8) {
        const auto add = [&](auto count) {
          add_into<decltype(count)::value>(left + key * kQueries, kQueries, 2, from, stride, queries_here / 2,
                                           out + key * width + c, width);
        };
        by_count(left_over, add);
      }
    }
  }

  void take(int64_t block) const {
    memset(grad_k, 0, static_cast<size_t>(kKeys * h.width) * sizeof(float));
    memset(grad_v, 0, static_cast<size_t>(kKeys * h.value_width) * sizeof(float));
    for (int64_t first = block; first < panels; first += kQueries / kSide) {
      const int64_t count = std::min(kQueries / kSide, panels - first);
      for (int64_t at = 0; at < count; at += kAcross)
        by_count(count - at, [&](auto across) {
          differentiate<decltype(across)::value>(block, first + at, at);
          add_to_queries<decltype(across)::value>(block, first + at, at);
        });
      const int64_t here = first * kSide * kSide;  // of a panel by channels
      add_to_keys(p, count * kSide, grad_rows + here, h.value_width, grad_v);
      add_to_keys(ds, count * kSide, query_rows + here, h.width, grad_k);
    }
    store(block, grad_k, h.width, h.grad_k);
    store(block, grad_v, h.value_width, h.grad_v);
  }

  void store(int64_t block, const float* from, int64_t width, const HeadRows& out) const {
    for (int64_t key = 0; key < kKeys && block * kSide + key < h.tokens; key++)
      for (int64_t c = 0; c < width; c += kSide)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.data + (block * kSide + key) * out.step + c),
                            narrow(_mm512_loadu_ps(from + key * width + c)));
  }

  void run() const {
    prepare();
    for (int64_t block = 0; block < panels; block += kKeys / kSide) take(block);
    for (int64_t first = 0; first < h.tokens; first += kSide) {
      for (int64_t c = 0; c < h.width; c += 2) {
        const float* from = grad_q + c * padded + first;
        _mm512_storeu_si512(rows + c * kSide, pairs_of(_mm512_loadu_ps(from), _mm512_loadu_ps(from + padded)));
      }
      to_rows(rows, kLanes, h.width, std::min(kSide, h.tokens - first), h.grad_q, first);
    }
  }
};

constexpr int64_t kSlack = 64 * 20;  // of pieces rounded up to cache lines

int64_t forward_bytes(int64_t tokens, int64_t width, int64_t value_width) {
  const int64_t n = panels_of(tokens) * kSide;
  return n * (2 * (2 * width + value_width) + kAcross * kSide * (2 + 4)) + 2 * kAcross * kSide * value_width + kSlack;
}

int64_t backward_bytes(int64_t tokens, int64_t width, int64_t value_width) {
  const int64_t n = (tokens + kKeys - 1) / kKeys * kKeys, per_token = 2 * (4 * width + 3 * value_width) + 4 * (3 + width);
  return n * per_token + kKeys * (3 * 2 * kQueries + 4 * (width + value_width)) + 2 * kSide * width + kSlack;
}

float forward(const CausalHead& head, void* room) { return Forward(head, Room{static_cast<char*>(room)}).run(); }
void backward(const CausalHead& head, void* room) { Backward(head, Room{static_cast<char*>(room)}).run(); }

}  // namespace

extern "C" const Causal* k2_causal_avx512() {
  static const Causal kTable = {forward_bytes, backward_bytes, forward, backward};
  return &kTable;
}

}  // namespace k2
#else
namespace k2 {
extern "C" const Causal* k2_causal_avx512() { return nullptr; }
}  // namespace k2
#endif
