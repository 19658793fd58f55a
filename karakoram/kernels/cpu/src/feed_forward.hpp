// SwiGLU with packed weights, for several sets of rows at once: the shared part of experts, shared experts and dense layers.
#pragma once
#include <cstdlib>
#include <vector>

#include "matrix.hpp"

namespace k2 {

struct FeedForward {  // down(silu(gate(x)) · up(x)) for `rows` rows
  Matrix gate, up, down;
  int64_t rows = 0;
  const void* x = nullptr;        // activations, ldx apart, padded with zeros to the block
  int64_t ldx = 0;
  void* h = nullptr;              // room for rows × padded intermediate activations
  float* out = nullptr;           // row r goes to out + place[r] · ldo, or to out + r · ldo without places
  int64_t ldo = 0;
  const int64_t* place = nullptr;

  int64_t ldh() const { return row_stride(gate.outputs); }
};

bool run(const Kernels& k, const std::vector<FeedForward>& jobs);

// Rows of bf16, chosen by `from` (or all, in order), as activations padded to the block.
void load_rows(const Kernels& k, const k2_tensor& x, const int64_t* from, int64_t rows, void* out, int64_t ldo);

void* allocate(size_t bytes);  // 64-byte aligned, for free(); null where there is none

}  // namespace k2
