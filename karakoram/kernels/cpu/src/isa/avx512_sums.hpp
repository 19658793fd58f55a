// Sixteen sums across lanes at once, and what is made of them with float32 activations. Shared by the AVX-512 sets.
#pragma once
#include <immintrin.h>

#include "portable.hpp"

namespace k2 {
namespace {

inline __m512 sums_of(__m512 (&v)[16]) {  // lane i = all lanes of v[i]
  for (int i = 0; i < 8; i++)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int n = 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++)
      v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xDD));
  return v[0];
}

void dots_avx512(const uint16_t* const* rows, int64_t width, const void* query, float* out) {
  const float* q = static_cast<const float*>(query);
  __m512 sum[16];
  for (int r = 0; r < 16; r++) sum[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 there = width - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << (width - i)) - 1);
    const __m512 part = _mm512_loadu_ps(q + i);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, rows[r] + i));
      sum[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)), part, sum[r]);
    }
  }
  _mm512_storeu_ps(out, sums_of(sum));
}

}  // namespace
}  // namespace k2
