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
template <int R, int P, int J>
inline void add_products(const __m256i (&lanes)[P][2], const float* x, int64_t ldx, __m256 (&part)[R][P][2][2]) {
  __m256 even[P][2], odd[P][2];
  for (int p = 0; p < P; p++)
    for (int h = 0; h < 2; h++) {
      const __m256i moved = J ? _mm256_srli_epi32(lanes[p][h], 4 * J) : lanes[p][h];
      const __m256i both = _mm256_or_si256(_mm256_and_si256(moved, _mm256_set1_epi32(0x000F000F)), _mm256_set1_epi32(0x43004300));
      even[p][h] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      odd[p][h] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }
  for (int r = 0; r < R; r++) {
    const __m256 first = _mm256_broadcast_ss(x + r * ldx + 2 * J), second = _mm256_broadcast_ss(x + r * ldx + 2 * J + 1);
    for (int p = 0; p < P; p++)
      for (int h = 0; h < 2; h++) {
        part[r][p][h][0] = _mm256_fmadd_ps(even[p][h], first, part[r][p][h][0]);
        part[r][p][h][1] = _mm256_fmadd_ps(odd[p][h], second, part[r][p][h][1]);
      }
  }
}

// The weight is code − 8: a group is worth Σ (128 + code)·x − 136·Σ x.
template <int R, int P>
void multiply_int4_avx2_rows(const float* x, int64_t ldx, const void* const* panels, const float* const*, int64_t blocks,
                             float* out, int64_t ldo, bool add, bool ahead) {
  if (!add)
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2 * P; i++) _mm256_storeu_ps(out + r * ldo + 8 * i, _mm256_setzero_ps());
  const uint8_t* panel[P];
  for (int p = 0; p < P; p++) panel[p] = static_cast<const uint8_t*>(panels[p]);
  for (int64_t block = 0; block < blocks; block++, x += kBlock) {
    if (ahead)
      for (int p = 0; p < P; p++)
        for (int line = 0; line < 9; line++) _mm_prefetch(reinterpret_cast<const char*>(panel[p] + 4096 + 64 * line), _MM_HINT_T0);
    for (int group = 0; group < 2; group++) {
      __m256 part[R][P][2][2];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
          for (int h = 0; h < 2; h++) part[r][p][h][0] = part[r][p][h][1] = _mm256_setzero_ps();
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        __m256i lanes[P][2];
        for (int p = 0; p < P; p++) {
          const __m256i* from = reinterpret_cast<const __m256i*>(panel[p] + 256 * group + 64 * c);
          lanes[p][0] = _mm256_loadu_si256(from), lanes[p][1] = _mm256_loadu_si256(from + 1);
        }
        const float* in = x + kGroup * group + 8 * c;
        add_products<R, P, 0>(lanes, in, ldx, part);
        add_products<R, P, 1>(lanes, in, ldx, part);
        add_products<R, P, 2>(lanes, in, ldx, part);
        add_products<R, P, 3>(lanes, in, ldx, part);
      }
      for (int r = 0; r < R; r++) {
        const __m256 offset = _mm256_set1_ps(-136.0f * sum_of_group(x + kGroup * group + r * ldx));
        for (int p = 0; p < P; p++)
          for (int h = 0; h < 2; h++) {
            float* place = out + r * ldo + 16 * p + 8 * h;
            const __m256 scale = scales_of(panel[p] + 512 + 32 * group + 16 * h);
            _mm256_storeu_ps(place, _mm256_fmadd_ps(_mm256_add_ps(_mm256_add_ps(part[r][p][h][0], part[r][p][h][1]), offset), scale, _mm256_loadu_ps(place)));
          }
      }
    }
    for (int p = 0; p < P; p++) panel[p] += kInt4BlockBytes;
  }
}

// As the portable one, the subnormals looked up in tables of bytes.
void decode_fp8_avx2(const uint8_t* panel, int64_t blocks, uint16_t* out) {
  const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, -128, -64, 0, 32, 64, 96, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 59, 59, 59, 60, 60, 60, 60, 0, 0, 0, 0, 0, 0, 0, 0));
  for (int64_t i = 0; i < kPanel * kBlock * blocks; i += 16) {
    if (i % 64 == 0) _mm_prefetch(reinterpret_cast<const char*>(panel + i) + Ahead::kBytes, _MM_HINT_T0);
    const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + i)));
    const __m256i rest = _mm256_and_si256(code, _mm256_set1_epi16(0x7F));
    const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(rest, 4), _mm256_set1_epi16(0x3C00));
    const __m256i small = _mm256_or_si256(_mm256_shuffle_epi8(low_bytes, rest), _mm256_slli_epi16(_mm256_shuffle_epi8(high_bytes, rest), 8));
    const __m256i value = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi16(_mm256_set1_epi16(8), rest));
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7F)), _mm256_set1_epi16(0x7FC0));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_or_si256(_mm256_or_si256(value, nan), sign));
  }
}

template <int R, int P>
void multiply_bf16_avx2_rows(const float* x, int64_t ldx, const void* const* panels, const float* const* scales,
                             int64_t blocks, float* out, int64_t ldo, bool add, bool ahead) {
  if (!add)
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2 * P; i++) _mm256_storeu_ps(out + r * ldo + 8 * i, _mm256_setzero_ps());
  const uint16_t* panel[P];
  for (int p = 0; p < P; p++) panel[p] = static_cast<const uint16_t*>(panels[p]);
  for (int64_t group = 0; group < 2 * blocks; group++, x += kGroup) {
    __m256 part[R][P][2];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) part[r][p][0] = part[r][p][1] = _mm256_setzero_ps();
    for (int i = 0; i < kGroup; i += 2) {
      __m256 even[P][2], odd[P][2];
      for (int p = 0; p < P; p++)
        for (int h = 0; h < 2; h++) {
          if (ahead && !h) _mm_prefetch(reinterpret_cast<const char*>(panel[p] + 16 * i) + 4096, _MM_HINT_T0);
          const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel[p] + 16 * i) + h);
          even[p][h] = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16));
          odd[p][h] = _mm256_castsi256_ps(_mm256_and_si256(lanes, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
        }
      for (int r = 0; r < R; r++) {
        const __m256 first = _mm256_broadcast_ss(x + r * ldx + i), second = _mm256_broadcast_ss(x + r * ldx + i + 1);
        for (int p = 0; p < P; p++)
          for (int h = 0; h < 2; h++) {
            part[r][p][h] = _mm256_fmadd_ps(even[p][h], first, part[r][p][h]);
            part[r][p][h] = _mm256_fmadd_ps(odd[p][h], second, part[r][p][h]);
          }
      }
    }
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++)
        for (int h = 0; h < 2; h++) {
          float* place = out + r * ldo + 16 * p + 8 * h;
          const __m256 scale = _mm256_set1_ps(scales ? scales[p][group / 4] : 1.0f);
          _mm256_storeu_ps(place, _mm256_fmadd_ps(part[r][p][h], scale, _mm256_loadu_ps(place)));
        }
    for (int p = 0; p < P; p++) panel[p] += kGroup * kPanel;
  }
}

K2_BY_ROWS(multiply_int4_avx2, 3, 0, float)
K2_BY_ROWS(multiply_bf16_avx2, 4, 2, float)

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
  kernels.multiply_int4 = multiply_int4_avx2;
  kernels.multiply_bf16 = multiply_bf16_avx2;
  kernels.decode_fp8 = decode_fp8_avx2;
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
