// The whole table in vectors of 16 floats, which the compiler maps to whatever the object file is compiled for: two AVX2
// registers, one of AVX-512, four of SSE or NEON. float32 activations. Wider sets replace what they do better.
//
// Included once per object file, everything static: with inline functions of the standard library, the linker would keep
// one copy for all files, perhaps one that was compiled with instructions that the machine lacks. Hence no std:: here.
#pragma once
#include <cstdint>
#include <cstring>

#include "../formats/bf16.hpp"
#include "../formats/fp8_block.hpp"
#include "kernels.hpp"

namespace k2 {
namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

inline f32x16 splat(float v) { return f32x16{} + v; }

template <class V, class T>
inline V load_vector(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store_vector(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

inline f32x16 widen_bf16(const uint16_t* p) {
  return (f32x16)(__builtin_convertvector(load_vector<u16x16>(p), u32x16) << 16);
}

inline u32x16 round_bf16(f32x16 v) {  // to nearest even, in the low 16 bits; infinities stay, NaN stays NaN
  u32x16 bits = (u32x16)v;
  u32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  i32x16 is_nan = (i32x16)((bits & 0x7FFFFFFF) > 0x7F800000);
  return (u32x16)(((i32x16)rounded & ~is_nan) | ((i32x16)((bits >> 16) | 0x40) & is_nan));
}

// e^x within 2 ulp for x in [-87, 88], 0 below, by range reduction and a polynomial (Cephes expf).
inline f32x16 exp_vector(f32x16 x) {
  f32x16 low = splat(-87.0f), high = splat(88.0f);
  i32x16 under = (i32x16)(x < low);
  x = (f32x16)(((i32x16)x & ~(i32x16)(x > high)) | ((i32x16)high & (i32x16)(x > high)));
  x = (f32x16)(((i32x16)x & ~under) | ((i32x16)low & under));
  f32x16 magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  f32x16 n = (x * 1.44269504f + magic) - magic;
  f32x16 r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i32x16 exponent = __builtin_convertvector(n, i32x16);
  f32x16 scale = (f32x16)((u32x16)(exponent + 127) << 23);
  return (f32x16)((i32x16)(p * scale) & ~under);
}

// ------------------------------------------------------------------------------------------------ activations

void load_f32(const uint16_t* x, int64_t n, void* out) {
  float* y = static_cast<float*>(out);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_vector(y + i, widen_bf16(x + i));
  for (; i < n; i++) y[i] = bf16_to_float(x[i]);
}

void store_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store_vector(out + i, __builtin_convertvector(round_bf16(load_vector<f32x16>(x + i)), u16x16));
  for (; i < n; i++) out[i] = bf16_from_float(x[i]);
}

inline f32x16 silu_mul_vector(f32x16 gate, f32x16 up) { return gate / (1.0f + exp_vector(-gate)) * up; }

void silu_mul_f32(const float* gate, const float* up, int64_t n, void* out) {  // n a multiple of 16
  for (int64_t i = 0; i < n; i += 16)
    store_vector(static_cast<float*>(out) + i, silu_mul_vector(load_vector<f32x16>(gate + i), load_vector<f32x16>(up + i)));
}

void axpy(const float* x, float weight, int64_t n, float* y, bool add) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    f32x16 v = load_vector<f32x16>(x + i) * weight;
    store_vector(y + i, add ? load_vector<f32x16>(y + i) + v : v);
  }
  for (; i < n; i++) y[i] = add ? y[i] + x[i] * weight : x[i] * weight;
}

// ------------------------------------------------------------------------------------------------ int4

inline f32x16 code_values(u32x16 lanes, int shift) {
  return __builtin_convertvector((i32x16)((lanes >> shift) & 15), f32x16) - 8.0f;
}

