// Causal attention in training: every head of every document is one item, the longest first, since its time goes with the square
// of its tokens. Nobody keeps probabilities: the backward pass computes them anew, block by block, in the core's cache.
#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.hpp"
#include "errors.hpp"
#include "isa/causal/kernels.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

struct Span {
  int64_t row, from, to;
};

struct Call {
  const k2_tensor *q, *k, *v, *out, *stats;
  float scale;
  std::vector<Span> spans;

  HeadRows rows(const k2_tensor* x, const Span& span, int64_t head) const {
    const int64_t* step = x->strides;
    return {static_cast<uint16_t*>(x->data) + span.row * step[0] + head * step[1] + span.from * step[2], step[2]};
  }
  CausalHead head(const Span& span, int64_t i) const {
    CausalHead h{};
    h.tokens = span.to - span.from;
    h.width = q->shape[3], h.value_width = v->shape[3], h.scale = scale;
    h.q = rows(q, span, i), h.k = rows(k, span, i), h.v = rows(v, span, i), h.out = rows(out, span, i);
    h.stats = static_cast<float*>(stats->data) + span.row * stats->strides[0] + i * stats->strides[1] +
              span.from * stats->strides[2];
    h.stats_step = stats->strides[2];
    return h;
  }
};

k2_status same_shape(const char* name, const k2_tensor* x, const k2_tensor* as) {
  K2_TRY(check_tensor(name, x, K2_BF16, 4));
  for (int d = 0; d < 4; d++)
    if (x->shape[d] != as->shape[d]) return fail(K2_BAD_SHAPE, "%s has another shape than its counterpart", name);
  return K2_OK;
}

k2_status check(const k2_tensor* q, const k2_tensor* k, const k2_tensor* v, const k2_tensor* spans, float scale,
                const k2_tensor* stats, const k2_tensor* out, Call* call) {
  K2_TRY(check_tensor("q", q, K2_BF16, 4));
  K2_TRY(same_shape("k", k, q));
  K2_TRY(check_tensor("v", v, K2_BF16, 4));
  K2_TRY(same_shape("out", out, v));
  K2_TRY(check_tensor("stats", stats, K2_F32, 4));
  K2_TRY(check_tensor("spans", spans, K2_I64, 2));
  const int64_t* shape = q->shape;
  if (v->shape[0] != shape[0] || v->shape[1] != shape[1] || v->shape[2] != shape[2] || stats->shape[0] != shape[0] ||
      stats->shape[1] != shape[1] || stats->shape[2] != shape[2] || stats->shape[3] != 2)
    return fail(K2_BAD_SHAPE, "q, v and stats do not fit each other");
  if (shape[3] < 16 || shape[3] % 16 || v->shape[3] < 16 || v->shape[3] % 16)
    return fail(K2_BAD_SHAPE, "widths of %lld and %lld are not multiples of 16", (long long)shape[3], (long long)v->shape[3]);
  if (spans->shape[1] != 3 || spans->strides[0] != 3) return fail(K2_BAD_SHAPE, "spans are not rows of three");
  if (!fits({shape[2] + 32, shape[3] + v->shape[3] + 512, 32})) return fail(K2_BAD_SHAPE, "a head is larger than any memory");
  if (!kernels().causal) return fail(K2_NO_ISA, "the instruction set %s has no causal attention", kernels().name);
  const auto* at = static_cast<const int64_t*>(spans->data);
  *call = {q, k, v, out, stats, scale, {}};
  for (int64_t i = 0; i < spans->shape[0]; i++, at += 3) {
    if (at[0] < 0 || at[0] >= shape[0] || at[1] < 0 || at[2] > shape[2] || at[1] >= at[2])
      return fail(K2_BAD_ID, "span %lld, tokens %lld to %lld of row %lld, is none of %lld rows of %lld tokens", (long long)i,
                  (long long)at[1], (long long)at[2], (long long)at[0], (long long)shape[0], (long long)shape[2]);
    call->spans.push_back({at[0], at[1], at[2]});
  }
  std::stable_sort(call->spans.begin(), call->spans.end(),
                   [](const Span& a, const Span& b) { return a.to - a.from > b.to - b.from; });
  return K2_OK;
}

// Calls work(span's place, head) for all of them with room for each; false where there is no memory.
template <class Work>
bool each_head(const Call& call, int64_t (*bytes)(int64_t, int64_t, int64_t), bool alone, const Work& work) {
  const int64_t heads = call.q->shape[1];
  std::atomic<bool> good{true};
  const int64_t items = static_cast<int64_t>(call.spans.size()) * heads;
  parallel_if(!alone && pool_threads() > 1, items, [&](int64_t i, int) {
    const CausalHead h = call.head(call.spans[i / heads], i % heads);
    void* room = thread_scratch(0, static_cast<size_t>(bytes(h.tokens, h.width, h.value_width)));
    if (!room) return good.store(false);
    work(h, i / heads, i % heads, room);
  });
  return good;
}

}  // namespace

extern "C" int k2_causal_here(void) { return kernels().causal != nullptr; }

extern "C" k2_status k2_causal_forward(const k2_tensor* q, const k2_tensor* k, const k2_tensor* v, const k2_tensor* spans,
                                       float scale, int32_t alone, k2_tensor* stats, k2_tensor* largest, k2_tensor* out) try {
  Call call;
  K2_TRY(check(q, k, v, spans, scale, stats, out, &call));
  K2_TRY(check_tensor("largest", largest, K2_F32, 1));
  const int64_t heads = q->shape[1];
  if (largest->shape[0] != heads) return fail(K2_BAD_SHAPE, "largest is not of %lld heads", (long long)heads);
  std::vector<float> of_item(call.spans.size() * static_cast<size_t>(heads));
  const Causal& causal = *kernels().causal;
  if (!each_head(call, causal.forward_bytes, alone, [&](const CausalHead& h, int64_t span, int64_t head, void* room) {
        of_item[span * heads + head] = causal.forward(h, room);
      }))
    return fail(K2_NO_MEMORY, "no memory for a head's scores");
  auto* most = static_cast<float*>(largest->data);
  for (size_t i = 0; i < of_item.size(); i++)
    most[i % heads] = i < static_cast<size_t>(heads) ? of_item[i] : std::max(most[i % heads], of_item[i]);
  return K2_OK;
} K2_CATCH

extern "C" k2_status k2_causal_backward(const k2_tensor* q, const k2_tensor* k, const k2_tensor* v, const k2_tensor* spans,
                                        float scale, int32_t alone, const k2_tensor* stats, const k2_tensor* out,
                                        const k2_tensor* grad_out, k2_tensor* grad_q, k2_tensor* grad_k,
                                        k2_tensor* grad_v) try {
  Call call;
  K2_TRY(check(q, k, v, spans, scale, stats, out, &call));
  K2_TRY(same_shape("grad_out", grad_out, v));
  K2_TRY(same_shape("grad_q", grad_q, q));
  K2_TRY(same_shape("grad_k", grad_k, q));
  K2_TRY(same_shape("grad_v", grad_v, v));
  const Causal& causal = *kernels().causal;
  if (!each_head(call, causal.backward_bytes, alone, [&](CausalHead h, int64_t span, int64_t head, void* room) {
        const Span& here = call.spans[span];
        h.grad_out = call.rows(grad_out, here, head), h.grad_q = call.rows(grad_q, here, head);
        h.grad_k = call.rows(grad_k, here, head), h.grad_v = call.rows(grad_v, here, head);
        causal.backward(h, room);
      }))
    return fail(K2_NO_MEMORY, "no memory for a head's gradients");
  return K2_OK;
} K2_CATCH
