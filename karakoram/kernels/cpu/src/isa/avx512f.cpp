// AVX-512 without bf16 (Skylake to Ice Lake): float32 activations, codes looked up in a table of 16 floats.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define K2_TILE_ROWS 12  // 12 rows × 2 panels of sums, 2 of weights: 26 of 32 registers
#include <immintrin.h>

#include "avx512_fp8.hpp"
#include "avx512_sums.hpp"

namespace k2 {
namespace {

// vpermps looks only at the low four bits of an index: a shift alone selects the code.
inline __m512 code_table() {
  return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}

template <int R, int P>
void multiply_int4_lookup_rows(const float* x, int64_t ldx, const void* const* panels, const float* const*,
                               int64_t blocks, float* out, int64_t ldo, bool add, bool ahead) {
  constexpr int G = R * P <= 4 ? 2 : 1;
  const __m512 table = code_table();
  const uint8_t* panel[P];
  for (int p = 0; p < P; p++) panel[p] = static_cast<const uint8_t*>(panels[p]);
  __m512 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? _mm512_loadu_ps(out + r * ldo + 16 * p) : _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; block++, x += kBlock) {
    if (ahead)
      for (int p = 0; p < P; p++)
#pragma GCC unroll 9
        for (int line = 0; line < 9; line++) _mm_prefetch(reinterpret_cast<const char*>(panel[p] + 4096 + 64 * line), _MM_HINT_T0);
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
          const float* in = x + kGroup * group + 8 * c;
#pragma GCC unroll 8
          for (int j = 0; j < 8; j++) {
            __m512 w[P];
            for (int p = 0; p < P; p++) w[p] = _mm512_permutexvar_ps(_mm512_srli_epi32(lanes[p], 16 * (j & 1) + 4 * (j >> 1)), table);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++)
              for (int p = 0; p < P; p++) part[g][r][p] = _mm512_fmadd_ps(w[p], _mm512_set1_ps(in[r * ldx + j]), part[g][r][p]);
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
void multiply_bf16_widened_rows(const float* x, int64_t ldx, const void* const* panels, const float* const* scales,
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
      __m512 even[P], odd[P];
      for (int p = 0; p < P; p++) {
        const __m512i lanes = _mm512_loadu_si512(panel[p] + 16 * i);
        even[p] = _mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16));
        odd[p] = _mm512_castsi512_ps(_mm512_and_si512(lanes, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
          part[r][p] = _mm512_fmadd_ps(even[p], _mm512_set1_ps(x[r * ldx + i]), part[r][p]);
          part[r][p] = _mm512_fmadd_ps(odd[p], _mm512_set1_ps(x[r * ldx + i + 1]), part[r][p]);
        }
    }
    for (int p = 0; p < P; p++) {
      const __m512 scale = _mm512_set1_ps(scales ? scales[p][group / 4] : 1.0f);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) sum[r][p] = _mm512_fmadd_ps(part[r][p], scale, sum[r][p]);
      panel[p] += kGroup * kPanel;
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) _mm512_storeu_ps(out + r * ldo + 16 * p, sum[r][p]);
}

K2_BY_ROWS(multiply_int4_lookup, 6, 6, float)
K2_BY_ROWS(multiply_bf16_widened, 6, 6, float)

Kernels table() {
  Kernels kernels = portable_kernels("avx512f");
  kernels.rows_at_once = 6;
  kernels.multiply_int4 = multiply_int4_lookup;
  kernels.multiply_bf16 = multiply_bf16_widened;
  kernels.decode_fp8 = decode_fp8_avx512;
  kernels.dots = dots_avx512;
  return kernels;
}

}  // namespace

extern "C" const Kernels* k2_kernels_avx512f() {
  static const Kernels kTable = table();
  return &kTable;
}
}  // namespace k2
#else
#include "kernels.hpp"
namespace k2 {
extern "C" const Kernels* k2_kernels_avx512f() { return nullptr; }
}  // namespace k2
#endif
