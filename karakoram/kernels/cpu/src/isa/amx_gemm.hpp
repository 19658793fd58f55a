// Products of tiles on AMX: 32 rows × 32 outputs at a time in four accumulators, K in steps of 32 (one tile of inputs is 16
// rows × 32 bf16, one of weights 16 pairs × 16 outputs: the layout of a panel's tile as it is).
//
// The including file defines k2_tile_config, k2_tile_zero, k2_tile_load, k2_tile_store and k2_tile_dot as macros: the
// instructions in amx.cpp, plain loops in amx_emulated.cpp, which tests run on machines without AMX.
#pragma once

namespace k2 {
namespace {

struct TileConfig {  // the 64 bytes that ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// tiles 0-3: sums (rows 0-15 and 16-31 of inputs × panels 0 and 1); 4, 5: inputs; 6, 7: weights
inline TileConfig config_of(int64_t rows) {
  TileConfig config;
  const uint8_t first = static_cast<uint8_t>(rows < 16 ? rows : 16);
  const uint8_t second = static_cast<uint8_t>(rows > 16 ? rows - 16 : 1);
  for (int t = 0; t < 8; t++) config.bytes_per_row[t] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = first;
  config.rows[2] = config.rows[3] = config.rows[5] = second;
  config.rows[6] = config.rows[7] = 16;
  return config;
}

template <bool Two, bool Panels>  // more than 16 rows; two panels
void gemm_amx_block(const uint16_t* a, int64_t lda, const uint16_t* tiles, int64_t stride, int64_t k, float* c, int64_t ldc,
                    bool add) {
  if (add) {
    k2_tile_load(0, c, 4 * ldc);
    if (Panels) k2_tile_load(1, c + 16, 4 * ldc);
    if (Two) k2_tile_load(2, c + 16 * ldc, 4 * ldc);
    if (Two && Panels) k2_tile_load(3, c + 16 * ldc + 16, 4 * ldc);
  } else {
    k2_tile_zero(0);
    if (Panels) k2_tile_zero(1);
    if (Two) k2_tile_zero(2);
    if (Two && Panels) k2_tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += 32) {
    k2_tile_load(4, a + i, 2 * lda);
    k2_tile_load(6, tiles + 16 * i, 64);
    k2_tile_dot(0, 4, 6);
    if (Two) {
      k2_tile_load(5, a + 16 * lda + i, 2 * lda);
      k2_tile_dot(2, 5, 6);
    }
    if (Panels) {
      k2_tile_load(7, tiles + stride + 16 * i, 64);
      k2_tile_dot(1, 4, 7);
      if (Two) k2_tile_dot(3, 5, 7);
    }
  }
  k2_tile_store(0, c, 4 * ldc);
  if (Panels) k2_tile_store(1, c + 16, 4 * ldc);
  if (Two) k2_tile_store(2, c + 16 * ldc, 4 * ldc);
  if (Two && Panels) k2_tile_store(3, c + 16 * ldc + 16, 4 * ldc);
}

void gemm_amx(int64_t rows, const void* input, int64_t lda, const void* weights, int64_t stride, int panels, int64_t k,
              float* c, int64_t ldc, bool add) {
  const uint16_t *a = static_cast<const uint16_t*>(input), *tiles = static_cast<const uint16_t*>(weights);
  int64_t configured = 0;
  for (int64_t r = 0; r < rows; r += 32) {
    const int64_t here = rows - r < 32 ? rows - r : 32;
    if (here != configured) {
      const TileConfig config = config_of(here);
      k2_tile_config(&config);
      configured = here;
    }
    const uint16_t* in = a + r * lda;
    float* out = c + r * ldc;
    if (here > 16) {
      if (panels == 2) gemm_amx_block<true, true>(in, lda, tiles, stride, k, out, ldc, add);
      else gemm_amx_block<true, false>(in, lda, tiles, stride, k, out, ldc, add);
    } else {
      if (panels == 2) gemm_amx_block<false, true>(in, lda, tiles, stride, k, out, ldc, add);
      else gemm_amx_block<false, false>(in, lda, tiles, stride, k, out, ldc, add);
    }
  }
  k2_tile_release();
}

}  // namespace
}  // namespace k2
