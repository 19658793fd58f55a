// From a checkpoint's tensors to panels and back (layout: isa/kernels.hpp). Panels are independent, so the work is shared.
#include <atomic>
#include <cstring>

#include "formats/int4_group.hpp"
#include "matrix.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

k2_status check_out(const k2_tensor* out, int32_t dtype, int64_t outputs, int64_t inputs) {
  Matrix m;
  K2_TRY(as_matrix("packed", out, &m));
  if (m.dtype != dtype || m.outputs != outputs || m.inputs != inputs)
    return fail(K2_BAD_SHAPE, "packed is %s [%lld, %lld], expected %s [%lld, %lld]", dtype_name(m.dtype),
                static_cast<long long>(m.outputs), static_cast<long long>(m.inputs), dtype_name(dtype),
                static_cast<long long>(outputs), static_cast<long long>(inputs));
  return K2_OK;
}

k2_status check_int4(const k2_tensor* codes, const k2_tensor* scale) {
  K2_TRY(check_tensor("codes", codes, K2_I32, 2));
  K2_TRY(check_tensor("scale", scale, K2_BF16, 2));
  if (scale->shape[0] != codes->shape[0] || scale->shape[1] * 4 != codes->shape[1])
    return fail(K2_BAD_SHAPE, "codes [%lld, %lld] and scale [%lld, %lld] do not fit: a scale covers four words of codes",
                static_cast<long long>(codes->shape[0]), static_cast<long long>(codes->shape[1]),
                static_cast<long long>(scale->shape[0]), static_cast<long long>(scale->shape[1]));
  return K2_OK;
}

bool pack_int4_panel(const k2_tensor& codes, const k2_tensor& scale, int64_t panel, uint8_t* out) {
  const int64_t outputs = codes.shape[0], groups = scale.shape[1], blocks = (groups + 1) / 2;
  bool finite = true;
  for (int64_t block = 0; block < blocks; block++, out += kInt4BlockBytes) {
    uint32_t* lanes = reinterpret_cast<uint32_t*>(out);
    uint16_t* scales = reinterpret_cast<uint16_t*>(out + 512);
    for (int half = 0; half < 2; half++, lanes += 64, scales += 16) {
      const int64_t group = 2 * block + half;
      uint32_t raw[64];  // collected first, so that reordering nibbles is one loop over neighbours, which vectorises
      for (int64_t n = 0; n < kPanel; n++) {
        const int64_t row = panel * kPanel + n;
        const bool there = row < outputs && group < groups;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(codes.data) + row * codes.strides[0] + 4 * group;
        for (int c = 0; c < 4; c++) raw[16 * c + n] = there ? words[c] : kZeroWord;
        scales[n] = there ? static_cast<const uint16_t*>(scale.data)[row * scale.strides[0] + group] : 0;
        finite &= (scales[n] & 0x7F80) != 0x7F80;
      }
      for (int i = 0; i < 64; i++) lanes[i] = lane_from_word(raw[i]);
    }
  }
  return finite;
}

void unpack_int4_panel(const uint8_t* in, int64_t panel, k2_tensor& codes, k2_tensor& scale) {
  const int64_t outputs = codes.shape[0], groups = scale.shape[1];
  for (int64_t group = 0; group < groups; group++) {
    const uint8_t* block = in + group / 2 * kInt4BlockBytes;
    const uint32_t* lanes = reinterpret_cast<const uint32_t*>(block + 256 * (group % 2));
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block + 512 + 32 * (group % 2));
    for (int64_t n = 0; n < kPanel && panel * kPanel + n < outputs; n++) {
      const int64_t row = panel * kPanel + n;
      for (int c = 0; c < 4; c++)
        static_cast<uint32_t*>(codes.data)[row * codes.strides[0] + 4 * group + c] = word_from_lane(lanes[16 * c + n]);
      static_cast<uint16_t*>(scale.data)[row * scale.strides[0] + group] = scales[n];
    }
  }
}

