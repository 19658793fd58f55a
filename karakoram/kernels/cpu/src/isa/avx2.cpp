// AVX2 with FMA: 16 outputs are two registers of 8 floats. Compilers spill the portable vectors of 16 here, so the products and
// the decoding of tiles are written out.
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define K2_TILE_ROWS 6
#include "portable.hpp"

namespace k2 {
namespace {

inline __m256 scales_of(const uint8_t* bf16) {  // eight of them
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

inline float sum_of_group(const float* x) {
  __m256 sum = _mm256_add_ps(_mm256_add_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)),
                             _mm256_add_ps(_mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24)));
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// Two codes of a lane become two bf16 numbers 128 + code by one mask and one or: bf16 counts in ones from 128 to 255. Each is a
// float32 after a shift or a mask. So two weights take five operations and no conversion.
template <int R, int J>
inline void add_products(__m256i low, __m256i high, const float* x, int64_t ldx, __m256 (&even)[R][2], __m256 (&odd)[R][2]) {
  const __m256i lanes[2] = {low, high};
  for (int h = 0; h < 2; h++) {
    const __m256i moved = J ? _mm256_srli_epi32(lanes[h], 4 * J) : lanes[h];
    const __m256i both = _mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi32(0x000F000F)), _mm256_set1_epi32(0x43004300));
    const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    const __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
    for (int r = 0; r < R; r++) {
      even[r][h] = _mm256_fmadd_ps(w0, _mm256_broadcast_ss(x + r * ldx + 2 * J), even[r][h]);
      odd[r][h] = _mm256_fmadd_ps(w1, _mm256_broadcast_ss(x + r * ldx + 2 * J + 1), odd[r][h]);
    }
  }
}

// The weight is code − 8: a group is worth Σ (128 + code)·x − 136·Σ x.
template <int R>
void gemv_int4_avx2_rows(const float* x, int64_t ldx, const uint8_t* panel, int64_t blocks, float* out, int64_t ldo) {
  constexpr int kSets = R == 1 ? 2 : 1;  // a fused multiply-add takes four cycles: eight sums must be under way
  __m256 sum[R][2];
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
  for (int64_t block = 0; block < blocks; block++, panel += kInt4BlockBytes, x += kBlock) {
    for (int line = 0; line < 9; line++) _mm_prefetch(reinterpret_cast<const char*>(panel + 4096 + 64 * line), _MM_HINT_T0);
    for (int group = 0; group < 2; group++) {
      __m256 even[kSets][R][2], odd[kSets][R][2];
      for (int s = 0; s < kSets; s++)
        for (int r = 0; r < R; r++)
          even[s][r][0] = even[s][r][1] = odd[s][r][0] = odd[s][r][1] = _mm256_setzero_ps();
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const __m256i* lanes = reinterpret_cast<const __m256i*>(panel + 256 * group + 64 * c);
        const __m256i low = _mm256_loadu_si256(lanes), high = _mm256_loadu_si256(lanes + 1);
        const float* in = x + kGroup * group + 8 * c;
        add_products<R, 0>(low, high, in, ldx, even[c % kSets], odd[c % kSets]);
        add_products<R, 1>(low, high, in, ldx, even[c % kSets], odd[c % kSets]);
        add_products<R, 2>(low, high, in, ldx, even[c % kSets], odd[c % kSets]);
        add_products<R, 3>(low, high, in, ldx, even[c % kSets], odd[c % kSets]);
      }
      const uint8_t* scales = panel + 512 + 32 * group;
      const __m256 scale[2] = {scales_of(scales), scales_of(scales + 16)};
      for (int r = 0; r < R; r++) {
        const __m256 offset = _mm256_set1_ps(-136.0f * sum_of_group(x + kGroup * group + r * ldx));
        for (int h = 0; h < 2; h++) {
          __m256 whole = offset;
          for (int s = 0; s < kSets; s++) whole = _mm256_add_ps(_mm256_add_ps(even[s][r][h], odd[s][r][h]), whole);
          sum[r][h] = _mm256_fmadd_ps(whole, scale[h], sum[r][h]);
        }
      }
    }
  }
  for (int r = 0; r < R; r++) {
    _mm256_storeu_ps(out + r * ldo, sum[r][0]);
    _mm256_storeu_ps(out + r * ldo + 8, sum[r][1]);
  }
}

