// AVX-512 with BF16: bf16 activations, pairs of products summed in float32 by dpbf16. Shared by avx512.cpp and amx.cpp.
#pragma once
#include <immintrin.h>

#include "avx512_fp8.hpp"
#include "avx512_sums.hpp"

namespace k2 {
namespace {

constexpr int64_t kAhead = 4096;  // bytes: where a panel will be read some 150 ns later

inline __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

inline __m512bh pair_of(const uint16_t* x) {  // two neighbouring inputs in every lane
  int32_t both;
  memcpy(&both, x, 4);
  return as_bf16(_mm512_set1_epi32(both));
}

void load_bf16(const uint16_t* x, int64_t n, void* out) { memcpy(out, x, 2 * n); }

void silu_mul_bf16(const float* gate, const float* up, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 h = silu_mul_vector(load_vector<f32x16>(gate + i), load_vector<f32x16>(up + i));
    store_vector(static_cast<uint16_t*>(out) + i, __builtin_convertvector(round_bf16(h), u16x16));
  }
}

// Codes -8…7 as bf16, twice: vpermw looks at five bits of an index, and the fifth belongs to the next code.
inline __m512i code_words() {
  alignas(64) uint16_t words[32];
  for (int i = 0; i < 32; i++) words[i] = bf16_from_float(static_cast<float>((i & 15) - 8));
  return _mm512_load_si512(words);
}

// Weights are multiplied as plain codes, which bf16 holds exactly; a group's sum is scaled once, in float32. 6 rows × 2 panels
// are 12 sums of a group and 12 in all. With few rows two groups are under way at once, for dpbf16 takes some six cycles.
template <int R, int P>
void multiply_int4_bf16_rows(const uint16_t* x, int64_t ldx, const void* const* panels, const float* const*, int64_t blocks,
                             float* out, int64_t ldo, bool add, bool ahead) {
  constexpr int G = R * P <= 4 ? 2 : 1;
  const __m512i table = code_words();
  Ahead next(panels, P, blocks * kInt4BlockBytes);
  const uint8_t* panel[P];
  for (int p = 0; p < P; p++) panel[p] = static_cast<const uint8_t*>(panels[p]);
  __m512 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? _mm512_loadu_ps(out + r * ldo + 16 * p) : _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; block++, x += kBlock) {
    if (ahead) next.ask<P, 9>();
#pragma GCC unroll 2
    for (int first = 0; first < 2; first += G) {
      __m512 part[G][R][P];
#pragma GCC unroll 2
      for (int g = 0; g < G; g++)
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
          for (int p = 0; p < P; p++) part[g][r][p] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) {
          const int group = first + g;
          __m512i lanes[P];
          for (int p = 0; p < P; p++) lanes[p] = _mm512_loadu_si512(panel[p] + 256 * group + 64 * c);
          const uint16_t* in = x + kGroup * group + 8 * c;
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            __m512bh w[P];
            for (int p = 0; p < P; p++) w[p] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi32(lanes[p], 4 * j), table));
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
              const __m512bh pair = pair_of(in + r * ldx + 2 * j);
              for (int p = 0; p < P; p++) part[g][r][p] = _mm512_dpbf16_ps(part[g][r][p], w[p], pair);
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < G; g++)
        for (int p = 0; p < P; p++) {
          const __m512 scale = (__m512)widen_bf16(reinterpret_cast<const uint16_t*>(panel[p] + 512 + 32 * (first + g)));
#pragma GCC unroll 6
          for (int r = 0; r < R; r++) sum[r][p] = _mm512_fmadd_ps(part[g][r][p], scale, sum[r][p]);
        }
    }
    for (int p = 0; p < P; p++) panel[p] += kInt4BlockBytes;
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(out + r * ldo + 16 * p, sum[r][p]);
}