// Words of 1 or 2 bytes: pair by pair, output by output.
template <class Word>
void pack_pairs(const k2_tensor& weight, int64_t panel, int64_t padded, Word* out) {
  const int64_t outputs = weight.shape[0], inputs = weight.shape[1];
  for (int64_t n = 0; n < kPanel; n++) {
    const int64_t row = panel * kPanel + n;
    const Word* in = static_cast<const Word*>(weight.data) + row * weight.strides[0];
    const int64_t there = row < outputs ? inputs : 0;
    int64_t i = 0;
    for (; i + 2 <= there; i += 2) {
      out[16 * i + 2 * n] = in[i];
      out[16 * i + 2 * n + 1] = in[i + 1];
    }
    for (; i < padded; i++) out[16 * (i & ~1) + 2 * n + (i & 1)] = i < there ? in[i] : Word(0);
  }
}

constexpr int64_t kCodeBytes = 512, kScaleBytes = kInt4BlockBytes - kCodeBytes;
constexpr int64_t kShadowBlockBytes = kCodeBytes / 2 + kScaleBytes;
constexpr int64_t kBlocksAtOnce = 256;

k2_status check_shadow(const k2_tensor* panels, const k2_tensor* shadow) {
  K2_TRY(check_tensor("panels", panels, K2_U8, 1));
  K2_TRY(check_tensor("shadow", shadow, K2_U8, 1));
  if (panels->shape[0] % kInt4BlockBytes || panels->shape[0] / kInt4BlockBytes * kShadowBlockBytes != shadow->shape[0])
    return fail(K2_BAD_SHAPE, "%lld bytes of panels have no shadow of %lld", static_cast<long long>(panels->shape[0]),
                static_cast<long long>(shadow->shape[0]));
  return K2_OK;
}

template <class Work>
void for_blocks(int64_t blocks, const Work& work) {
  parallel((blocks + kBlocksAtOnce - 1) / kBlocksAtOnce, [&](int64_t part, int) {
    const int64_t end = (part + 1) * kBlocksAtOnce;
    for (int64_t b = part * kBlocksAtOnce; b < (end < blocks ? end : blocks); b++) work(b);
  });
}

}  // namespace

