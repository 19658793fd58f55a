// Which table of kernels runs: the best one that is built in, that the CPU has and that the operating system permits.
#pragma once
#include "isa/kernels.hpp"

namespace k2 {
const Kernels& kernels();
bool deterministic();  // whether a row's bits may not depend on how many others are in the call
}