template <int R, int P>
void multiply_bf16_bf16_rows(const uint16_t* x, int64_t ldx, const void* const* panels, const float* const* scales,
                             int64_t blocks, float* out, int64_t ldo, bool add, bool ahead) {
  Ahead next(panels, P, blocks * kBlock * kPanel * 2);
  const uint16_t* panel[P];
  for (int p = 0; p < P; p++) panel[p] = static_cast<const uint16_t*>(panels[p]);
  __m512 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? _mm512_loadu_ps(out + r * ldo + 16 * p) : _mm512_setzero_ps();
  for (int64_t group = 0; group < 2 * blocks; group++, x += kGroup) {
    __m512 part[R][P];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) part[r][p] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; i += 2) {
      if (ahead && i % 8 == 0) next.ask<P, 4>();
      __m512bh w[P];
      for (int p = 0; p < P; p++) {
        w[p] = as_bf16(_mm512_loadu_si512(panel[p] + 16 * i));
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m512bh pair = pair_of(x + r * ldx + i);
        for (int p = 0; p < P; p++) part[r][p] = _mm512_dpbf16_ps(part[r][p], w[p], pair);
      }
    }
    for (int p = 0; p < P; p++) {
      const __m512 scale = _mm512_set1_ps(scales ? scales[p][group / 4] : 1.0f);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) sum[r][p] = _mm512_fmadd_ps(part[r][p], scale, sum[r][p]);
    }
    for (int p = 0; p < P; p++) panel[p] += kGroup * kPanel;
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(out + r * ldo + 16 * p, sum[r][p]);
}

K2_BY_ROWS(multiply_int4_bf16, 6, 6, uint16_t)
K2_BY_ROWS(multiply_bf16_bf16, 6, 6, uint16_t)

inline __m512i interleaving() {  // words of the low half and of the high half, in turn
  alignas(64) uint16_t words[32];
  for (int i = 0; i < 16; i++) words[2 * i] = static_cast<uint16_t>(i), words[2 * i + 1] = static_cast<uint16_t>(16 + i);
  return _mm512_load_si512(words);
}

void tile_int4_bf16(const uint8_t* panel, int64_t blocks, void* tile) {
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i order = interleaving();
  uint16_t* out = static_cast<uint16_t*>(tile);
  for (int64_t block = 0; block < blocks; block++, panel += kInt4BlockBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(panel) + 2 * kInt4BlockBytes, _MM_HINT_T0);
    for (int group = 0; group < 2; group++) {
      const __m512 scale = (__m512)widen_bf16(reinterpret_cast<const uint16_t*>(panel + 512 + 32 * group));
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const __m512i lanes = _mm512_loadu_si512(panel + 256 * group + 64 * c);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++, out += 32) {  // as the checkpoint means it: the product rounded to bf16
          const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4 * j), table), scale);
          const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 16 + 4 * j), table), scale);
          const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
          _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
        }
      }
    }
  }
}

void tile_fp8_bf16(const uint8_t* panel, int64_t blocks, const float* scales, void* tile) {
  uint16_t* out = static_cast<uint16_t*>(tile);
  decode_fp8_avx512(panel, blocks, out);
  for (int64_t i = 0; i < kPanel * kBlock * blocks; i += 16) {  // as the checkpoint means it: the product rounded to bf16
    const f32x16 product = widen_bf16(out + i) * scales[i / (kPanel * 128)];
    store_vector(out + i, __builtin_convertvector(round_bf16(product), u16x16));
  }
}

void tile_bf16_bf16(const uint16_t* panel, int64_t blocks, void* tile) { memcpy(tile, panel, 2 * kPanel * kBlock * blocks); }

template <int R, int P>
void gemm_bf16_rows(const uint16_t* a, int64_t lda, const uint16_t* tiles, int64_t stride, int64_t k, float* c, int64_t ldc,
                    bool add) {
  __m512 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? _mm512_loadu_ps(c + r * ldc + 16 * p) : _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += 2) {
    __m512bh w[P];
    for (int p = 0; p < P; p++) w[p] = as_bf16(_mm512_loadu_si512(tiles + p * stride + 16 * i));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const __m512bh in = pair_of(a + r * lda + i);
      for (int p = 0; p < P; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], w[p], in);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(c + r * ldc + 16 * p, sum[r][p]);
}

template <int P>
void gemm_bf16_panels(int64_t rows, const uint16_t* a, int64_t lda, const uint16_t* tiles, int64_t stride, int64_t k,
                      float* c, int64_t ldc, bool add) {
  for (int64_t steps = (rows + 11) / 12; steps > 0; steps--) {  // as evenly as they come: 13 rows are 7 and 6
    const int64_t here = (rows + steps - 1) / steps;
    switch (here) {
#define K2_CASE(R) \
  case R: gemm_bf16_rows<R, P>(a, lda, tiles, stride, k, c, ldc, add); break;
      K2_CASE(1) K2_CASE(2) K2_CASE(3) K2_CASE(4) K2_CASE(5) K2_CASE(6)
      K2_CASE(7) K2_CASE(8) K2_CASE(9) K2_CASE(10) K2_CASE(11) K2_CASE(12)
#undef K2_CASE
    }
    rows -= here, a += here * lda, c += here * ldc;
  }
}

