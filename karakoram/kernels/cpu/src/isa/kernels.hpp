// What an instruction set must bring: a table of small functions on panels. Everything above (sorting tokens, sharing work,
// the order of sums) is written once and calls through the table.
//
// Panels: a matrix [N outputs, K inputs] is cut into panels of 16 outputs; a panel holds its K inputs one after another, so
// that one pass over memory computes 16 outputs. Inputs come in groups of 32, K is padded to 64 with zeros.
//   int4   per 64 inputs 576 bytes: codes of two groups (2 × 256 bytes), their bf16 scales (2 × 16).
//          Codes of a group: 4 vectors of 16 lanes of 32 bits; lane n of vector c holds inputs 8c … 8c+7 of output n, even
//          ones in bits 0-15, odd ones in bits 16-31, four bits each. So a shift by 4j puts the pair (8c + 2j, 8c + 2j + 1)
//          into the low bits of neighbouring 16-bit words: the operand order of dpbf16 and of AMX.
//   bf16   per pair of inputs 32 words: output 0's two, output 1's two, …
//   fp8    per pair of inputs 32 bytes, in the same order; scales float32 per 128 × 128 follow the panels.
//
// A tile is a panel decoded for the matrix units: bf16 pairs as above (`activation_bytes` 2), or float32 [K][16] (4).
#pragma once
#include <cstdint>

namespace k2 {

constexpr int64_t kPanel = 16;
constexpr int64_t kGroup = 32;
constexpr int64_t kBlock = 64;             // inputs are padded to a multiple of this
constexpr int64_t kInt4BlockBytes = 576;   // 16 outputs × 64 inputs × 4.5 bits: nine cache lines

struct Kernels {
  const char* name;
  int activation_bytes;  // of an input: 2 = bf16, 4 = float32
  int64_t unit_rows;     // from so many rows on, a matrix unit is faster, whose sums are others; 0: there is none
  int64_t rows_at_once;  // products of so many rows stay in registers: with no more, one pass over the inputs does

  // bf16 -> activations
  void (*load)(const uint16_t* x, int64_t n, void* out);
  // out[r][16·p + n] (+)= Σ_k x[r][k] · w[k][n] for `count` panels p, 1 or 2; x has `ldx` activations per row. The order of the
  // sums is the same for any number of rows and of panels: a group of 32 inputs in order, from zero, then scaled and added.
  // Scales are those of fp8 codes in a bf16 panel, for each panel one per 128 inputs; null otherwise.
  void (*multiply_int4)(int64_t rows, const void* x, int64_t ldx, const void* const* panels, const float* const* scales,
                        int count, int64_t blocks, float* out, int64_t ldo, bool add);
  void (*multiply_bf16)(int64_t rows, const void* x, int64_t ldx, const void* const* panels, const float* const* scales,
                        int count, int64_t blocks, float* out, int64_t ldo, bool add);
  // `blocks` blocks of 64 inputs: fp8 panel -> bf16 panel, its codes as they are, which bf16 holds exactly
  void (*decode_fp8)(const uint8_t* panel, int64_t blocks, uint16_t* out);
  // `blocks` blocks of 64 inputs -> tile; of int4 and fp8 as the checkpoint's decoder has it, rounded to bf16
  void (*tile_int4)(const uint8_t* panel, int64_t blocks, void* tile);                       // null without a matrix unit
  void (*tile_fp8)(const uint8_t* panel, int64_t blocks, const float* scales, void* tile);  // likewise
  void (*tile_bf16)(const uint16_t* panel, int64_t blocks, void* tile);
  // c[r][0..16·panels-1] (+)= a[r][0..k-1] · tiles; k a multiple of 32, panels 1 or 2, tiles `stride` activations apart
  void (*gemm)(int64_t rows, const void* a, int64_t lda, const void* tiles, int64_t stride, int panels, int64_t k, float* c,
               int64_t ldc, bool add);
  // h = silu(gate) · up as activations
  void (*silu_mul)(const float* gate, const float* up, int64_t n, void* out);
  // y (+)= weight · x
  void (*axpy)(const float* x, float weight, int64_t n, float* y, bool add);
  void (*store_bf16)(const float* x, int64_t n, uint16_t* out);
  // out[t] = rows[t] · query for 16 bf16 rows of `width`; the query's activations are padded with zeros to the block
  void (*dots)(const uint16_t* const* rows, int64_t width, const void* query, float* out);
  // One piece of attention: scores[t][heads] -> probabilities; see mla_decode.cpp
  void (*softmax)(float* scores, int64_t tokens, int64_t heads, float scale, float* running_max, float* running_sum,
                  float* rescale);
  // p[t][head] float32 -> activations [head][t]; rows of 128, zero behind `tokens`
  void (*turn)(const float* p, int64_t tokens, int64_t heads, void* out, int64_t ldo);
  // rows of values bf16 [tokens][width] -> tiles [width / 16][tokens padded to 32]
  void (*tile_values)(const uint16_t* const* rows, int64_t tokens, int64_t padded, int64_t width, void* tiles);
  void (*scale_rows)(float* x, int64_t rows, int64_t width, int64_t ld, const float* by);
  void (*rms_norm)(const uint16_t* x, const uint16_t* weight, int64_t n, float eps, uint16_t* y);
  void (*add_bf16)(uint16_t* x, const uint16_t* y, int64_t n);  // x += y, rounded
  uint64_t (*read)(const uint64_t* words, int64_t n);
  const struct Muon* muon;  // null where torch's products are as fast
  const struct Causal* causal;  // likewise
};

// One per object file; null where it was not compiled for this processor family.
extern "C" const Kernels* k2_kernels_scalar();
extern "C" const Kernels* k2_kernels_avx2();
extern "C" const Kernels* k2_kernels_avx512f();
extern "C" const Kernels* k2_kernels_avx512();
extern "C" const Kernels* k2_kernels_amx();
extern "C" const Kernels* k2_kernels_amx_emulated();

}  // namespace k2