K2_BY_ROWS(gemv_int4_avx2, 2, float, uint8_t)

inline __m256 rounded_to_bf16(__m256 v) {  // to nearest even; finite numbers
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF)));
  return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

template <int kShift>
inline void store_weights(const __m256i (&lanes)[2], const __m256 (&scale)[2], float* out) {
  for (int h = 0; h < 2; h++) {
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(lanes[h], kShift), _mm256_set1_epi32(15));
    const __m256 q = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(8)));
    _mm256_storeu_ps(out + 8 * h, rounded_to_bf16(_mm256_mul_ps(q, scale[h])));
  }
}

void tile_int4_avx2(const uint8_t* panel, int64_t blocks, void* tile) {
  float* out = static_cast<float*>(tile);
  for (int64_t block = 0; block < blocks; block++, panel += kInt4BlockBytes)
    for (int group = 0; group < 2; group++) {
      const uint8_t* scales = panel + 512 + 32 * group;
      const __m256 scale[2] = {scales_of(scales), scales_of(scales + 16)};
      for (int c = 0; c < 4; c++, out += 128) {
        const __m256i* from = reinterpret_cast<const __m256i*>(panel + 256 * group + 64 * c);
        const __m256i lanes[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
        store_weights<0>(lanes, scale, out);
        store_weights<16>(lanes, scale, out + 16);
        store_weights<4>(lanes, scale, out + 32);
        store_weights<20>(lanes, scale, out + 48);
        store_weights<8>(lanes, scale, out + 64);
        store_weights<24>(lanes, scale, out + 80);
        store_weights<12>(lanes, scale, out + 96);
        store_weights<28>(lanes, scale, out + 112);
      }
    }
}

template <int R>
void gemm_avx2_rows(const float* a, int64_t lda, const float* tile, int64_t k, float* c, int64_t ldc, bool add) {
  __m256 sum[R][2];  // 6 rows: 12 registers of sums, 2 of weights, 1 of inputs
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) sum[r][h] = add ? _mm256_loadu_ps(c + r * ldc + 8 * h) : _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i++, tile += 16) {
    const __m256 w0 = _mm256_loadu_ps(tile), w1 = _mm256_loadu_ps(tile + 8);
    for (int r = 0; r < R; r++) {
      const __m256 in = _mm256_broadcast_ss(a + r * lda + i);
      sum[r][0] = _mm256_fmadd_ps(w0, in, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(w1, in, sum[r][1]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) _mm256_storeu_ps(c + r * ldc + 8 * h, sum[r][h]);
}

void gemm_avx2(int64_t rows, const void* input, int64_t lda, const void* tiles, int64_t stride, int panels, int64_t k,
               float* c, int64_t ldc, bool add) {
  for (int p = 0; p < panels; p++) {
    const float *a = static_cast<const float*>(input), *tile = static_cast<const float*>(tiles) + p * stride;
    float* out = c + 16 * p;
    int64_t left = rows;
    for (int64_t steps = (rows + 5) / 6; steps > 0; steps--) {
      const int64_t here = (left + steps - 1) / steps;
      switch (here) {
        case 1: gemm_avx2_rows<1>(a, lda, tile, k, out, ldc, add); break;
        case 2: gemm_avx2_rows<2>(a, lda, tile, k, out, ldc, add); break;
        case 3: gemm_avx2_rows<3>(a, lda, tile, k, out, ldc, add); break;
        case 4: gemm_avx2_rows<4>(a, lda, tile, k, out, ldc, add); break;
        case 5: gemm_avx2_rows<5>(a, lda, tile, k, out, ldc, add); break;
        case 6: gemm_avx2_rows<6>(a, lda, tile, k, out, ldc, add); break;
      }
      left -= here, a += here * lda, out += here * ldc;
    }
  }
}

Kernels table() {
  Kernels kernels = portable_kernels("avx2");
  kernels.gemv_int4 = gemv_int4_avx2;
  kernels.tile_int4 = tile_int4_avx2;
  kernels.gemm = gemm_avx2;
  return kernels;
}

}  // namespace

extern "C" const Kernels* k2_kernels_avx2() {
  static const Kernels kTable = table();
  return &kTable;
}
}  // namespace k2
#else
#include "kernels.hpp"
namespace k2 {
extern "C" const Kernels* k2_kernels_avx2() { return nullptr; }
}  // namespace k2
#endif
