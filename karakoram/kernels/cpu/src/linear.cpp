// y = x · Wᵀ for a packed matrix, and SwiGLU for one set of rows.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "feed_forward.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

struct Free {
  void operator()(void* p) const { free(p); }
};
using Block = std::unique_ptr<void, Free>;

k2_status check_y(const k2_tensor* y, int64_t rows, int64_t columns) {
  if (!y || (y->dtype != K2_F32 && y->dtype != K2_BF16))
    return fail(K2_BAD_DTYPE, "y is %s, expected float32 or bfloat16", y ? dtype_name(y->dtype) : "missing");
  K2_TRY(check_tensor("y", y, y->dtype, 2));
  if (y->shape[0] != rows || y->shape[1] != columns)
    return fail(K2_BAD_SHAPE, "y is [%lld, %lld], expected [%lld, %lld]", static_cast<long long>(y->shape[0]),
                static_cast<long long>(y->shape[1]), static_cast<long long>(rows), static_cast<long long>(columns));
  return K2_OK;
}

void store(const Kernels& k, const float* from, int64_t n, const k2_tensor& y, int64_t row, int64_t column) {
  if (y.dtype == K2_F32)
    memcpy(static_cast<float*>(y.data) + row * y.strides[0] + column, from, static_cast<size_t>(n) * sizeof(float));
  else
    k.store_bf16(from, n, static_cast<uint16_t*>(y.data) + row * y.strides[0] + column);
}

bool two_panels(const Kernels& k, const Matrix& m, int64_t panel, const void* x, int64_t ldx, const k2_tensor& y) {
  const int count = panel + 1 < m.panels() ? 2 : 1;
  const int64_t rows = y.shape[0];
  float* out = static_cast<float*>(thread_scratch(1, static_cast<size_t>(rows * 32 * 4)));
  const Side sides[2] = {{&m, panel}, {&m, panel + 1}};
  if (!out || !multiply(k, rows, x, ldx, sides, count, out, 32)) return false;
  const int64_t left = m.outputs - panel * kPanel, columns = left < kPanel * count ? left : kPanel * count;
  for (int64_t r = 0; r < rows; r++) store(k, out + 32 * r, columns, y, r, panel * kPanel);
  return true;
}

}  // namespace

