// fp8 looked up in a table of four registers. Shared by the AVX-512 sets.
#pragma once
#include <immintrin.h>

#include "portable.hpp"

namespace k2 {
namespace {

struct Fp8Table {  // bf16 numbers of the codes 0…127
  alignas(64) uint16_t words[128];
  Fp8Table() {
    for (int i = 0; i < 128; i++) words[i] = bf16_from_float(fp8_e4m3_to_float(static_cast<uint8_t>(i)));
  }
};

void decode_fp8_avx512(const uint8_t* panel, int64_t blocks, uint16_t* out) {
  static const Fp8Table table;
  const __m512i first = _mm512_load_si512(table.words), second = _mm512_load_si512(table.words + 32);
  const __m512i third = _mm512_load_si512(table.words + 64), fourth = _mm512_load_si512(table.words + 96);
  for (int64_t i = 0; i < kPanel * kBlock * blocks; i += 32) {
    if (i % 64 == 0) _mm_prefetch(reinterpret_cast<const char*>(panel + i) + Ahead::kBytes, _MM_HINT_T0);
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + i)));
    const __m512i low = _mm512_permutex2var_epi16(first, code, second);  // which look at the lower six bits of a code
    const __m512i high = _mm512_permutex2var_epi16(third, code, fourth);
    const __m512i value = _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40)), high);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(static_cast<int16_t>(0x8000)));
    _mm512_storeu_si512(out + i, _mm512_or_si512(value, sign));
  }
}

}  // namespace
}  // namespace k2