extern "C" {

k2_status k2_shadow_make(const k2_tensor* panels, k2_tensor* shadow) try {
  K2_TRY(check_shadow(panels, shadow));
  for_blocks(panels->shape[0] / kInt4BlockBytes, [&](int64_t b) {
    const uint8_t* in = static_cast<const uint8_t*>(panels->data) + b * kInt4BlockBytes;
    uint8_t* out = static_cast<uint8_t*>(shadow->data) + b * kShadowBlockBytes;
    for (int64_t i = 0; i < kCodeBytes / 2; i++) {  // bytes i and i + 256: both halves are then read in order
      const uint8_t low = in[i], high = in[i + kCodeBytes / 2];
      out[i] = static_cast<uint8_t>((low >> 2 & 0x03) | (low >> 4 & 0x0C) | (high << 2 & 0x30) | (high & 0xC0));
    }
    memcpy(out + kCodeBytes / 2, in + kCodeBytes, kScaleBytes);
  });
  return K2_OK;
} K2_CATCH

k2_status k2_shadow_expand(const k2_tensor* shadow, k2_tensor* panels) try {
  K2_TRY(check_shadow(panels, shadow));
  for_blocks(panels->shape[0] / kInt4BlockBytes, [&](int64_t b) {
    const uint8_t* in = static_cast<const uint8_t*>(shadow->data) + b * kShadowBlockBytes;
    uint8_t* out = static_cast<uint8_t*>(panels->data) + b * kInt4BlockBytes;
    for (int64_t i = 0; i < kCodeBytes / 2; i++) {
      const uint8_t s = in[i];
      out[i] = static_cast<uint8_t>((s << 2 & 0x0C) | (s << 4 & 0xC0) | 0x21);
      out[i + kCodeBytes / 2] = static_cast<uint8_t>((s >> 2 & 0x0C) | (s & 0xC0) | 0x21);
    }
    memcpy(out + kCodeBytes, in + kCodeBytes / 2, kScaleBytes);
  });
  return K2_OK;
} K2_CATCH

int64_t k2_packed_bytes(int32_t dtype, int64_t outputs, int64_t inputs) { return packed_bytes(dtype, outputs, inputs); }

k2_status k2_pack_int4(const k2_tensor* codes, const k2_tensor* scale, k2_tensor* out) try {
  K2_TRY(check_int4(codes, scale));
  K2_TRY(check_out(out, K2_INT4_PANELS, codes->shape[0], scale->shape[1] * kGroup));
  Matrix m;
  K2_TRY(as_matrix("packed", out, &m));
  std::atomic<bool> finite{true};
  parallel(m.panels(), [&](int64_t p, int) {
    if (!pack_int4_panel(*codes, *scale, p, static_cast<uint8_t*>(out->data) + p * m.panel_bytes())) finite = false;
  });
  return finite ? K2_OK : fail(K2_NOT_FINITE, "a scale is infinite or not a number");
} K2_CATCH

k2_status k2_unpack_int4(const k2_tensor* packed, k2_tensor* codes, k2_tensor* scale) try {
  K2_TRY(check_int4(codes, scale));
  K2_TRY(check_out(packed, K2_INT4_PANELS, codes->shape[0], scale->shape[1] * kGroup));
  Matrix m;
  K2_TRY(as_matrix("packed", packed, &m));
  parallel(m.panels(), [&](int64_t p, int) { unpack_int4_panel(m.panel(p), p, *codes, *scale); });
  return K2_OK;
} K2_CATCH

k2_status k2_pack_bf16(const k2_tensor* weight, k2_tensor* out) try {
  K2_TRY(check_tensor("weight", weight, K2_BF16, 2));
  K2_TRY(check_out(out, K2_BF16_PANELS, weight->shape[0], weight->shape[1]));
  Matrix m;
  K2_TRY(as_matrix("packed", out, &m));
  parallel(m.panels(), [&](int64_t p, int) {
    uint8_t* place = static_cast<uint8_t*>(out->data) + p * m.panel_bytes();
    pack_pairs(*weight, p, m.blocks() * kBlock, reinterpret_cast<uint16_t*>(place));
  });
  return K2_OK;
} K2_CATCH

k2_status k2_pack_fp8(const k2_tensor* weight, const k2_tensor* scale, k2_tensor* out) try {
  K2_TRY(check_tensor("weight", weight, K2_U8, 2));
  K2_TRY(check_tensor("scale", scale, K2_F32, 2));
  K2_TRY(check_out(out, K2_FP8_PANELS, weight->shape[0], weight->shape[1]));
  Matrix m;
  K2_TRY(as_matrix("packed", out, &m));
  const int64_t rows = (m.outputs + 127) / 128, columns = m.scale_columns();
  if (scale->shape[0] != rows || scale->shape[1] != columns)
    return fail(K2_BAD_SHAPE, "scale is [%lld, %lld], expected [%lld, %lld]: one for each block of 128 × 128",
                static_cast<long long>(scale->shape[0]), static_cast<long long>(scale->shape[1]),
                static_cast<long long>(rows), static_cast<long long>(columns));
  parallel(m.panels(), [&](int64_t p, int) {
    pack_pairs(*weight, p, m.blocks() * kBlock, static_cast<uint8_t*>(out->data) + p * m.panel_bytes());
  });
  float* scales = const_cast<float*>(m.scales(0));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const float value = static_cast<const float*>(scale->data)[r * scale->strides[0] + c];
      if (!(value - value == 0)) return fail(K2_NOT_FINITE, "a scale is infinite or not a number");
      scales[r * columns + c] = value;
    }
  return K2_OK;
} K2_CATCH
}
