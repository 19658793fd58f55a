// How eight neighbouring int4 codes of a checkpoint (first in the lowest bits) become a lane of a panel, and back: even
// codes go to the low 16 bits, odd ones to the high 16 (kernels.hpp says why).
#pragma once
#include <cstdint>

namespace k2 {
namespace {

inline uint32_t even_nibbles(uint32_t w) {
  w &= 0x0F0F0F0F;
  w = (w | (w >> 4)) & 0x00FF00FF;
  return (w | (w >> 8)) & 0xFFFF;
}

inline uint32_t spread_nibbles(uint32_t half) {
  half = (half | (half << 8)) & 0x00FF00FF;
  return (half | (half << 4)) & 0x0F0F0F0F;
}

inline uint32_t lane_from_word(uint32_t word) { return even_nibbles(word) | (even_nibbles(word >> 4) << 16); }

inline uint32_t word_from_lane(uint32_t lane) {
  return spread_nibbles(lane & 0xFFFF) | (spread_nibbles(lane >> 16) << 4);
}

constexpr uint32_t kZeroWord = 0x88888888;  // code 8 is the value 0

}  // namespace
}  // namespace k2
