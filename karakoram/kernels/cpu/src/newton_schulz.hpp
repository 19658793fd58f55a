// Newton-Schulz steps X ← a·X + (b·G + c·G²)·X, G = X·Xᵀ, on a stack of matrices: each by one thread, all of it in that
// core's cache. G and the polynomial are symmetric, half of them is computed: 3·A²B + A³ multiplications a step instead of
// 4·A²B + 2·A³. Of a matrix that stands (more rows than columns) the transpose is computed: its panels of rows are those of
// the other's columns. Matrices left over when every thread has had as many are divided: a step is three rounds of the pool.
#pragma once
#include <algorithm>

#include "isa/muon/kernels.hpp"

namespace k2 {

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

  Steps(const Muon* kernels, int64_t rows, int64_t columns, const float* abc, int64_t count)
      : k(kernels), rows(rows), columns(columns), stands(rows > columns), side(padded(std::min(rows, columns))),
        width(padded(std::max(rows, columns))), abc(abc), count(count) {}

  static int64_t padded(int64_t size) { return (size + kSide - 1) / kSide * kSide; }
  size_t bytes() const { return static_cast<size_t>(2 * (3 * side * width + 2 * side * side)); }
};

// Panels of columns by threes; of four left over two and two, for one alone keeps a third of the sums in registers.
inline int64_t groups_of(int64_t panels) { return (panels + kTogether - 1) / kTogether; }
inline int64_t group_begin(int64_t group, int64_t panels) {
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

}  // namespace k2
