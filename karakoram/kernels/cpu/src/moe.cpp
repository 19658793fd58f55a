// The routed experts of a layer. Tokens are sorted by expert; every expert multiplies its own rows; each (token, slot) has a
// partial result of its own, and the partials are summed in the order of the slots once all are there. So the sum does not
// depend on the order in which experts arrive, on their number per call, or on the number of threads.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "feed_forward.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

using Block = std::unique_ptr<void, void (*)(void*)>;

struct Shared {  // the shared experts' job for all tokens, and its memory
  FeedForward job;
  Block in{nullptr, free}, h{nullptr, free}, out{nullptr, free};
};

}  // namespace

struct k2_moe {
  int64_t tokens, slots, hidden, experts, intermediate;
  int32_t dtype;                  // of the experts' weights
  std::vector<int64_t> first;     // [experts + 1]: an expert's rows among the sorted ones
  std::vector<int64_t> token;     // [rows] token of a sorted row
  std::vector<int64_t> place;     // [rows] token · slots + slot
  std::vector<char> done;         // [experts]
  std::vector<float> weight;      // [tokens · slots]
  k2_tensor x;
  void *in = nullptr, *h = nullptr;
  float* partial = nullptr;       // [tokens · slots, hidden]
  const Kernels* kernels = nullptr;
  Shared beside;                  // computed by k2_moe_shared, or not at all

  int64_t ldx() const { return row_stride(hidden); }
  int64_t ldh() const { return row_stride(intermediate); }
  int64_t rows() const { return tokens * slots; }
  ~k2_moe() {
    free(in);
    free(h);
    free(partial);
  }
};

