// AVX-512 with BF16: tiles of 8 rows × 3 panels, 24 sums in registers. dpbf16 adds a pair's two products one after the other,
// pairs come in order, then float32 `alpha · sum`, one fused `+ beta · c` and one rounding: oneDNN's order, so torch's bits.
#include "kernels.hpp"
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace k2 {
namespace {

constexpr int64_t kLanes = 2 * kSide;              // numbers of one pair's vector
constexpr int64_t kPairsAtOnce = kSummedAtOnce / 2;

inline __m512i load512(const uint16_t* p) { return _mm512_loadu_si512(p); }

// 16 × 16 numbers as 8 vectors of pairs of rows -> 8 vectors of pairs of columns.
inline void turn(const uint16_t* in, uint16_t* out) {
  alignas(64) static const uint16_t kRowByRow[32] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                     1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  alignas(64) static const uint32_t kFirst[16] = {0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27};
  const __m512i rows = _mm512_load_si512(kRowByRow), low = _mm512_load_si512(kFirst);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  __m512i v[8], four[2][4];  // four[h][i]: lanes of 128 bits, pair of columns 4h + lane, rows 4i … 4i + 3
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++) v[r] = _mm512_permutexvar_epi16(rows, load512(in + kLanes * r));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    four[0][i] = _mm512_permutex2var_epi32(v[2 * i], low, v[2 * i + 1]);
    four[1][i] = _mm512_permutex2var_epi32(v[2 * i], high, v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    const __m512i even0 = _mm512_shuffle_i32x4(four[h][0], four[h][1], 0x88);
    const __m512i even1 = _mm512_shuffle_i32x4(four[h][2], four[h][3], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(four[h][0], four[h][1], 0xDD);
    const __m512i odd1 = _mm512_shuffle_i32x4(four[h][2], four[h][3], 0xDD);
    uint16_t* to = out + 4 * h * kLanes;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(to + kLanes, _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(to + 2 * kLanes, _mm512_shuffle_i32x4(even0, even1, 0xDD));
    _mm512_storeu_si512(to + 3 * kLanes, _mm512_shuffle_i32x4(odd0, odd1, 0xDD));
  }
}

// R rows from row `first` of a panel on × P panels, `stride` apart: out = alpha · Σ left · right (+ beta · add), panels
// `out_stride` apart of which out and add begin at these rows.
struct Operands {
  const uint16_t *left, *right, *add;
  uint16_t* out;
  int64_t pairs, stride, out_stride;
  float alpha, beta;
};

template <int R, int P>
inline void sum_pairs(const uint16_t* left, const uint16_t* right, int64_t stride, int64_t pairs, __m512 (&sum)[R][P]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) sum[r][p] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++, left += kLanes, right += kLanes) {
    __m512bh in[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) in[p] = (__m512bh)load512(right + p * stride);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      int32_t pair;
      memcpy(&pair, left + 2 * r, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
      for (int p = 0; p < P; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], both, in[p]);
    }
  }
}

