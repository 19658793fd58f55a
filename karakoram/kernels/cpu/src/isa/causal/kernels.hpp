// What an instruction set brings for causal attention in training: one head of one document, forward and backward. How heads are
// shared among threads is written once in ../../causal.cpp.
#pragma once
#include <cstdint>

namespace k2 {

// bf16 rows of one head, `step` numbers apart.
struct HeadRows {
  uint16_t* data;
  int64_t step;
};

struct CausalHead {
  int64_t tokens, width, value_width;  // widths are multiples of 16
  float scale;
  HeadRows q, k, v, out;
  float* stats;  // of each token two numbers, `stats_step` apart: its largest logit m, and 1 / Σ exp(logit − m)
  int64_t stats_step;
  // backward only
  HeadRows grad_out, grad_q, grad_k, grad_v;
};

struct Causal {
  int64_t (*forward_bytes)(int64_t tokens, int64_t width, int64_t value_width);
  int64_t (*backward_bytes)(int64_t tokens, int64_t width, int64_t value_width);
  // Writes out and stats -> the largest logit.
  float (*forward)(const CausalHead& head, void* room);
  // Reads out and stats too, writes the gradients of q, k and v.
  void (*backward)(const CausalHead& head, void* room);
};

// Null where it was not compiled for this processor family.
extern "C" const Causal* k2_causal_avx512();

}  // namespace k2