template <int R>
void gemv_int4_rows(const float* x, int64_t ldx, const uint8_t* panel, int64_t blocks, float* out, int64_t ldo) {
  f32x16 sum[R] = {};
  for (int64_t block = 0; block < blocks; block++, panel += kInt4BlockBytes, x += kBlock) {
    for (int group = 0; group < 2; group++) {
      f32x16 part[R][2] = {};
      for (int c = 0; c < 4; c++) {
        u32x16 lanes = load_vector<u32x16>(panel + 256 * group + 64 * c);
        const float* in = x + kGroup * group + 8 * c;
        for (int j = 0; j < 8; j++) {
          f32x16 w = code_values(lanes, 16 * (j & 1) + 4 * (j >> 1));
          for (int r = 0; r < R; r++) part[r][j & 1] += w * in[r * ldx + j];
        }
      }
      f32x16 scale = widen_bf16(reinterpret_cast<const uint16_t*>(panel + 512 + 32 * group));
      for (int r = 0; r < R; r++) sum[r] += (part[r][0] + part[r][1]) * scale;
    }
  }
  for (int r = 0; r < R; r++) store_vector(out + r * ldo, sum[r]);
}

template <int R>
void gemv_bf16_rows(const float* x, int64_t ldx, const uint16_t* panel, int64_t blocks, float* out, int64_t ldo) {
  f32x16 sum[R][2] = {};
  for (int64_t pair = 0; pair < blocks * kBlock / 2; pair++, panel += 32) {
    u32x16 lanes = load_vector<u32x16>(panel);
    f32x16 even = (f32x16)(lanes << 16), odd = (f32x16)(lanes & 0xFFFF0000u);
    for (int r = 0; r < R; r++) {
      sum[r][0] += even * x[r * ldx + 2 * pair];
      sum[r][1] += odd * x[r * ldx + 2 * pair + 1];
    }
  }
  for (int r = 0; r < R; r++) store_vector(out + r * ldo, sum[r][0] + sum[r][1]);
}

// `most` rows at a time, as evenly as they come: 9 rows in steps of at most 8 are 5 and 4.
#define K2_BY_ROWS(function, most, type, weights)                                                                       \
  void function(int64_t rows, const void* x, int64_t ldx, const weights* panel, int64_t blocks, float* out,            \
                int64_t ldo) {                                                                                          \
    const type* in = static_cast<const type*>(x);                                                                       \
    for (int64_t steps = (rows + most - 1) / most; steps > 0; steps--) {                                                \
      const int64_t here = (rows + steps - 1) / steps;                                                                  \
      switch (here) {                                                                                                   \
        case 1: function##_rows<1>(in, ldx, panel, blocks, out, ldo); break;                                            \
        case 2: function##_rows<2>(in, ldx, panel, blocks, out, ldo); break;                                            \
        case 3: function##_rows<3>(in, ldx, panel, blocks, out, ldo); break;                                            \
        case 4: function##_rows<4>(in, ldx, panel, blocks, out, ldo); break;                                            \
        case 5: function##_rows<most < 5 ? 1 : 5>(in, ldx, panel, blocks, out, ldo); break;                             \
        case 6: function##_rows<most < 6 ? 1 : 6>(in, ldx, panel, blocks, out, ldo); break;                             \
        case 7: function##_rows<most < 7 ? 1 : 7>(in, ldx, panel, blocks, out, ldo); break;                             \
        case 8: function##_rows<most < 8 ? 1 : 8>(in, ldx, panel, blocks, out, ldo); break;                             \
      }                                                                                                                 \
      rows -= here, in += here * ldx, out += here * ldo;                                                                \
    }                                                                                                                   \
  }

K2_BY_ROWS(gemv_int4, 4, float, uint8_t)
K2_BY_ROWS(gemv_bf16, 4, float, uint16_t)

// ------------------------------------------------------------------------------------------------ tiles, float32

void tile_int4_f32(const uint8_t* panel, int64_t blocks, void* tile) {
  float* out = static_cast<float*>(tile);
  for (int64_t block = 0; block < blocks; block++, panel += kInt4BlockBytes)
    for (int group = 0; group < 2; group++) {
      f32x16 scale = widen_bf16(reinterpret_cast<const uint16_t*>(panel + 512 + 32 * group));
      for (int c = 0; c < 4; c++) {
        u32x16 lanes = load_vector<u32x16>(panel + 256 * group + 64 * c);
        for (int j = 0; j < 8; j++, out += 16) {
          // as the checkpoint means it: the product rounded to bf16
          f32x16 w = code_values(lanes, 16 * (j & 1) + 4 * (j >> 1)) * scale;
          store_vector(out, (f32x16)(round_bf16(w) << 16));
        }
      }
    }
}

