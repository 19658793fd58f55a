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
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

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

// Memory that `count` panels of `size` bytes will be read from kAhead bytes later. Short panels end before that: behind two
// that lie side by side come the next two, behind one of them the other.
struct Ahead {
  static constexpr int64_t kBytes = 4096;  // read some 150 ns later
  const char* at[2];
  int64_t left, size, jump;

  Ahead(const void* const* panels, int count, int64_t bytes) : size(bytes) {
    const char *first = static_cast<const char*>(panels[0]), *second = static_cast<const char*>(panels[count - 1]);
    jump = count == 2 && second - first == bytes ? bytes : 0;
    const int64_t whole = kBytes / bytes * (bytes + jump), rest = kBytes % bytes;
    left = bytes - rest;
    at[0] = first + whole + rest, at[1] = second + whole + rest;
  }
  template <int P, int kLines>
  inline void ask() {
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 9
      for (int line = 0; line < kLines; line++) __builtin_prefetch(at[p] + 64 * line, 0, 3);
      at[p] += 64 * kLines;
    }
    if ((left -= 64 * kLines) <= 0) {
      at[0] += jump, at[1] += jump;
      left += size;
    }
  }
};

template <int R, int P>
void multiply_int4_rows(const float* x, int64_t ldx, const void* const* panels, const float* const*, int64_t blocks,
                        float* out, int64_t ldo, bool add, bool) {
  f32x16 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? load_vector<f32x16>(out + r * ldo + 16 * p) : f32x16{};
  for (int64_t block = 0; block < blocks; block++, x += kBlock)
    for (int group = 0; group < 2; group++)
      for (int p = 0; p < P; p++) {
        const uint8_t* panel = static_cast<const uint8_t*>(panels[p]) + block * kInt4BlockBytes;
        f32x16 part[R] = {};
        for (int c = 0; c < 4; c++) {
          u32x16 lanes = load_vector<u32x16>(panel + 256 * group + 64 * c);
          const float* in = x + kGroup * group + 8 * c;
          for (int j = 0; j < 8; j++) {
            f32x16 w = code_values(lanes, 16 * (j & 1) + 4 * (j >> 1));
            for (int r = 0; r < R; r++) part[r] += w * in[r * ldx + j];
          }
        }
        f32x16 scale = widen_bf16(reinterpret_cast<const uint16_t*>(panel + 512 + 32 * group));
        for (int r = 0; r < R; r++) sum[r][p] += part[r] * scale;
      }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) store_vector(out + r * ldo + 16 * p, sum[r][p]);
}

template <int R, int P>
void multiply_bf16_rows(const float* x, int64_t ldx, const void* const* panels, const float* const* scales, int64_t blocks,
                        float* out, int64_t ldo, bool add, bool) {
  f32x16 sum[R][P];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sum[r][p] = add ? load_vector<f32x16>(out + r * ldo + 16 * p) : f32x16{};
  for (int64_t group = 0; group < 2 * blocks; group++, x += kGroup)
    for (int p = 0; p < P; p++) {
      const uint16_t* panel = static_cast<const uint16_t*>(panels[p]) + group * kGroup * kPanel;
      f32x16 part[R] = {};
      for (int i = 0; i < kGroup; i += 2) {
        u32x16 lanes = load_vector<u32x16>(panel + 16 * i);
        f32x16 even = (f32x16)(lanes << 16), odd = (f32x16)(lanes & 0xFFFF0000u);
        for (int r = 0; r < R; r++) {
          part[r] += even * x[r * ldx + i];
          part[r] += odd * x[r * ldx + i + 1];
        }
      }
      const float scale = scales ? scales[p][group / 4] : 1.0f;
      for (int r = 0; r < R; r++) sum[r][p] += part[r] * scale;
    }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) store_vector(out + r * ldo + 16 * p, sum[r][p]);
}

// `most` rows at a time, as evenly as they come: 9 rows in steps of at most 8 are 5 and 4. Up to `paired` of them with both
// panels at once; but short panels one after another, for two of them are no stream for a prefetcher. Only the first step asks
// for memory ahead of its turn: the others find the panels in the cache.
#define K2_ROWS(function, most, paired, R)                                                                              \
  case R: {                                                                                                             \
    constexpr int kRows = R <= most ? R : 1;                                                                            \
    constexpr int kPanels = kRows <= paired ? 2 : 1;                                                                    \
    if (kPanels == 2 && count == 2 && !(kRows <= 4 && panels_are_short)) {                                              \
      function##_rows<kRows, kPanels>(in, ldx, panels, scales, blocks, out, ldo, add, ahead);                           \
      break;                                                                                                            \
    }                                                                                                                   \
    for (int p = 0; p < count; p++)                                                                                     \
      function##_rows<kRows, 1>(in, ldx, panels + p, scales ? scales + p : scales, blocks, out + 16 * p, ldo, add, ahead); \
    break;                                                                                                              \
  }
