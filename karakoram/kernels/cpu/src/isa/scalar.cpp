// Any machine, and the target of the sanitizers: the portable table as the compiler's baseline makes it.
#include "portable.hpp"

namespace k2 {
static const Kernels kTable = portable_kernels("scalar");
extern "C" const Kernels* k2_kernels_scalar() { return &kTable; }
}  // namespace k2
