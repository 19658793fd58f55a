// Which table of kernels runs: the best one that is built in, that the CPU has and that the operating system permits.
#pragma once
#include "isa/kernels.hpp"

namespace k2 {
const Kernels& kernels();
}