template <int R, int P, bool Add>
void tile(const Operands& o, int first) {
  const uint16_t *left = o.left + 2 * first, *right = o.right;
  __m512 sum[R][P];
  sum_pairs<R, P>(left, right, o.stride, std::min(o.pairs, kPairsAtOnce), sum);
  for (int64_t k = kPairsAtOnce; k < o.pairs; k += kPairsAtOnce) {
    __m512 before[R][P];
    memcpy(before, sum, sizeof sum);
    sum_pairs<R, P>(left + k * kLanes, right + k * kLanes, o.stride, std::min(o.pairs - k, kPairsAtOnce), sum);
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) sum[r][p] = _mm512_add_ps(before[r][p], sum[r][p]);
  }
  alignas(64) static const uint16_t kPairUp[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pair_up = _mm512_load_si512(kPairUp);
  const __m512 alpha = _mm512_set1_ps(o.alpha), beta = _mm512_set1_ps(o.beta);
#pragma GCC unroll 8
  for (int r = 0; r < R; r += 2)
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) {
      const int64_t at = p * o.out_stride + (first + r) * kSide;
      __m512 even = sum[r][p], odd = sum[r + 1][p];
      if (Add) {
        const __m512i c = load512(o.add + at);
        const __m512 c_even = _mm512_castsi512_ps(_mm512_slli_epi32(c, 16));
        const __m512 c_odd = _mm512_castsi512_ps(_mm512_and_si512(c, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
        even = _mm512_fmadd_ps(beta, c_even, _mm512_mul_ps(alpha, even));
        odd = _mm512_fmadd_ps(beta, c_odd, _mm512_mul_ps(alpha, odd));
      }
      _mm512_storeu_si512(o.out + at, _mm512_permutexvar_epi16(pair_up, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
}

// All 16 rows of a panel × `count` panels, 1 to 3.
template <bool Add>
void panels(const Operands& o, int count) {
  if (count == 1) return tile<16, 1, Add>(o, 0);
  for (int first = 0; first < 16; first += 8) count == 2 ? tile<8, 2, Add>(o, first) : tile<8, 3, Add>(o, first);
}

// Row panel i of a symmetric product, left = right, `inputs` long: panels from the diagonal on, and mirrored.
template <bool Add>
void symmetric(const uint16_t* factor, int64_t side, int64_t inputs, float alpha, float beta, int64_t i, uint16_t* out) {
  const int64_t stride = inputs * kSide, out_stride = side * kSide, rows = i * kSide * kSide;
  for (int64_t p = i; p < side / kSide;) {
    const int64_t left_over = side / kSide - p;
    const int count = left_over == 4 ? 2 : static_cast<int>(std::min<int64_t>(left_over, 3));
    const int64_t at = p * out_stride + rows;
    const Operands o{factor + i * stride, factor + p * stride, factor + at, out + at, inputs / 2,
                     stride, out_stride, alpha, beta};
    panels<Add>(o, count);
    for (int64_t end = p + count; p < end; p++)
      if (p > i) turn(out + p * out_stride + rows, out + i * out_stride + p * kSide * kSide);
  }
}

// As torch rounds: to nearest, ties to even, small numbers too, which cvtneps_pbh takes for zero.
inline __m256i round_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, last), _mm512_set1_epi32(0x7FFF));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)), 16));
}

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline __mmask16 first_of(int64_t n) { return n >= kSide ? 0xFFFF : static_cast<__mmask16>((1 << n) - 1); }

void load(const uint16_t* x, float norm, int64_t rows, int64_t columns, int64_t panel, uint16_t* by_columns,
          uint16_t* by_rows) {
  const int64_t side = (rows + kSide - 1) / kSide * kSide, width = (columns + kSide - 1) / kSide * kSide;
  const __mmask16 there = first_of(columns - panel * kSide);
  const __m512 by = _mm512_set1_ps(norm);
  uint16_t* out = by_columns + panel * side * kSide;
  const auto row = [&](int64_t r) {
    const __m256i in = _mm256_maskz_loadu_epi16(r < rows ? there : 0, x + std::min(r, rows - 1) * columns + panel * kSide);
    return _mm512_cvtepu16_epi32(_mm256_maskz_mov_epi16(r < rows ? there : 0, round_bf16(_mm512_div_ps(widen(in), by))));
  };
  for (int64_t r = 0; r < side; r += 2)
    _mm512_storeu_si512(out + r * kSide, _mm512_or_si512(row(r), _mm512_slli_epi32(row(r + 1), 16)));
  for (int64_t i = 0; i < side / kSide; i++)
    turn(out + i * kSide * kSide, by_rows + i * width * kSide + panel * kSide * kSide);
}

void gram(const uint16_t* by_rows, int64_t side, int64_t inputs, int64_t i, uint16_t* out) {
  symmetric<false>(by_rows, side, inputs, 1, 0, i, out);
}

void mix(const uint16_t* gram, int64_t side, float b, float c, int64_t i, uint16_t* out) {
  symmetric<true>(gram, side, side, c, b, i, out);
}

