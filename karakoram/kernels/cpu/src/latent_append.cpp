// What lies between the projections of latent attention and the attention itself, for new tokens: the latent is normed and the
// rope key rotated into the cache's row, the rope part of every query is rotated beside its absorbed part.
#include "dispatch.hpp"
#include "errors.hpp"
#include "formats/bf16.hpp"
#include "worker_pool.hpp"

using namespace k2;

namespace {

// Pairs (x[2i], x[2i + 1]) turned by angle i, in float32, rounded to bf16.
void rotate(const uint16_t* x, const float* cos, const float* sin, int64_t width, uint16_t* out) {
  for (int64_t i = 0; i < width; i += 2) {
    const float even = bf16_to_float(x[i]), odd = bf16_to_float(x[i + 1]), c = cos[i / 2], s = sin[i / 2];
    out[i] = bf16_from_float(even * c - odd * s);
    out[i + 1] = bf16_from_float(even * s + odd * c);
  }
}

}  // namespace

extern "C" k2_status k2_latent_append(const k2_tensor* kv, const k2_tensor* norm, float eps, const k2_tensor* q_rope,
                                      const k2_tensor* cos, const k2_tensor* sin, const k2_tensor* positions,
                                      int64_t tokens_per_row, k2_tensor* cache, k2_tensor* queries) try {
  K2_TRY(check_tensor("kv", kv, K2_BF16, 2));
  K2_TRY(check_tensor("norm", norm, K2_BF16, 1));
  K2_TRY(check_tensor("q_rope", q_rope, K2_BF16, 3));
  K2_TRY(check_tensor("cos", cos, K2_F32, 2));
  K2_TRY(check_tensor("sin", sin, K2_F32, 2));
  K2_TRY(check_tensor("positions", positions, K2_I64, 1));
  K2_TRY(check_tensor("cache", cache, K2_BF16, 3));
  K2_TRY(check_tensor("queries", queries, K2_BF16, 3));
  const int64_t rows = kv->shape[0], latent = norm->shape[0], width = kv->shape[1], rope = width - latent;
  const int64_t heads = q_rope->shape[1];
  if (rope < 2 || rope % 2 || q_rope->shape[0] != rows || q_rope->shape[2] != rope || cos->shape[0] != rows ||
      sin->shape[0] != rows || cos->shape[1] != rope / 2 || sin->shape[1] != rope / 2 || positions->shape[0] != rows ||
      tokens_per_row < 1 || tokens_per_row > (rows ? rows : 1) || cache->shape[0] * tokens_per_row != rows || cache->shape[2] != width ||
      queries->shape[0] != rows || queries->shape[1] != heads || queries->shape[2] != width)
    return fail(K2_BAD_SHAPE, "kv, norm, q_rope, cos, sin, positions, cache and queries do not fit each other");
  const int64_t* at = static_cast<const int64_t*>(positions->data);
  for (int64_t r = 0; r < rows; r++)
    if (at[r] < 0 || at[r] >= cache->shape[1])
      return fail(K2_BAD_ID, "position %lld does not fit a cache of %lld tokens", static_cast<long long>(at[r]),
                  static_cast<long long>(cache->shape[1]));
  const Kernels& k = kernels();
  const auto one = [&](int64_t r, int) {
    const uint16_t* in = static_cast<const uint16_t*>(kv->data) + r * kv->strides[0];
    const float *c = static_cast<const float*>(cos->data) + r * cos->strides[0], *s = static_cast<const float*>(sin->data) + r * sin->strides[0];
    uint16_t* row = static_cast<uint16_t*>(cache->data) + r / tokens_per_row * cache->strides[0] + at[r] * cache->strides[1];
    k.rms_norm(in, static_cast<const uint16_t*>(norm->data), latent, eps, row);
    rotate(in + latent, c, s, rope, row + latent);
    for (int64_t h = 0; h < heads; h++)
      rotate(static_cast<const uint16_t*>(q_rope->data) + r * q_rope->strides[0] + h * q_rope->strides[1], c, s, rope,
             static_cast<uint16_t*>(queries->data) + r * queries->strides[0] + h * queries->strides[1] + latent);
  };
  for (int64_t r = 0; r < rows; r++) one(r, 0);
  return K2_OK;
} K2_CATCH
