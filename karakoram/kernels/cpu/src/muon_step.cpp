// A whole Muon step over matrices of many weights. A matrix goes from its gradient to its weight in one core's cache, and one
// round of the pool serves all: torch's products take a pass over memory for each operation, and its OpenMP threads look for
// work for milliseconds after each, on the cores where ours are to work. The largest come first, so that none is waited for;
// one that is more than a thread's share is divided among all.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <vector>

#include "dispatch.hpp"
#include "errors.hpp"
#include "formats/bf16.hpp"
#include "newton_schulz.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

constexpr int64_t kPiece = 1 << 14;             // numbers of one part of a divided matrix
constexpr float kSafeNorm[] = {1e-10f, 1e10f};  // between them squares neither vanish nor overflow

struct Item {
  const uint8_t* gradient;
  bool wide;  // the gradient is f32, not bf16
  float *buffer, *weight;
  int64_t view, rows, columns;

  int64_t numbers() const { return rows * columns; }
  double cost() const { return double(numbers()) * double(std::min(rows, columns) + 256); }  // of the passes: 256 a number
};

// Times 2^-e, with the largest magnitude in [2^e, 2^(e + 1)): quotients by the norm keep their bits.
void rescale(uint16_t* x, int64_t n) {
  int largest = 0;
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, x[i] & 0x7FFF);
  const float by = bf16_to_float(static_cast<uint16_t>((254 - std::clamp(largest >> 7, 1, 253)) << 7));
  for (int64_t i = 0; i < n; i++) x[i] = bf16_from_float(bf16_to_float(x[i]) * by);
}

// As torch.optim.Muon rounds it; never 0.
float norm_of(const Muon& k, uint16_t* x, int64_t n, float shrink) {
  float norm = bf16_to_float(bf16_from_float(k.norm(x, n)));
  if (!(norm > kSafeNorm[0] && norm < kSafeNorm[1])) {
    rescale(x, n);
    norm = bf16_to_float(bf16_from_float(k.norm(x, n)));
  }
  if (shrink != 1) norm = bf16_to_float(bf16_from_float(norm * shrink));
  return norm < FLT_MIN ? FLT_MIN : norm;
}

// Fetches the numbers of the matrix that a thread probably takes next, a few lines after each part of the products: they are
// bound by arithmetic, the passes by memory. 64 matrices of 128 × 256: 12.8 to 12.1 ms on one thread, 7.5 to 6.2 on two.
class Ahead {
 public:
  Ahead(const Item* next, int64_t parts) {
    if (!next) return;
    const int64_t n = next->numbers();
    const void* at[] = {next->gradient, next->buffer, next->weight};
    const int64_t bytes[] = {n * (next->wide ? 4 : 2), 4 * n, 4 * n};
    for (int i = 0; i < 3; i++) {
      at_[i] = static_cast<const char*>(at[i]);
      end_[i] = at_[i] + bytes[i];
      lines_ += bytes[i] / 64 + 1;
    }
    lines_ = lines_ / std::max<int64_t>(parts, 1) + 1;
  }

  void some() {
    for (int64_t left = lines_; left > 0; left--) {
      while (which_ < 3 && at_[which_] >= end_[which_]) which_++;
      if (which_ == 3) return;
      __builtin_prefetch(at_[which_], 1, 2);
      at_[which_] += 64;
    }
  }

 private:
  const char *at_[3] = {}, *end_[3] = {};
  int64_t lines_ = 0;
  int which_ = 0;
};

struct Step {
  const Muon& k;
  const k2_muon_rule& rule;
  const float *abc, *by;
  int64_t steps;

  static size_t direction_bytes(const Item& item) { return static_cast<size_t>((2 * item.numbers() + 63) / 64 * 64); }

  // Of its products, about.
  int64_t parts(const Item& item) const {
    const int64_t shorter = std::min(item.rows, item.columns), longer = std::max(item.rows, item.columns);
    return steps * (2 * shorter + longer / kTogether) / kSide;
  }

  // Of one matrix -> Σ O²; negative where there is no memory. `each(items, work)` calls work(item) for all, in any order.
  template <class Each>
  double take(const Item& item, const Each& each) const {
    const Steps s(&k, item.rows, item.columns, abc, steps);
    auto* room = static_cast<uint8_t*>(thread_scratch(0, direction_bytes(item) + s.bytes()));
    if (!room) return -1;
    auto* direction = reinterpret_cast<uint16_t*>(room);
    const int64_t n = item.numbers(), pieces = (n + kPiece - 1) / kPiece;
    const MomentumRule momentum{rule.momentum, rule.new_share, rule.scale, rule.nesterov != 0};
    each(pieces, [&](int64_t piece) {
      const int64_t at = piece * kPiece, count = std::min(kPiece, n - at);
      k.momentum(momentum, item.wide ? reinterpret_cast<const float*>(item.gradient) + at : nullptr,
                 item.wide ? nullptr : reinterpret_cast<const uint16_t*>(item.gradient) + at, count, item.buffer + at,
                 direction + at);
    });
    const float norm = norm_of(k, direction, n, rule.shrink);
    iterate(s, direction, norm, direction, reinterpret_cast<uint16_t*>(room + direction_bytes(item)), each);
    std::vector<float> squares(static_cast<size_t>(pieces));
    each(pieces, [&](int64_t piece) {
      const int64_t at = piece * kPiece, count = std::min(kPiece, n - at);
      squares[piece] = k.update(item.weight + at, direction + at, rule.keep, by[item.view], count);
    });
    double sum = 0;
    for (float one : squares) sum += one;
    return sum;
  }
};

