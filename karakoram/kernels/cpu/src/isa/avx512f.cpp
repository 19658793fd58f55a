// AVX-512 without bf16 (Skylake to Ice Lake): float32 activations, codes looked up in a table of 16 floats.
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define K2_TILE_ROWS 12  // 12 rows × 2 panels of sums, 2 of weights: 26 of 32 registers
#include <immintrin.h>

#include "portable.hpp"

namespace k2 {
namespace {

// vpermps looks only at the low four bits of an index: a shift alone selects the code.
inline __m512 code_table() {
  return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
}

template <int R>
void gemv_int4_lookup_rows(const float* x, int64_t ldx, const uint8_t* panel, int64_t blocks, float* out, int64_t ldo) {
  const __m512 table = code_table();
  __m512 sum[R];
  for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; block++, panel += kInt4BlockBytes, x += kBlock) {
    for (int group = 0; group < 2; group++) {
      __m512 part[R][4];
      for (int r = 0; r < R; r++)
        for (int c = 0; c < 4; c++) part[r][c] = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const __m512i lanes = _mm512_loadu_si512(panel + 256 * group + 64 * c);
        const float* in = x + kGroup * group + 8 * c;
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
          const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 16 * (j & 1) + 4 * (j >> 1)), table);
          for (int r = 0; r < R; r++) part[r][c] = _mm512_fmadd_ps(w, _mm512_set1_ps(in[r * ldx + j]), part[r][c]);
        }
      }
      const __m512 scale = (__m512)widen_bf16(reinterpret_cast<const uint16_t*>(panel + 512 + 32 * group));
      for (int r = 0; r < R; r++) {
        const __m512 whole = _mm512_add_ps(_mm512_add_ps(part[r][0], part[r][1]), _mm512_add_ps(part[r][2], part[r][3]));
        sum[r] = _mm512_fmadd_ps(whole, scale, sum[r]);
      }
    }
  }
  for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * ldo, sum[r]);
}

K2_BY_ROWS(gemv_int4_lookup, 4, float, uint8_t)

Kernels table() {
  Kernels kernels = portable_kernels("avx512f");
  kernels.gemv_int4 = gemv_int4_lookup;
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