void gemm_bf16(int64_t rows, const void* a, int64_t lda, const void* tiles, int64_t stride, int panels, int64_t k, float* c,
               int64_t ldc, bool add) {
  const uint16_t *in = static_cast<const uint16_t*>(a), *w = static_cast<const uint16_t*>(tiles);
  if (panels == 2) return gemm_bf16_panels<2>(rows, in, lda, w, stride, k, c, ldc, add);
  gemm_bf16_panels<1>(rows, in, lda, w, stride, k, c, ldc, add);
}

void dots_bf16(const uint16_t* const* rows, int64_t width, const void* query, float* out) {
  const uint16_t* q = static_cast<const uint16_t*>(query);
  __m512 sum[16];
  for (int r = 0; r < 16; r++) sum[r] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    const __m512bh part = as_bf16(_mm512_loadu_si512(q + i));
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) sum[r] = _mm512_dpbf16_ps(sum[r], as_bf16(_mm512_loadu_si512(rows[r] + i)), part);
  }
  if (i < width) {
    const __mmask32 there = (1u << (width - i)) - 1;
    const __m512bh part = as_bf16(_mm512_loadu_si512(q + i));
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
      sum[r] = _mm512_dpbf16_ps(sum[r], as_bf16(_mm512_maskz_loadu_epi16(there, rows[r] + i)), part);
  }
  _mm512_storeu_ps(out, sums_of(sum));
}

void turn_bf16(const float* p, int64_t tokens, int64_t heads, void* out, int64_t ldo) {
  uint16_t* y = static_cast<uint16_t*>(out);
  const __m512i places = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(static_cast<int>(2 * ldo)));
  for (int64_t h = 0; h < heads; h += 16)
    for (int64_t t = 0; t < ldo; t += 2) {
      const f32x16 first = t < tokens ? load_vector<f32x16>(p + t * heads + h) : f32x16{};
      const f32x16 second = t + 1 < tokens ? load_vector<f32x16>(p + (t + 1) * heads + h) : f32x16{};
      const u32x16 both = round_bf16(first) | (round_bf16(second) << 16);
      _mm512_i32scatter_epi32(y + h * ldo + t, places, (__m512i)both, 1);
    }
}

void tile_values_bf16(const uint16_t* const* rows, int64_t tokens, int64_t padded, int64_t width, void* tiles) {
  uint16_t* out = static_cast<uint16_t*>(tiles);
  alignas(64) uint16_t low[32], high[32];
  for (int i = 0; i < 16; i++) {
    low[2 * i] = static_cast<uint16_t>(i), low[2 * i + 1] = static_cast<uint16_t>(32 + i);
    high[2 * i] = static_cast<uint16_t>(16 + i), high[2 * i + 1] = static_cast<uint16_t>(48 + i);
  }
  const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
  for (int64_t t = 0; t < padded; t += 2)
    for (int64_t v = 0; v < width; v += 32) {  // the last vector may be half: width is a multiple of 16
      const __mmask32 there = width - v >= 32 ? 0xFFFFFFFFu : 0xFFFFu;
      const __m512i even = t < tokens ? _mm512_maskz_loadu_epi16(there, rows[t] + v) : _mm512_setzero_si512();
      const __m512i odd = t + 1 < tokens ? _mm512_maskz_loadu_epi16(there, rows[t + 1] + v) : _mm512_setzero_si512();
      uint16_t* place = out + (v / 16) * padded * 16 + t * 16;
      _mm512_storeu_si512(place, _mm512_permutex2var_epi16(even, first, odd));
      if (width - v >= 32) _mm512_storeu_si512(place + padded * 16, _mm512_permutex2var_epi16(even, second, odd));
    }
}

Kernels bf16_kernels(const char* name) {
  Kernels kernels = portable_kernels(name);
  kernels.activation_bytes = 2;
  kernels.rows_at_once = 6;
  kernels.load = load_bf16;
  kernels.multiply_int4 = multiply_int4_bf16;
  kernels.multiply_bf16 = multiply_bf16_bf16;
  kernels.decode_fp8 = decode_fp8_avx512;
  kernels.tile_bf16 = tile_bf16_bf16;
  kernels.gemm = gemm_bf16;
  kernels.silu_mul = silu_mul_bf16;
  kernels.dots = dots_bf16;
  kernels.turn = turn_bf16;
  kernels.tile_values = tile_values_bf16;
  return kernels;
}

}  // namespace
}  // namespace k2
