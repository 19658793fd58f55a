// Weights are multiplied as they are decoded, some rows at a time; with more of them, stretch by stretch of the inputs, so that
// later rows find the weights in the first cache. One order of sums for any number of rows: a row's result does not depend on
// how many others there are. Only a matrix unit (AMX) sums otherwise, and is left alone where that is not wanted.
#include "matrix.hpp"

#include "worker_pool.hpp"

namespace k2 {

constexpr int64_t kFp8Stretch = 4;  // likewise, decoded: two panels are 16 KB
constexpr int64_t kStretch = 16;  // blocks of 64 inputs: two panels of int4 are 18 KB, and six rows of inputs 12

int64_t packed_bytes(int32_t dtype, int64_t outputs, int64_t inputs) {
  Matrix m;
  m.dtype = dtype, m.outputs = outputs, m.inputs = inputs;
  if (dtype < K2_INT4_PANELS || dtype > K2_FP8_PANELS || outputs < 0 || inputs < 0 || outputs > kMostBytes ||
      inputs > kMostBytes || !fits({round_up(outputs, kPanel), round_up(inputs, kBlock), 4}))
    return -1;
  const int64_t scales = dtype == K2_FP8_PANELS ? (outputs + 127) / 128 * m.scale_columns() * 4 : 0;
  return m.panels() * m.panel_bytes() + scales;
}

k2_status as_matrix(const char* name, const k2_tensor* tensor, Matrix* out) {
  if (!tensor) return fail(K2_BAD_SHAPE, "%s is missing", name);
  if (tensor->dtype < K2_INT4_PANELS || tensor->dtype > K2_FP8_PANELS)
    return fail(K2_BAD_DTYPE, "%s is %s, expected packed panels", name, dtype_name(tensor->dtype));
  if (tensor->ndim != 2 || tensor->shape[0] < 1 || tensor->shape[1] < 1)
    return fail(K2_BAD_SHAPE, "%s is no matrix with outputs and inputs", name);
  if (packed_bytes(tensor->dtype, tensor->shape[0], tensor->shape[1]) < 0)
    return fail(K2_BAD_SHAPE, "%s is larger than any memory", name);
  if (!tensor->data) return fail(K2_BAD_SHAPE, "%s points nowhere", name);
  if (reinterpret_cast<uintptr_t>(tensor->data) % 64)
    return fail(K2_BAD_ALIGNMENT, "%s is not aligned to 64 bytes", name);
  *out = Matrix{static_cast<const uint8_t*>(tensor->data), tensor->dtype, tensor->shape[0], tensor->shape[1]};
  return K2_OK;
}

int64_t panels_together(const Kernels& k, const Matrix& m, int64_t rows) {
  constexpr int64_t kStretchBytes = 1 << 16;
  if (rows > kFewRows) return 2;
  const int64_t pairs = kStretchBytes / (2 * m.panel_bytes());
  return 2 * (pairs < 1 ? 1 : pairs > 8 ? 8 : pairs);
}

// A stretch as bf16 panels; int4 rounded with its scales, since a matrix unit sums across groups.
static void decode(const Kernels& k, const Side& side, int64_t block, int64_t blocks, uint16_t* tile) {
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
  const int32_t dtype = sides[0].matrix->dtype;
  const bool unit = k.unit_rows && rows >= k.unit_rows && !deterministic();
  const int64_t stride = kStretch * kBlock * kPanel;  // words of bf16 in the tile of one panel
  uint16_t* tiles = nullptr;
  if (unit || dtype == K2_FP8_PANELS) {
    tiles = static_cast<uint16_t*>(thread_scratch(0, static_cast<size_t>(2 * stride) * sizeof(uint16_t)));
    if (!tiles) return false;
  }
  const int64_t blocks = sides[0].matrix->blocks();
  const int64_t step = unit ? kStretch : tiles ? kFp8Stretch : rows <= k.rows_at_once ? blocks : kStretch;
  for (int64_t block = 0; block < blocks; block += step) {
    const int64_t here = blocks - block < step ? blocks - block : step;
    const void* in = static_cast<const char*>(x) + block * kBlock * k.activation_bytes;
    const void* panels[2];
    const float* scales[2];
    for (int i = 0; i < count; i++) {
      const Matrix& m = *sides[i].matrix;
      const uint8_t* from = m.panel(sides[i].panel) + block * m.block_bytes();
      panels[i] = tiles ? static_cast<const void*>(tiles + i * stride) : from;
      if (unit) {
        decode(k, sides[i], block, here, tiles + i * stride);
      } else if (tiles) {
        k.decode_fp8(from, here, tiles + i * stride);
        scales[i] = m.scales(sides[i].panel) + block * kBlock / 128;
      }
    }
    if (unit)
      k.gemm(rows, in, ldx, tiles, stride, count, here * kBlock, out, ldo, block > 0);
    else if (dtype == K2_INT4_PANELS)
      k.multiply_int4(rows, in, ldx, panels, nullptr, count, here, out, ldo, block > 0);
    else
      k.multiply_bf16(rows, in, ldx, panels, tiles ? scales : nullptr, count, here, out, ldo, block > 0);
  }
  return true;
}

}  // namespace k2
