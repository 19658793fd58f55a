// Newton-Schulz steps X ← a·X + (b·G + c·G²)·X, G = X·Xᵀ, on a stack of matrices: each by one thread, all of it in that
// core's cache. G and the polynomial are symmetric, half of them is computed: 3·A²B + A³ multiplications a step instead of
// 4·A²B + 2·A³. Of a matrix that stands (more rows than columns) the transpose is computed: its panels of rows are those of
// the other's columns. Matrices left over when every thread has had as many are divided: a step is three rounds of the pool.
#include <algorithm>
#include <atomic>

#include "dispatch.hpp"
#include "errors.hpp"
#include "isa/muon/kernels.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

constexpr int kTogether = 3;       // panels of columns in one call
constexpr int64_t kDivided = 128;  // rows of a matrix from which on its parts are worth three rounds of the pool a step
constexpr int64_t kAlone = 100000; // multiplications of A²B in a call, some 8 µs of all steps: less is done by one thread

struct Steps {
  const Muon* k;
  int64_t rows, columns;  // as they lie in memory
  bool stands;
  int64_t side, width;    // of X, lying and padded
  const float* abc;
  int64_t count;

  size_t bytes() const { return static_cast<size_t>(2 * (3 * side * width + 2 * side * side)); }
};

// Panels of columns by threes; of four left over two and two, for one alone keeps a third of the sums in registers.
int64_t groups_of(int64_t panels) { return (panels + kTogether - 1) / kTogether; }
int64_t group_begin(int64_t group, int64_t panels) {
  const bool two_and_two = panels % kTogether == 1 && panels > 1 && group == panels / kTogether;
  return std::min(group * kTogether - two_and_two, panels);
}

// All steps of one matrix over its norm; `each(items, work)` calls work(item) for all items, in any order.
template <class Each>
void iterate(const Steps& s, const uint16_t* x, float norm, uint16_t* out, uint16_t* room, const Each& each) {
  const int64_t panels = s.width / kSide, rows = s.side / kSide;
  uint16_t *before = room, *after = before + s.side * s.width, *by_rows = after + s.side * s.width;
  uint16_t *gram = by_rows + s.side * s.width, *mix = gram + s.side * s.side;
  each(s.stands ? rows : panels, [&](int64_t p) {
    s.k->load(x, norm, s.rows, s.columns, p, s.stands ? by_rows : before, s.stands ? before : by_rows);
  });
  for (int64_t step = 0; step < s.count; step++) {
    const float *abc = s.abc + 3 * step, a = abc[0];
    const bool last = step + 1 == s.count;
    each(rows, [&](int64_t i) { s.k->gram(by_rows, s.side, s.width, i, gram); });
    each(rows, [&](int64_t i) { s.k->mix(gram, s.side, abc[1], abc[2], i, mix); });
    each(groups_of(panels), [&](int64_t group) {
      const int64_t from = group_begin(group, panels), to = group_begin(group + 1, panels);
      s.k->apply(mix, before, s.side, s.width, a, from, static_cast<int>(to - from), after,
                 last && !s.stands ? nullptr : by_rows);
      for (int64_t p = from; last && !s.stands && p < to; p++) s.k->store(after, s.rows, s.columns, p, out);
    });
    std::swap(before, after);
  }
  if (s.stands) each(rows, [&](int64_t p) { s.k->store(by_rows, s.rows, s.columns, p, out); });
}

}  // namespace

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
  const auto padded = [](int64_t size) { return (size + kSide - 1) / kSide * kSide; };
  const int64_t shorter = std::min(rows, columns), longer = std::max(rows, columns);
  const Steps s{table.muon, rows, columns, rows > columns, padded(shorter), padded(longer),
                static_cast<const float*>(steps->data), steps->shape[0]};
  if (!fits({s.side, s.width, 8}) || !fits({s.side, s.side, 8})) return fail(K2_BAD_SHAPE, "a matrix is larger than any memory");
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
