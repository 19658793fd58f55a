// The AMX path with its instructions written as loops, so that its addressing is tested on every machine with AVX-512.
// Slow; never chosen by itself.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "avx512_bf16.hpp"

namespace k2 {
namespace {

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t data[16][64] = {};
};
thread_local Tile tiles_of_thread[8];

void configure(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  for (int t = 0; t < 8; t++) {
    tiles_of_thread[t] = Tile();
    tiles_of_thread[t].rows = bytes[48 + t];
    tiles_of_thread[t].bytes = bytes[16 + 2 * t];
  }
}

void load_tile(int t, const void* from, int64_t stride) {
  Tile& tile = tiles_of_thread[t];
  for (int r = 0; r < tile.rows; r++) memcpy(tile.data[r], static_cast<const uint8_t*>(from) + r * stride, tile.bytes);
}

void store_tile(int t, void* to, int64_t stride) {
  Tile& tile = tiles_of_thread[t];
  for (int r = 0; r < tile.rows; r++) memcpy(static_cast<uint8_t*>(to) + r * stride, tile.data[r], tile.bytes);
}

void zero_tile(int t) { memset(tiles_of_thread[t].data, 0, sizeof tiles_of_thread[t].data); }

void dot_tiles(int sum, int a, int b) {  // TDPBF16PS
  Tile &c = tiles_of_thread[sum], &x = tiles_of_thread[a], &w = tiles_of_thread[b];
  for (int r = 0; r < c.rows; r++)
    for (int n = 0; n < 16; n++) {
      float total;
      memcpy(&total, c.data[r] + 4 * n, 4);
      for (int k = 0; k < 16; k++)
        for (int odd = 0; odd < 2; odd++) {
          uint16_t p, q;
          memcpy(&p, x.data[r] + 4 * k + 2 * odd, 2);
          memcpy(&q, w.data[k] + 4 * n + 2 * odd, 2);
          total += bf16_to_float(p) * bf16_to_float(q);
        }
      memcpy(c.data[r] + 4 * n, &total, 4);
    }
}

}  // namespace
}  // namespace k2

#define k2_tile_config(config) configure(config)
#define k2_tile_zero(t) zero_tile(t)
#define k2_tile_load(t, from, bytes) load_tile(t, from, bytes)
#define k2_tile_store(t, to, bytes) store_tile(t, to, bytes)
#define k2_tile_dot(sum, a, b) dot_tiles(sum, a, b)
#define k2_tile_release()
#include "amx_gemm.hpp"

namespace k2 {
static Kernels amx_kernels() {
  Kernels kernels = bf16_kernels("amx_emulated");
  kernels.unit_rows = 9;
  kernels.tile_int4 = tile_int4_bf16;
  kernels.tile_fp8 = tile_fp8_bf16;
  kernels.gemm = gemm_amx;
  return kernels;
}
extern "C" const Kernels* k2_kernels_amx_emulated() {
  static const Kernels kTable = amx_kernels();
  return &kTable;
}
}  // namespace k2
#else
#include "kernels.hpp"
namespace k2 {
extern "C" const Kernels* k2_kernels_amx_emulated() { return nullptr; }
}  // namespace k2
#endif