#define K2_BY_ROWS(function, most, paired, type)                                                                        \
  void function(int64_t rows, const void* x, int64_t ldx, const void* const* panels, const float* const* scales,        \
                int count, int64_t blocks, float* out, int64_t ldo, bool add) {                                         \
    const type* in = static_cast<const type*>(x);                                                                       \
    const bool panels_are_short = blocks < 8 && !add;                                                                   \
    bool ahead = true;                                                                                                  \
    for (int64_t steps = (rows + most - 1) / most; steps > 0; steps--) {                                                \
      const int64_t here = (rows + steps - 1) / steps;                                                                  \
      switch (here) {                                                                                                   \
        K2_ROWS(function, most, paired, 1) K2_ROWS(function, most, paired, 2) K2_ROWS(function, most, paired, 3)        \
        K2_ROWS(function, most, paired, 4) K2_ROWS(function, most, paired, 5) K2_ROWS(function, most, paired, 6)        \
      }                                                                                                                 \
      rows -= here, in += here * ldx, out += here * ldo, ahead = false;                                                 \
    }                                                                                                                   \
  }

K2_BY_ROWS(multiply_int4, 4, 0, float)
K2_BY_ROWS(multiply_bf16, 4, 0, float)

// e4m3 codes in 16 bits each -> bf16: the exponent's bias moves from 7 to 127; below 8 they are subnormal, n · 2^-9. Comparisons
// and shifts only, which every vector unit has for words.
void decode_fp8(const uint8_t* panel, int64_t blocks, uint16_t* out) {
  for (int64_t i = 0; i < kPanel * kBlock * blocks; i += 16) {
    const u16x16 code = __builtin_convertvector(load_vector<u8x16>(panel + i), u16x16), rest = code & 0x7F;
    const u16x16 is_small = (u16x16)(rest < 8), from_2 = (u16x16)(rest > 1), from_4 = (u16x16)(rest > 3);
    u16x16 small = (u16x16)(rest == 1) & 0x3B00;
    small = (from_2 & (((rest & 1) << 6) + 0x3B80)) | (~from_2 & small);
    small = (from_4 & (((rest & 3) << 5) + 0x3C00)) | (~from_4 & small);
    const u16x16 value = (is_small & small) | (~is_small & ((rest << 4) + 0x3C00)) | ((u16x16)(rest == 0x7F) & 0x7FC0);
    store_vector(out + i, (u16x16)(value | ((code & 0x80) << 8)));
  }
}

// ------------------------------------------------------------------------------------------------ tiles, float32

void tile_bf16_f32(const uint16_t* panel, int64_t blocks, void* tile) {
  float* out = static_cast<float*>(tile);
  for (int64_t pair = 0; pair < blocks * kBlock / 2; pair++, panel += 32, out += 32) {
    u32x16 lanes = load_vector<u32x16>(panel);
    store_vector(out, (f32x16)(lanes << 16));
    store_vector(out + 16, (f32x16)(lanes & 0xFFFF0000u));
  }
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

inline f32x8 widen_half(const uint16_t* p) {
  return (f32x8)(__builtin_convertvector(load_vector<u16x8>(p), u32x8) << 16);
}

void dots_f32(const uint16_t* const* rows, int64_t width, const void* query, float* out) {
  const float* q = static_cast<const float*>(query);
  for (int t = 0; t < 16; t += 4) {  // 4 rows × 2 sums: halves of a vector stay in registers on AVX2
    f32x8 sum[4][2] = {};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
      for (int r = 0; r < 4; r++) {
        sum[r][0] += widen_half(rows[t + r] + i) * load_vector<f32x8>(q + i);
        sum[r][1] += widen_half(rows[t + r] + i + 8) * load_vector<f32x8>(q + i + 8);
      }
    for (int r = 0; r < 4; r++) {
      const f32x8 v = sum[r][0] + sum[r][1];
      float total = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
      for (int64_t tail = i; tail < width; tail++) total += bf16_to_float(rows[t + r][tail]) * q[tail];
      out[t + r] = total;
    }
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

void add_bf16(uint16_t* x, const uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store_vector(x + i, __builtin_convertvector(round_bf16(widen_bf16(x + i) + widen_bf16(y + i)), u16x16));
  for (; i < n; i++) x[i] = bf16_from_float(bf16_to_float(x[i]) + bf16_to_float(y[i]));
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
  return Kernels{name,       4,       0,             4,        load_f32,     multiply_int4, multiply_bf16,
                 decode_fp8, nullptr, nullptr, tile_bf16_f32, gemm_f32, silu_mul_f32, axpy,          store_bf16,
                 dots_f32,   softmax, turn_f32,      tile_values_f32, scale_rows, rms_norm, add_bf16,
                 read_words, nullptr};
}

}  // namespace
}  // namespace k2
