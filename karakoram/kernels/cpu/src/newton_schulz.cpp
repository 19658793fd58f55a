// A stack of matrices over their norms, made orthogonal: whole matrices by one thread each, those left over divided.
#include "newton_schulz.hpp"

#include <atomic>

#include "dispatch.hpp"
#include "errors.hpp"
#include "worker_pool.hpp"

using namespace k2;

extern "C" int k2_muon_here(void) { return kernels().muon != nullptr; }

extern "C" k2_status k2_newton_schulz(const k2_tensor* x, const k2_tensor* norms, const k2_tensor* steps, int32_t alone,
                                      k2_tensor* out) try {
  K2_TRY(check_tensor("x", x, K2_BF16, 3));
  K2_TRY(check_tensor("norms", norms, K2_F32, 1));
  K2_TRY(check_tensor("steps", steps, K2_F32, 2));
  K2_TRY(check_tensor("out", out, K2_BF16, 3));
  const int64_t n = x->shape[0], rows = x->shape[1], columns = x->shape[2];
  if (out->shape[0] != n || out->shape[1] != rows || out->shape[2] != columns || norms->shape[0] != n)
    return fail(K2_BAD_SHAPE, "x, norms and out do not fit each other");
  if (steps->shape[0] < 1 || steps->shape[1] != 3) return fail(K2_BAD_SHAPE, "steps are not one or more rows of three");
  const auto contiguous = [](const k2_tensor* t) {
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= 0; step *= t->shape[i--])
      if (t->shape[i] > 1 && t->strides[i] != step) return false;
    return true;
  };
  if (!contiguous(norms) || !contiguous(steps) || (n && rows && columns && (!contiguous(x) || !contiguous(out))))
    return fail(K2_BAD_STRIDE, "x, norms, steps and out must be contiguous");
  const Kernels& table = kernels();
  if (!table.muon) return fail(K2_NO_ISA, "the instruction set %s has no Newton-Schulz steps", table.name);
  if (!n || !rows || !columns) return K2_OK;
  const int64_t shorter = std::min(rows, columns), longer = std::max(rows, columns);
  if (!fits({shorter + kSide, longer + kSide, 8})) return fail(K2_BAD_SHAPE, "a matrix is larger than any memory");
  const Steps s(table.muon, rows, columns, static_cast<const float*>(steps->data), steps->shape[0]);
  const auto matrix = [&](int64_t i, uint16_t* room, const auto& each) {
    const int64_t at = i * rows * columns;
    const float norm = static_cast<const float*>(norms->data)[i];
    iterate(s, static_cast<const uint16_t*>(x->data) + at, norm, static_cast<uint16_t*>(out->data) + at, room, each);
  };
  const int64_t threads = alone ? 1 : pool_threads(), whole = shorter < kDivided ? n : n / threads * threads;
  std::atomic<bool> good{true};
  parallel_if(threads > 1 && n * shorter * shorter * longer > kAlone, whole, [&](int64_t i, int) {
    auto* room = static_cast<uint16_t*>(thread_scratch(0, s.bytes()));
    if (!room) return good.store(false);
    matrix(i, room, [](int64_t items, const auto& work) {
      for (int64_t item = 0; item < items; item++) work(item);
    });
  });
  auto* room = whole < n ? static_cast<uint16_t*>(thread_scratch(0, s.bytes())) : nullptr;
  if (!good || (whole < n && !room)) return fail(K2_NO_MEMORY, "no memory for a thread's matrix");
  for (int64_t i = whole; i < n; i++)
    matrix(i, room, [](int64_t items, const auto& work) {
      parallel(items, [&](int64_t item, int) { work(item); });
    });
  return K2_OK;
} K2_CATCH
