// fp8 e4m3 (no infinities, NaN = 0x7F and 0xFF): sign, four bits of exponent (bias 7), three of mantissa.
#pragma once
#include <cstdint>
#include <cstring>

namespace k2 {
namespace {

inline float fp8_e4m3_to_float(uint8_t code) {
  uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24, rest = code & 0x7F, bits;
  if (rest == 0x7F) {
    bits = 0x7FC00000;
  } else if (rest >= 8) {
    bits = (rest << 20) + (120u << 23);  // the exponent's bias moves from 7 to 127
  } else {  // subnormal: mantissa · 2^-9
    float value = static_cast<float>(rest) * 0.001953125f;
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace
}  // namespace k2
