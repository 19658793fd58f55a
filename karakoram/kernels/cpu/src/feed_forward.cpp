// Two rounds with a barrier between them: all panels of gate and up, then all of down. An item of work is some panels of one
// job: of gate and up beside each other, so that silu · up happens while both are in the cache, or of down, two at a time.
#include "feed_forward.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "worker_pool.hpp"

namespace k2 {

namespace {

struct Items {  // items of all jobs in one row of numbers
  std::vector<int64_t> first;

  template <class Count>
  Items(const std::vector<FeedForward>& jobs, Count count) {
    first.push_back(0);
    for (const FeedForward& job : jobs) first.push_back(first.back() + (job.rows ? count(job) : 0));
  }
  int64_t total() const { return first.back(); }
  size_t job_of(int64_t item) const {
    return static_cast<size_t>(std::upper_bound(first.begin(), first.end(), item) - first.begin()) - 1;
  }
};

bool gate_and_up(const Kernels& k, const FeedForward& job, int64_t panel) {
  float* both = static_cast<float*>(thread_scratch(1, static_cast<size_t>(job.rows * 32 * 4)));
  if (!both) return false;
  const Side sides[2] = {{&job.gate, panel}, {&job.up, panel}};
  if (!multiply(k, job.rows, job.x, job.ldx, sides, 2, both, 32)) return false;
  char* h = static_cast<char*>(job.h) + panel * kPanel * k.activation_bytes;
  for (int64_t r = 0; r < job.rows; r++)
    k.silu_mul(both + 32 * r, both + 32 * r + 16, kPanel, h + r * job.ldh() * k.activation_bytes);
  return true;
}

bool down(const Kernels& k, const FeedForward& job, int64_t panel) {
  const int count = panel + 1 < job.down.panels() ? 2 : 1;
  float* y = static_cast<float*>(thread_scratch(1, static_cast<size_t>(job.rows * 32 * 4)));
  if (!y) return false;
  const Side sides[2] = {{&job.down, panel}, {&job.down, panel + 1}};
  if (!multiply(k, job.rows, job.h, job.ldh(), sides, count, y, 32)) return false;
  const int64_t columns = std::min<int64_t>(kPanel * count, job.down.outputs - kPanel * panel);
  for (int64_t r = 0; r < job.rows; r++)
    memcpy(job.out + (job.place ? job.place[r] : r) * job.ldo + panel * kPanel, y + 32 * r,
           static_cast<size_t>(columns) * sizeof(float));
  return true;
}

}  // namespace

bool run(const Kernels& k, const std::vector<FeedForward>& jobs) {
  std::atomic<bool> good{true};
  const auto together = [&](const FeedForward& job, const Matrix& m) { return panels_together(k, m, job.rows); };
  const auto steps = [](int64_t panels, int64_t each) { return (panels + each - 1) / each; };
  const Items wide(jobs, [&](const FeedForward& job) { return steps(job.gate.panels(), together(job, job.gate)); });
  int64_t ns = 0;  // of down; gate and up take twice that
  for (const FeedForward& job : jobs) ns += job.rows ? product_ns(job.down, job.rows) : 0;
  parallel_if(2 * ns > kAloneNs, wide.total(), [&](int64_t item, int) {
    const size_t j = wide.job_of(item);
    const int64_t each = together(jobs[j], jobs[j].gate), first = (item - wide.first[j]) * each;
    for (int64_t p = first; p < std::min(first + each, jobs[j].gate.panels()); p++)
      if (!gate_and_up(k, jobs[j], p)) good = false;
  });
  const Items narrow(jobs, [&](const FeedForward& job) { return steps(job.down.panels(), together(job, job.down)); });
  parallel_if(ns > kAloneNs, narrow.total(), [&](int64_t item, int) {
    const size_t j = narrow.job_of(item);
    const int64_t each = together(jobs[j], jobs[j].down), first = (item - narrow.first[j]) * each;
    for (int64_t p = first; p < std::min(first + each, jobs[j].down.panels()); p += 2)
      if (!down(k, jobs[j], p)) good = false;
  });
  return good;
}

void load_rows(const Kernels& k, const k2_tensor& x, const int64_t* from, int64_t rows, void* out, int64_t ldo) {
  const int64_t width = x.shape[1], tail = ldo - width;
  const auto one = [&](int64_t r, int) {
    char* place = static_cast<char*>(out) + r * ldo * k.activation_bytes;
    k.load(static_cast<const uint16_t*>(x.data) + (from ? from[r] : r) * x.strides[0], width, place);
    if (tail) memset(place + width * k.activation_bytes, 0, static_cast<size_t>(tail * k.activation_bytes));
  };
  parallel_if(rows * width > 16 * kAloneNs, rows, one);
}

void* allocate(size_t bytes) { return aligned_alloc(64, (bytes + 64) / 64 * 64); }

}  // namespace k2