namespace {

int64_t id_at(const k2_tensor& ids, int64_t t, int64_t s) {
  const int64_t place = t * ids.strides[0] + s;
  return ids.dtype == K2_I64 ? static_cast<const int64_t*>(ids.data)[place] : static_cast<const int32_t*>(ids.data)[place];
}

k2_status check_routing(const k2_tensor* x, const k2_tensor* ids, const k2_tensor* weights, int64_t experts) {
  K2_TRY(check_tensor("x", x, K2_BF16, 2));
  if (!ids || (ids->dtype != K2_I32 && ids->dtype != K2_I64))
    return fail(K2_BAD_DTYPE, "ids is %s, expected int64 or int32", ids ? dtype_name(ids->dtype) : "missing");
  K2_TRY(check_tensor("ids", ids, ids->dtype, 2));
  K2_TRY(check_tensor("weights", weights, K2_F32, 2));
  if (ids->shape[0] != x->shape[0] || weights->shape[0] != x->shape[0] || ids->shape[1] != weights->shape[1])
    return fail(K2_BAD_SHAPE, "x, ids and weights are of %lld, %lld and %lld tokens, %lld and %lld slots",
                static_cast<long long>(x->shape[0]), static_cast<long long>(ids->shape[0]),
                static_cast<long long>(weights->shape[0]), static_cast<long long>(ids->shape[1]),
                static_cast<long long>(weights->shape[1]));
  if (x->shape[1] < 1 || experts < 1 || ids->shape[1] < 1)
    return fail(K2_BAD_SHAPE, "no hidden size, no expert or no slot");
  for (int64_t t = 0; t < ids->shape[0]; t++)
    for (int64_t s = 0; s < ids->shape[1]; s++) {
      const int64_t id = id_at(*ids, t, s);
      if (id < 0 || id >= experts)
        return fail(K2_BAD_ID, "token %lld chooses expert %lld of %lld", static_cast<long long>(t),
                    static_cast<long long>(id), static_cast<long long>(experts));
    }
  return K2_OK;
}

void sort_by_expert(k2_moe& m, const k2_tensor& ids) {
  m.first.assign(m.experts + 1, 0);
  for (int64_t t = 0; t < m.tokens; t++)
    for (int64_t s = 0; s < m.slots; s++) m.first[id_at(ids, t, s) + 1]++;
  for (int64_t e = 0; e < m.experts; e++) m.first[e + 1] += m.first[e];
  std::vector<int64_t> next(m.first.begin(), m.first.end() - 1);
  m.token.resize(m.rows());
  m.place.resize(m.rows());
  for (int64_t t = 0; t < m.tokens; t++)
    for (int64_t s = 0; s < m.slots; s++) {
      const int64_t row = next[id_at(ids, t, s)]++;
      m.token[row] = t;
      m.place[row] = t * m.slots + s;
    }
}

FeedForward expert_job(const k2_moe& m, int64_t expert, const void* record) {
  const uint8_t* data = static_cast<const uint8_t*>(record);
  const int64_t wide = round_up(packed_bytes(m.dtype, m.intermediate, m.hidden), 64), first = m.first[expert];
  FeedForward job;
  job.gate = Matrix{data, m.dtype, m.intermediate, m.hidden};
  job.up = Matrix{data + wide, m.dtype, m.intermediate, m.hidden};
  job.down = Matrix{data + 2 * wide, m.dtype, m.hidden, m.intermediate};
  job.rows = m.first[expert + 1] - first;
  job.ldx = m.ldx();
  job.x = static_cast<const char*>(m.in) + first * job.ldx * m.kernels->activation_bytes;
  job.h = static_cast<char*>(m.h) + first * m.ldh() * m.kernels->activation_bytes;
  job.out = m.partial;
  job.ldo = m.hidden;
  job.place = m.place.data() + first;
  return job;
}

k2_status prepare(const k2_moe& m, const k2_tensor* shared, Shared* s) {
  FeedForward& job = s->job;
  K2_TRY(as_matrix("the shared gate", &shared[0], &job.gate));
  K2_TRY(as_matrix("the shared up", &shared[1], &job.up));
  K2_TRY(as_matrix("the shared down", &shared[2], &job.down));
  if (job.gate.inputs != m.hidden || job.up.inputs != m.hidden || job.up.outputs != job.gate.outputs ||
      job.down.inputs != job.gate.outputs || job.down.outputs != m.hidden || job.gate.dtype != job.up.dtype)
    return fail(K2_BAD_SHAPE, "the shared experts' gate, up and down do not fit each other or x");
  const Kernels& k = *m.kernels;
  job.rows = m.tokens;
  job.ldx = m.ldx();
  job.ldo = m.hidden;
  s->in.reset(allocate(static_cast<size_t>(m.tokens * job.ldx * k.activation_bytes)));
  s->h.reset(allocate(static_cast<size_t>(m.tokens * job.ldh() * k.activation_bytes)));
  s->out.reset(allocate(static_cast<size_t>(m.tokens * m.hidden) * sizeof(float)));
  if (!s->in || !s->h || !s->out) return fail(K2_NO_MEMORY, "no memory for the shared experts");
  memset(s->h.get(), 0, static_cast<size_t>(m.tokens * job.ldh() * k.activation_bytes));
  load_rows(k, m.x, nullptr, m.tokens, s->in.get(), job.ldx);
  job.x = s->in.get(), job.h = s->h.get(), job.out = static_cast<float*>(s->out.get());
  return K2_OK;
}

void sum_slots(const k2_moe& m, const float* shared, k2_tensor& y) {
  constexpr int64_t kColumns = 1024;
  const int64_t pieces = (m.hidden + kColumns - 1) / kColumns;
  const auto one = [&](int64_t item, int) {
    const int64_t t = item / pieces, from = item % pieces * kColumns;
    const int64_t n = m.hidden - from < kColumns ? m.hidden - from : kColumns;
    alignas(64) float sum[kColumns];
    for (int64_t s = 0; s < m.slots; s++)
      m.kernels->axpy(m.partial + (t * m.slots + s) * m.hidden + from, m.weight[t * m.slots + s], n, sum, s > 0);
    if (shared) m.kernels->axpy(shared + t * m.hidden + from, 1.0f, n, sum, true);
    const int64_t place = t * y.strides[0] + from;
    if (y.dtype == K2_F32)
      memcpy(static_cast<float*>(y.data) + place, sum, static_cast<size_t>(n) * 4);
    else
      m.kernels->store_bf16(sum, n, static_cast<uint16_t*>(y.data) + place);
  };
  parallel_if(m.rows() * m.hidden > 8 * kAloneNs, m.tokens * pieces, one);
}

// The job of an expert that has tokens and was not given before.
k2_status add_expert(const k2_moe& m, int64_t e, const void* record, std::vector<FeedForward>* jobs, std::vector<char>* done) {
  if (e < 0 || e >= m.experts)
    return fail(K2_BAD_ID, "expert %lld of %lld", static_cast<long long>(e), static_cast<long long>(m.experts));
  if (m.first[e] == m.first[e + 1] || (*done)[e]) return K2_OK;  // the second time, also within a call, is passed over
  if (!record) return fail(K2_BAD_CALL, "expert %lld has tokens but no record", static_cast<long long>(e));
  if (reinterpret_cast<uintptr_t>(record) % 64)
    return fail(K2_BAD_ALIGNMENT, "the record of expert %lld is not aligned to 64 bytes", static_cast<long long>(e));
  jobs->push_back(expert_job(m, e, record));
  (*done)[e] = 1;
  return K2_OK;
}

k2_status check_result(const k2_moe& m, const k2_tensor* y) {
  if (!y || (y->dtype != K2_F32 && y->dtype != K2_BF16))
    return fail(K2_BAD_DTYPE, "y is %s, expected float32 or bfloat16", y ? dtype_name(y->dtype) : "missing");
  K2_TRY(check_tensor("y", y, y->dtype, 2));
  if (y->shape[0] != m.tokens || y->shape[1] != m.hidden)
    return fail(K2_BAD_SHAPE, "y is [%lld, %lld], expected [%lld, %lld]", static_cast<long long>(y->shape[0]),
                static_cast<long long>(y->shape[1]), static_cast<long long>(m.tokens), static_cast<long long>(m.hidden));
  for (int64_t e = 0; e < m.experts; e++)
    if (!m.done[e] && m.first[e + 1] > m.first[e])
      return fail(K2_BAD_CALL, "expert %lld has %lld tokens and was never given", static_cast<long long>(e),
                  static_cast<long long>(m.first[e + 1] - m.first[e]));
  return K2_OK;
}

}  // namespace

