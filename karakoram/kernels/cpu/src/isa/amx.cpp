// AMX (Sapphire Rapids and later): AVX-512 for few rows, tiles of the matrix unit for many.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "avx512_bf16.hpp"

#define k2_tile_config(config) _tile_loadconfig(config)
#define k2_tile_zero(t) _tile_zero(t)
#define k2_tile_load(t, from, bytes) _tile_loadd(t, from, bytes)
#define k2_tile_store(t, to, bytes) _tile_stored(t, to, bytes)
#define k2_tile_dot(sum, a, b) _tile_dpbf16ps(sum, a, b)
#define k2_tile_release() _tile_release()
#include "amx_gemm.hpp"

namespace k2 {
static Kernels amx_kernels() {
  Kernels kernels = bf16_kernels("amx");
  kernels.unit_rows = 9;
  kernels.tile_int4 = tile_int4_bf16;
  kernels.tile_fp8 = tile_fp8_bf16;
  kernels.gemm = gemm_amx;
  return kernels;
}
extern "C" const Kernels* k2_kernels_amx() {
  static const Kernels kTable = amx_kernels();
  return &kTable;
}
}  // namespace k2
#else
#include "kernels.hpp"
namespace k2 {
extern "C" const Kernels* k2_kernels_amx() { return nullptr; }
}  // namespace k2
#endif