// The matrices of one weight; their rows must follow each other in all three tensors.
k2_status add_items(int64_t view, const k2_tensor& g, const k2_tensor& m, const k2_tensor& w, std::vector<Item>* items) {
  const int dims = w.ndim;
  if (dims < 2 || dims > 4) return fail(K2_BAD_SHAPE, "weight %lld has %d dimensions, not 2 to 4", (long long)view, dims);
  const bool wide = g.dtype == K2_F32;
  K2_TRY(check_tensor("gradient", &g, wide ? K2_F32 : K2_BF16, dims));
  K2_TRY(check_tensor("buffer", &m, K2_F32, dims));
  K2_TRY(check_tensor("weight", &w, K2_F32, dims));
  const int64_t rows = w.shape[dims - 2], columns = w.shape[dims - 1];
  int64_t outer[2] = {1, 1}, step[3][2] = {};
  const k2_tensor* all[] = {&g, &m, &w};
  for (int t = 0; t < 3; t++) {
    for (int d = 0; d < dims; d++)
      if (all[t]->shape[d] != w.shape[d])
        return fail(K2_BAD_SHAPE, "gradient, buffer and weight %lld are not of one shape", (long long)view);
    if (rows > 1 && all[t]->strides[dims - 2] != columns)
      return fail(K2_BAD_STRIDE, "the matrices of weight %lld are not contiguous", (long long)view);
    for (int d = 0; d < dims - 2; d++) step[t][d + 4 - dims] = all[t]->strides[d];
  }
  for (int d = 0; d < dims - 2; d++) outer[d + 4 - dims] = w.shape[d];
  if (!fits({rows + kSide, columns + kSide, 16})) return fail(K2_BAD_SHAPE, "a matrix is larger than any memory");
  if (!rows || !columns) return K2_OK;
  for (int64_t i = 0; i < outer[0]; i++)
    for (int64_t j = 0; j < outer[1]; j++) {
      const auto at = [&](int t) { return i * step[t][0] + j * step[t][1]; };
      items->push_back({static_cast<const uint8_t*>(g.data) + (wide ? 4 : 2) * at(0), wide, static_cast<float*>(m.data) + at(1),
                        static_cast<float*>(w.data) + at(2), view, rows, columns});
    }
  return K2_OK;
}

}  // namespace

extern "C" k2_status k2_muon_step(const k2_muon_rule* rule, const k2_tensor* steps, int64_t count, const k2_tensor* gradients,
                                  const k2_tensor* buffers, const k2_tensor* weights, const float* by, int32_t alone,
                                  float* squares) try {
  K2_TRY(check_tensor("steps", steps, K2_F32, 2));
  if (!rule || count < 0 || (count && !(gradients && buffers && weights && by && squares)))
    return fail(K2_BAD_CALL, "the rule, a list or its places are missing");
  if (steps->shape[0] < 1 || steps->shape[1] != 3 || steps->strides[0] != 3)
    return fail(K2_BAD_SHAPE, "steps are not one or more rows of three");
  const Kernels& table = kernels();
  if (!table.muon) return fail(K2_NO_ISA, "the instruction set %s has no Muon", table.name);
  std::vector<Item> items;
  for (int64_t view = 0; view < count; view++)
    K2_TRY(add_items(view, gradients[view], buffers[view], weights[view], &items));
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
  double total = 0;
  for (const Item& item : items) total += item.cost();
  const int threads = alone ? 1 : pool_threads();
  const Step step{*table.muon, *rule, static_cast<const float*>(steps->data), by, steps->shape[0]};
  std::vector<double> sums(items.size());
  size_t divided = 0;  // the largest are
  const auto large = [&](const Item& item) {
    return threads > 1 && item.cost() * threads > total && std::min(item.rows, item.columns) >= kDivided;
  };
  for (; divided < items.size() && large(items[divided]); divided++)
    sums[divided] = step.take(items[divided], [](int64_t parts, const auto& work) {
      parallel(parts, [&](int64_t part, int) { work(part); });
    });
  parallel_if(threads > 1 && total > kAlone, static_cast<int64_t>(items.size() - divided), [&](int64_t i, int) {
    const size_t at = divided + static_cast<size_t>(i), next = at + static_cast<size_t>(threads);
    Ahead ahead(next < items.size() ? &items[next] : nullptr, step.parts(items[at]));
    sums[at] = step.take(items[at], [&](int64_t parts, const auto& work) {
      for (int64_t part = 0; part < parts; part++, ahead.some()) work(part);
    });
  });
  std::vector<double> of_view(static_cast<size_t>(count));
  for (size_t i = 0; i < items.size(); i++) {
    if (sums[i] < 0) return fail(K2_NO_MEMORY, "no memory for a thread's matrix");
    of_view[items[i].view] += sums[i];
  }
  std::transform(of_view.begin(), of_view.end(), squares, [](double sum) { return static_cast<float>(sum); });
  return K2_OK;
} K2_CATCH
