// The router behind its matrix product: sigmoid, biased choice, normalised weights, as model/router.py has it. A row costs a few
// thousand comparisons: less than torch's eight calls do.
#include <atomic>
#include <cmath>
#include <vector>

#include "errors.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

struct Rule {
  int64_t experts, groups, best_groups, chosen;
  bool normalise;
  float scale;
};

// The best of the allowed entries, the first of equals; -1 if none is a number above -inf.
int64_t best_of(const float* values, int64_t count) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; i++)
    if (values[i] > (best < 0 ? -INFINITY : values[best])) best = i;
  return best;
}

void keep_best_groups(const Rule& rule, float* biased) {
  const int64_t size = rule.experts / rule.groups;
  std::vector<float> rank(rule.groups);
  for (int64_t g = 0; g < rule.groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < size; i++) {
      const float value = biased[g * size + i];
      if (value > first) second = first, first = value;
      else if (value > second) second = value;
    }
    rank[g] = first + second;
  }
  std::vector<char> kept(rule.groups, 0);
  for (int64_t i = 0; i < rule.best_groups; i++) {
    const int64_t g = best_of(rank.data(), rule.groups);
    if (g < 0) break;
    kept[g] = 1;
    rank[g] = -INFINITY;
  }
  for (int64_t e = 0; e < rule.experts; e++)
    if (!kept[e / size]) biased[e] = -INFINITY;
}

bool route_row(const Rule& rule, const float* logits, const float* bias, int64_t* ids, float* weights) {
  std::vector<float> scores(rule.experts), biased(rule.experts);
  for (int64_t e = 0; e < rule.experts; e++) {
    scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    biased[e] = scores[e] + bias[e];
  }
  if (rule.groups > 1) keep_best_groups(rule, biased.data());
  float total = 0;
  for (int64_t k = 0; k < rule.chosen; k++) {
    const int64_t e = best_of(biased.data(), rule.experts);
    if (e < 0) return false;
    ids[k] = e;
    weights[k] = scores[e];
    total += scores[e];
    biased[e] = -INFINITY;
  }
  for (int64_t k = 0; k < rule.chosen; k++) weights[k] = (rule.normalise ? weights[k] / (total + 1e-20f) : weights[k]) * rule.scale;
  return true;
}

}  // namespace

extern "C" k2_status k2_route(const k2_tensor* logits, const k2_tensor* bias, int64_t groups, int64_t best_groups,
                              int32_t normalise, float scale, k2_tensor* ids, k2_tensor* weights) try {
  K2_TRY(check_tensor("logits", logits, K2_F32, 2));
  K2_TRY(check_tensor("bias", bias, K2_F32, 1));
  K2_TRY(check_tensor("ids", ids, K2_I64, 2));
  K2_TRY(check_tensor("weights", weights, K2_F32, 2));
  const int64_t rows = logits->shape[0];
  const Rule rule{logits->shape[1], groups, best_groups, ids->shape[1], normalise != 0, scale};
  if (bias->shape[0] != rule.experts || ids->shape[0] != rows || weights->shape[0] != rows ||
      weights->shape[1] != rule.chosen || groups < 1 || rule.experts % groups || best_groups < 1 || best_groups > groups ||
      rule.chosen < 1 || rule.chosen > rule.experts / groups * best_groups)
    return fail(K2_BAD_SHAPE, "logits, bias, ids, weights and groups do not fit each other");
  std::atomic<bool> good{true};
  const auto one = [&](int64_t r, int) {
    if (!route_row(rule, static_cast<const float*>(logits->data) + r * logits->strides[0],
                   static_cast<const float*>(bias->data), static_cast<int64_t*>(ids->data) + r * ids->strides[0],
                   static_cast<float*>(weights->data) + r * weights->strides[0]))
      good = false;
  };
  parallel_if(rows * rule.experts * 5 > kAloneNs, rows, one);  // an exponential and some comparisons an expert
  return good ? K2_OK : fail(K2_NOT_FINITE, "a token's routing logits are not numbers");
} K2_CATCH
