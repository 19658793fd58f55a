// AVX-512 with BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define K2_TILE_ROWS 12
#include "avx512_bf16.hpp"
#include "causal/kernels.hpp"
#include "muon/kernels.hpp"

namespace k2 {
extern "C" const Kernels* k2_kernels_avx512() {
  static const Kernels kTable = [] {
    Kernels table = bf16_kernels("avx512");
    table.muon = k2_muon_avx512();
    table.causal = k2_causal_avx512();
    return table;
  }();
  return &kTable;
}
}  // namespace k2
#else
#include "kernels.hpp"
namespace k2 {
extern "C" const Kernels* k2_kernels_avx512() { return nullptr; }
}  // namespace k2
#endif