void tile_bf16_f32(const uint16_t* panel, int64_t blocks, void* tile) {
  float* out = static_cast<float*>(tile);
  for (int64_t pair = 0; pair < blocks * kBlock / 2; pair++, panel += 32, out += 32) {
    u32x16 lanes = load_vector<u32x16>(panel);
    store_vector(out, (f32x16)(lanes << 16));
    store_vector(out + 16, (f32x16)(lanes & 0xFFFF0000u));
  }
}

inline float fp8_value(uint8_t code, float scale) {  // rounded to bf16, as the checkpoint's decoder does
  return bf16_to_float(bf16_from_float(fp8_e4m3_to_float(code) * scale));
}

void tile_fp8_f32(const uint8_t* panel, int64_t blocks, const float* scales, void* tile) {
  float* out = static_cast<float*>(tile);
  for (int64_t pair = 0; pair < blocks * kBlock / 2; pair++, panel += 32, out += 32)
    for (int lane = 0; lane < 16; lane++)
      for (int odd = 0; odd < 2; odd++) out[16 * odd + lane] = fp8_value(panel[2 * lane + odd], scales[pair / 64]);
}

#ifndef K2_TILE_ROWS
#define K2_TILE_ROWS 4
#endif

template <int R, int P>
void gemm_f32_rows(const float* a, int64_t lda, const float* tiles, int64_t stride, int64_t k, float* c, int64_t ldc,
                   bool add) {
  f32x16 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? load_vector<f32x16>(c + r * ldc + 16 * p) : f32x16{};
  for (int64_t i = 0; i < k; i++)
    for (int p = 0; p < P; p++) {
      f32x16 w = load_vector<f32x16>(tiles + p * stride + 16 * i);
      for (int r = 0; r < R; r++) sum[r][p] += w * a[r * lda + i];
    }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) store_vector(c + r * ldc + 16 * p, sum[r][p]);
}

template <int P>
void gemm_f32_panels(int64_t rows, const float* a, int64_t lda, const float* tiles, int64_t stride, int64_t k, float* c,
                     int64_t ldc, bool add) {
  for (int64_t steps = (rows + K2_TILE_ROWS - 1) / K2_TILE_ROWS; steps > 0; steps--) {
    const int64_t here = (rows + steps - 1) / steps;
    switch (here) {
#define K2_CASE(R) \
  case R: gemm_f32_rows<R, P>(a, lda, tiles, stride, k, c, ldc, add); break;
      K2_CASE(1) K2_CASE(2) K2_CASE(3) K2_CASE(4)
#if K2_TILE_ROWS > 4
      K2_CASE(5) K2_CASE(6)
#endif
#if K2_TILE_ROWS > 6
      K2_CASE(7) K2_CASE(8) K2_CASE(9) K2_CASE(10) K2_CASE(11) K2_CASE(12)
#endif
#undef K2_CASE
    }
    rows -= here, a += here * lda, c += here * ldc;
  }
}

void gemm_f32(int64_t rows, const void* a, int64_t lda, const void* tiles, int64_t stride, int panels, int64_t k, float* c,
              int64_t ldc, bool add) {
  const float *in = static_cast<const float*>(a), *w = static_cast<const float*>(tiles);
  if (panels == 1) return gemm_f32_panels<1>(rows, in, lda, w, stride, k, c, ldc, add);
#ifdef __AVX512F__
  gemm_f32_panels<2>(rows, in, lda, w, stride, k, c, ldc, add);
#else  // two panels would need more registers than there are
  for (int p = 0; p < 2; p++) gemm_f32_panels<1>(rows, in, lda, w + p * stride, stride, k, c + 16 * p, ldc, add);
#endif
}

// ------------------------------------------------------------------------------------------------ attention

