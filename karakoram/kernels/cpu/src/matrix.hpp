// A packed matrix and products with it, for callers that share the work themselves.
#pragma once
#include "dispatch.hpp"
#include "errors.hpp"

namespace k2 {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Activations from one row to the next: padded to the block, and half a cache line off a power of two: rows 4 KB apart
// would fight for the same few places of the first-level cache.
inline int64_t row_stride(int64_t width) { return round_up(width, kBlock) + kBlock / 2; }

constexpr int64_t kFewRows = 24;  // up to here memory sets the pace, beyond it the products

struct Matrix {  // packed [outputs, inputs]
  const uint8_t* data = nullptr;
  int32_t dtype = K2_INT4_PANELS;
  int64_t outputs = 0, inputs = 0;

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  int64_t block_bytes() const {
    return dtype == K2_INT4_PANELS ? kInt4BlockBytes : dtype == K2_BF16_PANELS ? 2 * kPanel * kBlock : kPanel * kBlock;
  }
  int64_t panel_bytes() const { return blocks() * block_bytes(); }
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes(); }
  // fp8: scales per 128 inputs of the 128 outputs that hold panel p
  int64_t scale_columns() const { return (inputs + 127) / 128; }
  const float* scales(int64_t p) const {
    return reinterpret_cast<const float*>(data + panels() * panel_bytes()) + p * kPanel / 128 * scale_columns();
  }
};

int64_t packed_bytes(int32_t dtype, int64_t outputs, int64_t inputs);

k2_status as_matrix(const char* name, const k2_tensor* tensor, Matrix* out);

// How many neighbouring panels one item of work takes: with few rows a thread should stay on one stretch of memory for some
// 64 KB, since every jump costs the latency of a read; with many rows one panel is work enough.
int64_t panels_together(const Kernels& k, const Matrix& m, int64_t rows);

// About how long a product takes one core whose weights are in the third cache: 40 bytes or 100 products a nanosecond.
inline int64_t product_ns(const Matrix& m, int64_t rows) {
  const double ns = static_cast<double>(m.panels() * m.panel_bytes()) / 40 +
                    static_cast<double>(rows) * static_cast<double>(m.outputs) * static_cast<double>(m.inputs) / 100;
  return ns < 1e12 ? static_cast<int64_t>(ns) : int64_t(1000000000000);
}

// Activations of `rows` rows (padded to the block) times panels [first, first + count) of up to two matrices side by side:
// out[r][16·i + n]. At most 2 panels in all. Uses scratch slot 0 of the thread.
struct Side {
  const Matrix* matrix;
  int64_t panel;
};
bool multiply(const Kernels& k, int64_t rows, const void* x, int64_t ldx, const Side* sides, int count, float* out,
              int64_t ldo);

}  // namespace k2