extern "C" {

k2_status k2_moe_begin(const k2_tensor* x, const k2_tensor* ids, const k2_tensor* weights, int64_t experts,
                       int64_t intermediate, int32_t dtype, k2_moe** handle) try {
  *handle = nullptr;
  K2_TRY(check_routing(x, ids, weights, experts));
  if (intermediate < 1) return fail(K2_BAD_SHAPE, "experts of width %lld", static_cast<long long>(intermediate));
  if (dtype < K2_INT4_PANELS || dtype > K2_FP8_PANELS)
    return fail(K2_BAD_DTYPE, "the experts are %s, expected packed panels", dtype_name(dtype));
  if (packed_bytes(dtype, intermediate, x->shape[1]) < 0 || !fits({experts, 8}) ||
      !fits({x->shape[0], ids->shape[1], x->shape[1] + intermediate + 4 * kBlock, 4}))
    return fail(K2_BAD_SHAPE, "so many experts, or of such a width, are larger than any memory");
  std::unique_ptr<k2_moe> m(new (std::nothrow) k2_moe);
  if (!m) return fail(K2_NO_MEMORY, "no memory for a layer's experts");
  m->tokens = x->shape[0], m->hidden = x->shape[1], m->slots = ids->shape[1];
  m->experts = experts, m->intermediate = intermediate, m->dtype = dtype;
  m->x = *x;
  m->kernels = &kernels();
  m->done.assign(experts, 0);
  m->weight.resize(m->rows());
  for (int64_t t = 0; t < m->tokens; t++)
    for (int64_t s = 0; s < m->slots; s++)
      m->weight[t * m->slots + s] = static_cast<const float*>(weights->data)[t * weights->strides[0] + s];
  sort_by_expert(*m, *ids);
  const size_t activation = m->kernels->activation_bytes;
  m->in = allocate(m->rows() * m->ldx() * activation);
  m->h = allocate(m->rows() * m->ldh() * activation);
  m->partial = static_cast<float*>(allocate(m->rows() * m->hidden * sizeof(float)));
  if (!m->in || !m->h || !m->partial)
    return fail(K2_NO_MEMORY, "no memory for %lld tokens in %lld slots", static_cast<long long>(m->tokens),
                static_cast<long long>(m->slots));
  if (m->intermediate % kBlock) memset(m->h, 0, m->rows() * m->ldh() * activation);
  load_rows(*m->kernels, m->x, m->token.data(), m->rows(), m->in, m->ldx());
  *handle = m.release();
  return K2_OK;
} K2_CATCH

k2_status k2_moe_experts(k2_moe* m, const int64_t* experts, const void* const* records, int64_t count) try {
  if (!m || count < 0 || (count && (!experts || !records))) return fail(K2_BAD_CALL, "no handle, or no experts");
  std::vector<FeedForward> jobs;
  std::vector<char> done = m->done;  // a copy: a refused call leaves nothing half done
  for (int64_t i = 0; i < count; i++) K2_TRY(add_expert(*m, experts[i], records[i], &jobs, &done));
  if (!run(*m->kernels, jobs)) return fail(K2_NO_MEMORY, "no memory for a thread's tile");
  m->done = std::move(done);
  return K2_OK;
} K2_CATCH

k2_status k2_moe_partial(k2_moe* m, int64_t expert, const k2_tensor* rows) try {
  if (!m) return fail(K2_BAD_CALL, "no handle");
  if (expert < 0 || expert >= m->experts)
    return fail(K2_BAD_ID, "expert %lld of %lld", static_cast<long long>(expert), static_cast<long long>(m->experts));
  K2_TRY(check_tensor("rows", rows, K2_F32, 2));
  const int64_t first = m->first[expert], count = m->first[expert + 1] - first;
  if (rows->shape[0] != count || rows->shape[1] != m->hidden)
    return fail(K2_BAD_SHAPE, "rows are [%lld, %lld], expected [%lld, %lld]", static_cast<long long>(rows->shape[0]),
                static_cast<long long>(rows->shape[1]), static_cast<long long>(count), static_cast<long long>(m->hidden));
  for (int64_t r = 0; r < count; r++)
    memcpy(m->partial + m->place[first + r] * m->hidden, static_cast<const float*>(rows->data) + r * rows->strides[0],
           static_cast<size_t>(m->hidden) * sizeof(float));
  m->done[expert] = 1;
  return K2_OK;
} K2_CATCH

k2_status k2_moe_shared(k2_moe* m, const k2_tensor* shared) try {
  if (!m || !shared) return fail(K2_BAD_CALL, "no handle, or no shared experts");
  if (m->beside.job.out) return fail(K2_BAD_CALL, "the shared experts were given before");
  if (!m->tokens) return K2_OK;
  Shared beside;
  K2_TRY(prepare(*m, shared, &beside));
  if (!run(*m->kernels, {beside.job})) return fail(K2_NO_MEMORY, "no memory for a thread's tile");
  m->beside = std::move(beside);
  return K2_OK;
} K2_CATCH

k2_status k2_moe_finish(k2_moe* handle, const k2_tensor* shared, k2_tensor* y) try {
  std::unique_ptr<k2_moe> m(handle);
  K2_TRY(check_result(*m, y));
  if (shared) K2_TRY(k2_moe_shared(m.get(), shared));
  sum_slots(*m, m->beside.job.out, *y);
  return K2_OK;
} K2_CATCH

void k2_moe_drop(k2_moe* handle) { delete handle; }

k2_status k2_moe_at_once(const k2_tensor* x, const k2_tensor* ids, const k2_tensor* weights, const void* const* records,
                         int64_t experts, int64_t intermediate, int32_t dtype, const k2_tensor* shared, k2_tensor* y) try {
  if (!records) return fail(K2_BAD_CALL, "the experts have no records");
  k2_moe* begun = nullptr;
  K2_TRY(k2_moe_begin(x, ids, weights, experts, intermediate, dtype, &begun));
  const std::unique_ptr<k2_moe> m(begun);
  std::vector<FeedForward> jobs;
  for (int64_t e = 0; e < experts; e++) K2_TRY(add_expert(*m, e, records[e], &jobs, &m->done));
  K2_TRY(check_result(*m, y));
  Shared beside;
  if (shared && m->tokens) {
    K2_TRY(prepare(*m, shared, &beside));
    jobs.push_back(beside.job);
  }
  if (!run(*m->kernels, jobs)) return fail(K2_NO_MEMORY, "no memory for a thread's tile");
  sum_slots(*m, beside.job.out, *y);
  return K2_OK;
} K2_CATCH
}