void apply(const uint16_t* mix, const uint16_t* by_columns, int64_t side, int64_t width, float a, int64_t panel, int count,
           uint16_t* out_by_columns, uint16_t* out_by_rows) {
  const int64_t stride = side * kSide;
  const uint16_t* from = by_columns + panel * stride;
  uint16_t* to = out_by_columns + panel * stride;
  for (int64_t i = 0; i < side / kSide; i++) {
    const int64_t rows = i * kSide * kSide;
    panels<true>({mix + i * stride, from, from + rows, to + rows, side / 2, stride, stride, 1, a}, count);
    if (out_by_rows)
      for (int p = 0; p < count; p++)
        turn(to + p * stride + rows, out_by_rows + i * width * kSide + (panel + p) * kSide * kSide);
  }
}

void store(const uint16_t* by_columns, int64_t rows, int64_t columns, int64_t panel, uint16_t* x) {
  const int64_t side = (rows + kSide - 1) / kSide * kSide;
  const __mmask16 there = first_of(columns - panel * kSide);
  const uint16_t* from = by_columns + panel * side * kSide;
  uint16_t* to = x + panel * kSide;
  for (int64_t r = 0; r < rows; r += 2, to += 2 * columns) {
    const __m512i both = load512(from + r * kSide);
    _mm256_mask_storeu_epi16(to, there, _mm512_cvtepi32_epi16(both));
    if (r + 1 < rows) _mm256_mask_storeu_epi16(to + columns, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
  }
}

// from + w·(to − from), from the nearer end.
inline __m512 lerp(__m512 from, __m512 to, float weight) {
  const __m512 way = _mm512_sub_ps(to, from);
  if (weight < 0.5f) return _mm512_fmadd_ps(_mm512_set1_ps(weight), way, from);
  return _mm512_fmadd_ps(way, _mm512_set1_ps(weight - 1), to);
}

void momentum(const MomentumRule& rule, const float* gradient, const uint16_t* gradient_bf16, int64_t n, float* buffer,
              uint16_t* out) {
  const __m512 scale = _mm512_set1_ps(rule.scale);
  for (int64_t i = 0; i < n; i += kSide) {
    const __mmask16 there = first_of(n - i);
    const __m512 unscaled = gradient ? _mm512_maskz_loadu_ps(there, gradient + i)
                                     : widen(_mm256_maskz_loadu_epi16(there, gradient_bf16 + i));
    const __m512 g = _mm512_mul_ps(unscaled, scale);
    const __m512 m = lerp(_mm512_maskz_loadu_ps(there, buffer + i), g, rule.new_share);
    _mm512_mask_storeu_ps(buffer + i, there, m);
    _mm256_mask_storeu_epi16(out + i, there, round_bf16(rule.nesterov ? lerp(g, m, rule.momentum) : m));
  }
}

float norm(const uint16_t* x, int64_t n) {
  __m256 sums = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i in = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    const __m256 v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(in), 16));
    sums = _mm256_fmadd_ps(v, v, sums);  // squares of bf16 numbers are exact: one rounding, as with mul and add
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, sums);
  for (int lane = 1; lane < 8; lane++) lanes[0] += lanes[lane];
  for (; i < n; i++) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    float v;
    memcpy(&v, &bits, 4);
    lanes[0] += v * v;
  }
  return std::sqrt(lanes[0]);
}

float update(float* w, const uint16_t* update, float keep, float by, int64_t n) {
  const __m512 kept = _mm512_set1_ps(keep), times = _mm512_set1_ps(by);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kSide) {
    const __mmask16 there = first_of(n - i);
    const __m512 before = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, w + i), kept);
    const __m512 step = widen(_mm256_maskz_loadu_epi16(there, update + i));
    _mm512_mask_storeu_ps(w + i, there, _mm512_fmadd_ps(step, times, before));
    squares = _mm512_fmadd_ps(step, step, squares);
  }
  return _mm512_reduce_add_ps(squares);
}

}  // namespace

extern "C" const Muon* k2_muon_avx512() {
  static const Muon kTable = {load, gram, mix, apply, store, momentum, norm, update};
  return &kTable;
}

}  // namespace k2
#else
namespace k2 {
extern "C" const Muon* k2_muon_avx512() { return nullptr; }
}  // namespace k2
#endif
