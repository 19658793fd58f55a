// AVX2 with FMA: the portable table in pairs of 8-float registers.
#if defined(__AVX2__) && defined(__FMA__)
#define K2_TILE_ROWS 6  // 6 rows × 2 registers of sums, 2 of weights, 1 of inputs: 15 of 16
#include "portable.hpp"

namespace k2 {
static const Kernels kTable = portable_kernels("avx2");
extern "C" const Kernels* k2_kernels_avx2() { return &kTable; }
}  // namespace k2
#else
#include "kernels.hpp"
namespace k2 {
extern "C" const Kernels* k2_kernels_avx2() { return nullptr; }
}  // namespace k2
#endif