void softmax(float* scores, int64_t tokens, int64_t heads, float scale, float* running_max, float* running_sum,
             float* rescale) {  // heads a multiple of 16
  for (int64_t h = 0; h < heads; h += 16) {
    f32x16 before = load_vector<f32x16>(running_max + h), most = before;
    for (int64_t t = 0; t < tokens; t++) {
      f32x16 s = load_vector<f32x16>(scores + t * heads + h) * scale;
      i32x16 larger = (i32x16)(s > most);
      most = (f32x16)(((i32x16)s & larger) | ((i32x16)most & ~larger));
    }
    f32x16 sum = {};
    for (int64_t t = 0; t < tokens; t++) {
      f32x16 p = exp_vector(load_vector<f32x16>(scores + t * heads + h) * scale - most);
      store_vector(scores + t * heads + h, p);
      sum += p;
    }
    f32x16 fade = exp_vector(before - most);  // -inf before the first piece: 0
    store_vector(rescale + h, fade);
    store_vector(running_sum + h, load_vector<f32x16>(running_sum + h) * fade + sum);
    store_vector(running_max + h, most);
  }
}

void turn_f32(const float* p, int64_t tokens, int64_t heads, void* out, int64_t ldo) {
  float* y = static_cast<float*>(out);
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t t = 0; t < tokens; t++) y[h * ldo + t] = p[t * heads + h];
    for (int64_t t = tokens; t < ldo; t++) y[h * ldo + t] = 0;
  }
}

void tile_values_f32(const uint16_t* const* rows, int64_t tokens, int64_t padded, int64_t width, void* tiles) {
  float* out = static_cast<float*>(tiles);
  for (int64_t v = 0; v < width; v += 16)
    for (int64_t t = 0; t < padded; t++, out += 16) store_vector(out, t < tokens ? widen_bf16(rows[t] + v) : f32x16{});
}

void scale_rows(float* x, int64_t rows, int64_t width, int64_t ld, const float* by) {
  for (int64_t r = 0; r < rows; r++)
    if (by[r] != 1.0f)
      for (int64_t i = 0; i < width; i += 16)
        store_vector(x + r * ld + i, load_vector<f32x16>(x + r * ld + i) * by[r]);
}

// ------------------------------------------------------------------------------------------------ the rest

inline float sum_lanes(f32x16 v) {
  float total = 0;
  for (int i = 0; i < 16; i++) total += v[i];
  return total;
}

void rms_norm(const uint16_t* x, const uint16_t* weight, int64_t n, float eps, uint16_t* y) {
  f32x16 squares = {};
  float tail = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    f32x16 v = widen_bf16(x + i);
    squares += v * v;
  }
  for (; i < n; i++) tail += bf16_to_float(x[i]) * bf16_to_float(x[i]);
  float by = 1.0f / __builtin_sqrtf((sum_lanes(squares) + tail) / n + eps);
  for (i = 0; i + 16 <= n; i += 16) {  // x / rms is rounded to bf16 before the weight, as the reference does
    f32x16 unit = (f32x16)(round_bf16(widen_bf16(x + i) * by) << 16);
    store_vector(y + i, __builtin_convertvector(round_bf16(unit * widen_bf16(weight + i)), u16x16));
  }
  for (; i < n; i++)
    y[i] = bf16_from_float(bf16_to_float(bf16_from_float(bf16_to_float(x[i]) * by)) * bf16_to_float(weight[i]));
}

uint64_t read_words(const uint64_t* words, int64_t n) {
  typedef uint64_t u64x8 __attribute__((vector_size(64)));
  u64x8 sum[8] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 8; j++) sum[j] += load_vector<u64x8>(words + i + 8 * j);
  u64x8 all = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  uint64_t total = 0;
  for (int j = 0; j < 8; j++) total += all[j];
  for (; i < n; i++) total += words[i];
  return total;
}

constexpr Kernels portable_kernels(const char* name) {
  return Kernels{name,        4,         8,            load_f32,   gemv_int4, gemv_bf16,      tile_int4_f32,
                 tile_bf16_f32, tile_fp8_f32, gemm_f32, silu_mul_f32, axpy,   store_bf16,     softmax,
                 turn_f32,    tile_values_f32, scale_rows, rms_norm, read_words};
}

}  // namespace
}  // namespace k2
