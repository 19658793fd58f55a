// Few rows are multiplied as the weights are decoded (the weights come from memory and set the pace). Many rows go through
// tiles: a stretch of inputs is decoded once into the cache, then all rows pass over it.
#include "matrix.hpp"

#include "worker_pool.hpp"

namespace k2 {

constexpr int64_t kStretch = 8;  // blocks of 64 inputs: a tile of two panels is 512 × 32 × 2 bytes = 32 KB, within L1

int64_t packed_bytes(int32_t dtype, int64_t outputs, int64_t inputs) {
  Matrix m;
  m.dtype = dtype, m.outputs = outputs, m.inputs = inputs;
  if (dtype < K2_INT4_PANELS || dtype > K2_FP8_PANELS || outputs < 0 || inputs < 0) return -1;
  const int64_t scales = dtype == K2_FP8_PANELS ? (outputs + 127) / 128 * m.scale_columns() * 4 : 0;
  return m.panels() * m.panel_bytes() + scales;
}

k2_status as_matrix(const char* name, const k2_tensor* tensor, Matrix* out) {
  if (!tensor) return fail(K2_BAD_SHAPE, "%s is missing", name);
  if (tensor->dtype < K2_INT4_PANELS || tensor->dtype > K2_FP8_PANELS)
    return fail(K2_BAD_DTYPE, "%s is %s, expected packed panels", name, dtype_name(tensor->dtype));
  if (tensor->ndim != 2 || tensor->shape[0] < 1 || tensor->shape[1] < 1)
    return fail(K2_BAD_SHAPE, "%s is no matrix with outputs and inputs", name);
  if (!tensor->data) return fail(K2_BAD_SHAPE, "%s points nowhere", name);
  if (reinterpret_cast<uintptr_t>(tensor->data) % 64)
    return fail(K2_BAD_ALIGNMENT, "%s is not aligned to 64 bytes", name);
  *out = Matrix{static_cast<const uint8_t*>(tensor->data), tensor->dtype, tensor->shape[0], tensor->shape[1]};
  return K2_OK;
}

int64_t panels_together(const Kernels& k, const Matrix& m, int64_t rows) {
  constexpr int64_t kStretchBytes = 1 << 16;
  if (rows > k.gemv_rows) return 2;
  const int64_t pairs = kStretchBytes / (2 * m.panel_bytes());
  return 2 * (pairs < 1 ? 1 : pairs > 8 ? 8 : pairs);
}

static void few_rows(const Kernels& k, int64_t rows, const void* x, int64_t ldx, const Side& side, float* out, int64_t ldo) {
  const Matrix& m = *side.matrix;
  if (m.dtype == K2_INT4_PANELS)
    k.gemv_int4(rows, x, ldx, m.panel(side.panel), m.blocks(), out, ldo);
  else
    k.gemv_bf16(rows, x, ldx, reinterpret_cast<const uint16_t*>(m.panel(side.panel)), m.blocks(), out, ldo);
}

static void decode(const Kernels& k, const Side& side, int64_t block, int64_t blocks, void* tile) {
  const Matrix& m = *side.matrix;
  const uint8_t* from = m.panel(side.panel) + block * m.block_bytes();
  if (m.dtype == K2_INT4_PANELS)
    k.tile_int4(from, blocks, tile);
  else if (m.dtype == K2_BF16_PANELS)
    k.tile_bf16(reinterpret_cast<const uint16_t*>(from), blocks, tile);
  else
    k.tile_fp8(from, blocks, m.scales(side.panel) + block * kBlock / 128, tile);
}

bool multiply(const Kernels& k, int64_t rows, const void* x, int64_t ldx, const Side* sides, int count, float* out,
              int64_t ldo) {
  const bool decoded_on_the_fly = sides[0].matrix->dtype != K2_FP8_PANELS;
  if (rows <= k.gemv_rows && decoded_on_the_fly) {
    for (int i = 0; i < count; i++) few_rows(k, rows, x, ldx, sides[i], out + kPanel * i, ldo);
    return true;
  }
  const int64_t stride = kStretch * kBlock * kPanel;  // activations in the tile of one panel
  char* tiles = static_cast<char*>(thread_scratch(0, static_cast<size_t>(2 * stride * k.activation_bytes)));
  if (!tiles) return false;
  const int64_t blocks = sides[0].matrix->blocks();
  for (int64_t block = 0; block < blocks; block += kStretch) {
    const int64_t here = blocks - block < kStretch ? blocks - block : kStretch;
    for (int i = 0; i < count; i++) decode(k, sides[i], block, here, tiles + i * stride * k.activation_bytes);
    const char* in = static_cast<const char*>(x) + block * kBlock * k.activation_bytes;
    k.gemm(rows, in, ldx, tiles, stride, count, here * kBlock, out, ldo, block > 0);
  }
  return true;
}

}  // namespace k2
