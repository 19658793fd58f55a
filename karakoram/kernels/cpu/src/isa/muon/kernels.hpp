// What an instruction set brings for Muon: Newton-Schulz steps on parts of one matrix, and the passes over all numbers before and
// after them. What a step is, and who does which part, is written once in ../../newton_schulz.hpp, ../../muon.cpp, ../../muon_step.cpp.
//
// A matrix X [A, B] is padded with zeros to multiples of 16 and lies in memory twice, in panels of 16:
//   columns  panel of 16 columns: per pair of rows 16 lanes, lane n = (X[2k, n], X[2k + 1, n])
//   rows     panel of 16 rows: per pair of columns 16 lanes, lane m = (X[m, 2k], X[m, 2k + 1])
// the operands of dpbf16, which sums pairs. Of a symmetric matrix both are the same.
#pragma once
#include <cstdint>

namespace k2 {

constexpr int64_t kSide = 16;         // of a panel; numbers of a pair's lanes: 32
constexpr int64_t kSummedAtOnce = 512; // products in one float32 sum; a longer row has several, added in order, as oneDNN's

struct MomentumRule {
  float momentum, new_share, scale;  // M ← M + new_share · (scale·G − M)
  bool nesterov;                     // gives scale·G + momentum · (M − scale·G) instead of M
};

struct Muon {
  // 16 columns of a matrix / norm -> their panel, and their part of the panels of rows; it may have more rows than columns
  void (*load)(const uint16_t* x, float norm, int64_t rows, int64_t columns, int64_t panel, uint16_t* by_columns,
               uint16_t* by_rows);
  // Row panel `i` of X·Xᵀ, X of `side` rows and `inputs` columns (padded), from the diagonal on, and the same mirrored.
  void (*gram)(const uint16_t* by_rows, int64_t side, int64_t inputs, int64_t i, uint16_t* gram);
  // Likewise of b·G + c·G².
  void (*mix)(const uint16_t* gram, int64_t side, float b, float c, int64_t i, uint16_t* mix);
  // `count` panels of a·X + M·X, 1 to 3 columns panels from `panel` on, and their part of the panels of rows.
  void (*apply)(const uint16_t* mix, const uint16_t* by_columns, int64_t side, int64_t width, float a, int64_t panel, int count,
                uint16_t* out_by_columns, uint16_t* out_by_rows);
  // A panel back to 16 columns of a matrix.
  void (*store)(const uint16_t* by_columns, int64_t rows, int64_t columns, int64_t panel, uint16_t* x);
  // Momentum in place -> what is to be made orthogonal; torch's `lerp`, bit for bit.
  void (*momentum)(const MomentumRule& rule, const float* gradient, const uint16_t* gradient_bf16, int64_t n, float* buffer,
                   uint16_t* out);
  // Frobenius, unrounded, in the order in which torch sums bf16: eight sums, then one after the other
  float (*norm)(const uint16_t* x, int64_t n);
  // w ← keep·w + by·update -> Σ update²
  float (*update)(float* w, const uint16_t* update, float keep, float by, int64_t n);
};

// Null where it was not compiled for this processor family.
extern "C" const Muon* k2_muon_avx512();

}  // namespace k2