extern "C" {

k2_status k2_linear(const k2_tensor* x, const k2_tensor* weight, k2_tensor* y) try {
  Matrix m;
  K2_TRY(check_tensor("x", x, K2_BF16, 2));
  K2_TRY(as_matrix("weight", weight, &m));
  if (x->shape[1] != m.inputs)
    return fail(K2_BAD_SHAPE, "x has %lld columns, the weight %lld inputs", static_cast<long long>(x->shape[1]),
                static_cast<long long>(m.inputs));
  K2_TRY(check_y(y, x->shape[0], m.outputs));
  if (!x->shape[0]) return K2_OK;
  const Kernels& k = kernels();
  int64_t ldx = x->strides[0];
  const void* in = x->data;
  Block copy;
  const bool as_it_is = k.activation_bytes == 2 && m.inputs % kBlock == 0 && x->shape[0] <= kFewRows;
  if (!as_it_is) {
    ldx = row_stride(m.inputs);
    copy.reset(allocate(static_cast<size_t>(x->shape[0] * ldx * k.activation_bytes)));
    if (!copy) return fail(K2_NO_MEMORY, "no memory for %lld rows of activations", static_cast<long long>(x->shape[0]));
    load_rows(k, *x, nullptr, x->shape[0], copy.get(), ldx);
    in = copy.get();
  }
  std::atomic<bool> good{true};
  const int64_t each = panels_together(k, m, x->shape[0]);
  parallel_if(product_ns(m, x->shape[0]) > kAloneNs, (m.panels() + each - 1) / each, [&](int64_t item, int) {
    for (int64_t p = item * each; p < (item + 1) * each && p < m.panels(); p += 2)
      if (!two_panels(k, m, p, in, ldx, *y)) good = false;
  });
  return good ? K2_OK : fail(K2_NO_MEMORY, "no memory for a thread's tile");
} K2_CATCH

k2_status k2_linear_by_head(const k2_tensor* x, const k2_tensor* weight, int64_t first, k2_tensor* y) try {
  Matrix m;
  K2_TRY(check_tensor("x", x, K2_BF16, 3));
  K2_TRY(as_matrix("weight", weight, &m));
  K2_TRY(check_tensor("y", y, K2_BF16, 3));
  const int64_t rows = x->shape[0], heads = x->shape[1], outputs = y->shape[2];
  if (heads < 1 || x->shape[2] != m.inputs || m.outputs % heads || y->shape[0] != rows || y->shape[1] != heads)
    return fail(K2_BAD_SHAPE, "x, weight and y do not fit each other head by head");
  const int64_t each = m.outputs / heads;
  if (each % kPanel || first % kPanel || outputs % kPanel || first < 0 || outputs < 1 || first > each || outputs > each - first)
    return fail(K2_BAD_SHAPE, "rows from %lld on, %lld of them, of a head of %lld are no whole panels",
                static_cast<long long>(first), static_cast<long long>(outputs), static_cast<long long>(each));
  if (!rows) return K2_OK;
  const Kernels& k = kernels();
  const int64_t ldx = round_up(m.inputs, kBlock), a = k.activation_bytes;
  if (!fits({rows, heads, ldx, a})) return fail(K2_BAD_SHAPE, "x is larger than any memory");
  Block in(allocate(static_cast<size_t>(rows * heads * ldx * a)));
  if (!in) return fail(K2_NO_MEMORY, "no memory for %lld rows of activations", static_cast<long long>(rows));
  for (int64_t r = 0; r < rows; r++) {
    const uint16_t* row = static_cast<const uint16_t*>(x->data) + r * x->strides[0];
    const k2_tensor of_row{const_cast<uint16_t*>(row), K2_BF16, 2, {heads, m.inputs}, {x->strides[1], 1}};
    load_rows(k, of_row, nullptr, heads, static_cast<char*>(in.get()) + r * heads * ldx * a, ldx);
  }
  const int64_t pairs = (outputs / kPanel + 1) / 2;
  std::atomic<bool> good{true};
  parallel_if(product_ns(m, rows) * outputs / each > kAloneNs, heads * pairs, [&](int64_t item, int) {
    const int64_t h = item / pairs, panel = item % pairs * 2, at = (h * each + first) / kPanel + panel;
    const int count = panel + 1 < outputs / kPanel ? 2 : 1;
    float* out = static_cast<float*>(thread_scratch(1, static_cast<size_t>(rows * 32 * 4)));
    const Side sides[2] = {{&m, at}, {&m, at + 1}};
    if (!out || !multiply(k, rows, static_cast<char*>(in.get()) + h * ldx * a, heads * ldx, sides, count, out, 32)) {
      good = false;
      return;
    }
    for (int64_t r = 0; r < rows; r++)
      k.store_bf16(out + 32 * r, kPanel * count,
                   static_cast<uint16_t*>(y->data) + r * y->strides[0] + h * y->strides[1] + panel * kPanel);
  });
  return good ? K2_OK : fail(K2_NO_MEMORY, "no memory for a thread's tile");
} K2_CATCH

k2_status k2_mlp(const k2_tensor* x, const k2_tensor* gate, const k2_tensor* up, const k2_tensor* down, k2_tensor* y) try {
  FeedForward job;
  K2_TRY(check_tensor("x", x, K2_BF16, 2));
  K2_TRY(as_matrix("gate", gate, &job.gate));
  K2_TRY(as_matrix("up", up, &job.up));
  K2_TRY(as_matrix("down", down, &job.down));
  if (job.gate.inputs != x->shape[1] || job.up.inputs != x->shape[1] || job.up.outputs != job.gate.outputs ||
      job.down.inputs != job.gate.outputs || job.gate.dtype != job.up.dtype)
    return fail(K2_BAD_SHAPE, "gate, up and down do not fit each other or x");
  K2_TRY(check_y(y, x->shape[0], job.down.outputs));
  const Kernels& k = kernels();
  job.rows = x->shape[0];
  if (!job.rows) return K2_OK;
  if (!fits({job.rows, job.gate.outputs + 2 * kBlock, 4}))
    return fail(K2_BAD_SHAPE, "gate's results are larger than any memory");
  job.ldx = row_stride(x->shape[1]);
  job.ldo = job.down.outputs;
  Block in(allocate(static_cast<size_t>(job.rows * job.ldx * k.activation_bytes)));
  Block h(allocate(static_cast<size_t>(job.rows * job.ldh() * k.activation_bytes)));
  Block out(allocate(static_cast<size_t>(job.rows * job.ldo * 4)));
  if (!in || !h || !out) return fail(K2_NO_MEMORY, "no memory for %lld rows", static_cast<long long>(job.rows));
  memset(h.get(), 0, static_cast<size_t>(job.rows * job.ldh() * k.activation_bytes));
  load_rows(k, *x, nullptr, job.rows, in.get(), job.ldx);
  job.x = in.get(), job.h = h.get(), job.out = static_cast<float*>(out.get());
  if (!run(k, {job})) return fail(K2_NO_MEMORY, "no memory for a thread's tile");
  for (int64_t r = 0; r < job.rows; r++) store(k, job.out + r * job.ldo, job.ldo, *y, r, 0);
  return K2_OK;
} K2_CATCH

k2_status k2_rms_norm(const k2_tensor* x, const k2_tensor* weight, float eps, k2_tensor* y) try {
  K2_TRY(check_tensor("x", x, K2_BF16, 2));
  K2_TRY(check_tensor("weight", weight, K2_BF16, 1));
  K2_TRY(check_tensor("y", y, K2_BF16, 2));
  if (weight->shape[0] < 1 || weight->shape[0] != x->shape[1] || y->shape[0] != x->shape[0] || y->shape[1] != x->shape[1])
    return fail(K2_BAD_SHAPE, "x, weight and y do not fit each other");
  const Kernels& k = kernels();
  const auto one = [&](int64_t r, int) {
    k.rms_norm(static_cast<const uint16_t*>(x->data) + r * x->strides[0], static_cast<const uint16_t*>(weight->data),
               x->shape[1], eps, static_cast<uint16_t*>(y->data) + r * y->strides[0]);
  };
  parallel_if(x->shape[0] * x->shape[1] > 8 * kAloneNs, x->shape[0], one);
  return K2_OK;
} K2_CATCH
}
