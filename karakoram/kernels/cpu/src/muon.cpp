// The two passes of a Muon step over all numbers, bound by memory: torch takes nine.
#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.hpp"
#include "errors.hpp"
#include "isa/muon/kernels.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

constexpr int64_t kPiece = 1 << 14;  // numbers of one item: some 10 µs

// Calls work(first, count) on pieces of n numbers.
template <class Work>
void by_pieces(int64_t n, bool alone, const Work& work) {
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  parallel_if(!alone && pieces > 1, pieces, [&](int64_t piece, int) {
    work(piece * kPiece, std::min(kPiece, n - piece * kPiece));
  });
}

}  // namespace

extern "C" k2_status k2_muon_momentum(const k2_tensor* gradient, k2_tensor* buffer, float momentum, float new_share,
                                      float scale, int32_t nesterov, int32_t alone, k2_tensor* out) try {
  const bool wide = gradient && gradient->dtype == K2_F32;
  K2_TRY(check_tensor("gradient", gradient, wide ? K2_F32 : K2_BF16, 1));
  K2_TRY(check_tensor("buffer", buffer, K2_F32, 1));
  K2_TRY(check_tensor("out", out, K2_BF16, 1));
  const int64_t n = gradient->shape[0];
  if (buffer->shape[0] != n || out->shape[0] != n) return fail(K2_BAD_SHAPE, "gradient, buffer and out do not have the same size");
  const Kernels& table = kernels();
  if (!table.muon) return fail(K2_NO_ISA, "the instruction set %s has no Muon", table.name);
  const MomentumRule rule{momentum, new_share, scale, nesterov != 0};
  by_pieces(n, alone, [&](int64_t at, int64_t count) {
    table.muon->momentum(rule, wide ? static_cast<const float*>(gradient->data) + at : nullptr,
                         wide ? nullptr : static_cast<const uint16_t*>(gradient->data) + at, count,
                         static_cast<float*>(buffer->data) + at, static_cast<uint16_t*>(out->data) + at);
  });
  return K2_OK;
} K2_CATCH

extern "C" k2_status k2_muon_update(k2_tensor* weight, const k2_tensor* update, float keep, float by, int32_t alone,
                                    float* squares) try {
  K2_TRY(check_tensor("weight", weight, K2_F32, 1));
  K2_TRY(check_tensor("update", update, K2_BF16, 1));
  const int64_t n = weight->shape[0];
  if (update->shape[0] != n) return fail(K2_BAD_SHAPE, "weight and update do not have the same size");
  if (!squares) return fail(K2_BAD_CALL, "the sum of squares has no place");
  const Kernels& table = kernels();
  if (!table.muon) return fail(K2_NO_ISA, "the instruction set %s has no Muon", table.name);
  std::vector<float> of_pieces(static_cast<size_t>((n + kPiece - 1) / kPiece));
  by_pieces(n, alone, [&](int64_t at, int64_t count) {
    of_pieces[at / kPiece] = table.muon->update(static_cast<float*>(weight->data) + at,
                                                static_cast<const uint16_t*>(update->data) + at, keep, by, count);
  });
  *squares = static_cast<float>(std::accumulate(of_pieces.begin(), of_pieces.end(), 0.0));  // in order, whoever made them
  return K2_OK;
} K2_CATCH
