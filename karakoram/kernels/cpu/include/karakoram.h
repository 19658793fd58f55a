// The C ABI of Karakoram's CPU kernels: one tensor descriptor, one error enum, a few functions.
//
// Ownership: every buffer belongs to the caller and must outlive the call; nothing is kept except by k2_moe_begin, whose
// handle keeps pointers until k2_moe_finish or k2_moe_drop. Calls may come from any thread; each runs on the library's own
// worker pool and returns when its work is done. No function throws, allocates Python objects, or depends on torch.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)  // the rest of the library stays hidden

#define K2_ABI_VERSION 1
#define K2_LAYOUT_VERSION 1  // of packed weights, in memory and on disk: docs/kernels.md

typedef enum {
  K2_OK = 0,
  K2_BAD_DTYPE = 1,
  K2_BAD_SHAPE = 2,
  K2_BAD_STRIDE = 3,
  K2_BAD_ALIGNMENT = 4,
  K2_BAD_ID = 5,          // an expert, block or length outside its range
  K2_NOT_FINITE = 6,      // a scale that is infinite or not a number
  K2_NO_MEMORY = 7,
  K2_NO_ISA = 8,          // an instruction set that is not built in, not in this CPU, or not permitted by the kernel
  K2_BAD_CALL = 9         // calls in the wrong order
} k2_status;

typedef enum {
  K2_F32 = 0,
  K2_BF16 = 1,
  K2_I32 = 2,
  K2_I64 = 3,
  K2_U8 = 4,
  K2_INT4_PANELS = 16,    // packed matrices: shape is [outputs, inputs] of the matrix, strides are ignored
  K2_BF16_PANELS = 17,
  K2_FP8_PANELS = 18
} k2_dtype;

typedef struct {
  void* data;
  int32_t dtype;
  int32_t ndim;
  int64_t shape[4];
  int64_t strides[4];     // in elements
} k2_tensor;

int k2_abi_version(void);
const char* k2_last_error(void);  // of the calling thread's last failed call

// Instruction sets, by name: "scalar", "avx2", "avx512f", "avx512", "amx", "amx_emulated" (slow, for tests).
int k2_isa_available(const char* name);      // 1 if built in and usable here
k2_status k2_isa_choose(const char* name);   // for all later calls; "auto" takes the best
const char* k2_isa_chosen(void);

k2_status k2_threads_choose(int threads);    // 1 to the number of cores this process may use
int k2_threads_chosen(void);

// Whether a row's result must be the same bits however many rows are in the call, 1, or may depend on it, 0 (the beginning).
// It only ever depends on it where a matrix unit (AMX) takes calls of many rows: there 1 costs speed, elsewhere nothing.
void k2_deterministic_choose(int on);
int k2_deterministic_chosen(void);

// Bytes of a packed matrix of [outputs, inputs]; -1 for a dtype that is not packed.
int64_t k2_packed_bytes(int32_t dtype, int64_t outputs, int64_t inputs);
// int32 [N, K/8] and bf16 [N, K/32] -> int4 panels; refuses scales that are not finite.
k2_status k2_pack_int4(const k2_tensor* codes, const k2_tensor* scale, k2_tensor* out);
k2_status k2_unpack_int4(const k2_tensor* packed, k2_tensor* codes, k2_tensor* scale);
// Bytes of int4 panels u8 [576 · n] -> their upper two bits and all scales u8 [320 · n], and back to panels: 0…3 becomes, by
// the parity of its place, 1 or 2 steps above 4 · its value, so that a group's error has no sign of its own.
k2_status k2_shadow_make(const k2_tensor* panels, k2_tensor* shadow);
k2_status k2_shadow_expand(const k2_tensor* shadow, k2_tensor* panels);
// bf16 [N, K] -> bf16 panels.
k2_status k2_pack_bf16(const k2_tensor* weight, k2_tensor* out);
// fp8 e4m3 bytes u8 [N, K] and f32 [N/128, K/128] -> fp8 panels (codes, then the scales).
k2_status k2_pack_fp8(const k2_tensor* weight, const k2_tensor* scale, k2_tensor* out);

// y[T, N] = x[T, K] · weight[N, K]ᵀ; x bf16, y bf16 or f32.
k2_status k2_linear(const k2_tensor* x, const k2_tensor* weight, k2_tensor* y);

// The same head by head: y[T, H, outputs] = x[T, H, K] · Wₕᵀ, where Wₕ are `outputs` rows of the packed matrix that begin
// at h · (rows of the matrix / H) + first. All of these are multiples of 16. x bf16, y bf16.
k2_status k2_linear_by_head(const k2_tensor* x, const k2_tensor* weight, int64_t first, k2_tensor* y);

// down(silu(gate(x)) · up(x)): x bf16 [T, D], y bf16 or f32 [T, D].
k2_status k2_mlp(const k2_tensor* x, const k2_tensor* gate, const k2_tensor* up, const k2_tensor* down, k2_tensor* y);

// Routed experts of a layer. records[e] points to expert e's panels of `dtype`: gate [I, D], up [I, D], down [D, I], one after
// another, each from a multiple of 64 bytes on; it may be null for experts that no token visits. shared: null, or three packed
// matrices gate, up, down.
// y[t] = Σ_k weights[t, k] · expert[ids[t, k]](x[t]) (+ shared(x[t])), partials kept in f32 and summed in the order of k.
k2_status k2_moe_at_once(const k2_tensor* x, const k2_tensor* ids, const k2_tensor* weights, const void* const* records,
                         int64_t experts, int64_t intermediate, int32_t dtype, const k2_tensor* shared, k2_tensor* y);

// The same in steps, for experts that arrive one after another, in any order.
typedef struct k2_moe k2_moe;
k2_status k2_moe_begin(const k2_tensor* x, const k2_tensor* ids, const k2_tensor* weights, int64_t experts,
                       int64_t intermediate, int32_t dtype, k2_moe** handle);
k2_status k2_moe_experts(k2_moe* handle, const int64_t* experts, const void* const* records, int64_t count);
// An expert's partials from elsewhere: rows f32 [its tokens, D], in the order of tokens and, within one, of slots.
k2_status k2_moe_partial(k2_moe* handle, int64_t expert, const k2_tensor* rows);
k2_status k2_moe_shared(k2_moe* handle, const k2_tensor* shared);  // while experts are awaited; then finish without them
k2_status k2_moe_finish(k2_moe* handle, const k2_tensor* shared, k2_tensor* y);  // frees the handle, also on error
void k2_moe_drop(k2_moe* handle);

// Absorbed latent attention, one query a sequence. q bf16 [B, H, L + R], lengths i64 [B], out f32 or bf16 [B, H, L].
// cache bf16: [B, S, L + R] without blocks, [blocks, block size, L + R] with blocks i32 [B, blocks per sequence].
k2_status k2_mla_decode(const k2_tensor* q, const k2_tensor* cache, const k2_tensor* blocks, const k2_tensor* lengths,
                        int64_t latent, float scale, k2_tensor* out);

// Expanded latent attention of many queries over one sequence: keys and values are multiplied out from its latents. q_nope bf16
// [T, H, N], q_rope bf16 [T, H, R], latent bf16 [S, L], k_rope bf16 [S, R], kv_b packed [H·(N + V), L], N and V multiples of 16;
// query t sees the first lengths[t] (i64 [T]) tokens. out f32 or bf16 [T, H, V].
k2_status k2_mla_prefill(const k2_tensor* q_nope, const k2_tensor* q_rope, const k2_tensor* latent, const k2_tensor* k_rope,
                         const k2_tensor* kv_b, const k2_tensor* lengths, float scale, k2_tensor* out);

// Before attention, for new tokens, `tokens_per_row` of each cache row after another: kv bf16 [n, L + R] is normed (norm bf16
// [L]) and rotated (cos, sin f32 [n, R/2], pairs interleaved) into cache bf16 [B, S, L + R] at positions i64 [n]; q_rope bf16
// [n, H, R] is rotated into queries[:, :, L:], queries bf16 [n, H, L + R].
k2_status k2_latent_append(const k2_tensor* kv, const k2_tensor* norm, float eps, const k2_tensor* q_rope,
                           const k2_tensor* cos, const k2_tensor* sin, const k2_tensor* positions, int64_t tokens_per_row,
                           k2_tensor* cache, k2_tensor* queries);

// logits f32 [T, E], bias f32 [E] -> ids i64 [T, K], weights f32 [T, K]: the K best of sigmoid(logits) + bias within the best
// groups, weighed by their plain scores, normalised if asked, times scale.
k2_status k2_route(const k2_tensor* logits, const k2_tensor* bias, int64_t groups, int64_t best_groups, int32_t normalise,
                   float scale, k2_tensor* ids, k2_tensor* weights);

// y = x / rms(x) · weight over the last dimension: x, y bf16 [T, D], weight bf16 [D]; sums and products in f32.
k2_status k2_rms_norm(const k2_tensor* x, const k2_tensor* weight, float eps, k2_tensor* y);

// A decoder layer's weights and numbers. What a layer does not have has data null: q_a and q_a_norm without a low-rank query;
// router and bias in a dense layer; mlp in a mixture without shared experts. D hidden, H heads, N nope, R rope, V value.
typedef struct {
  k2_tensor input_norm;            // bf16 [D]
  k2_tensor q_a, q_a_norm, q;      // packed [rank, D], bf16 [rank], packed [H·(N + R), rank or D]
  k2_tensor kv_a, kv_a_norm;       // packed [L + R, D], bf16 [L]
  k2_tensor keys, kv_b;            // packed [H·L, N], the key half of kv_b transposed; packed [H·(N + V), L]
  k2_tensor o;                     // packed [D, H·V]
  k2_tensor post_norm;             // bf16 [D]
  k2_tensor router, bias;          // packed [E, D], f32 [E]
  k2_tensor mlp[3];                // packed gate, up, down of the dense layer or of the shared experts
  const void* const* records;      // of the E experts, as in k2_moe_at_once
  int64_t heads, intermediate, chosen, groups, best_groups;
  int32_t normalise;
  float routed_scale, softmax_scale, eps, latent_eps;  // eps of input_norm and post_norm, of q_a_norm and kv_a_norm
  int32_t experts_dtype;           // of the records
} k2_layer;

// `count` layers one after another for n tokens that attend absorbed, each as a query of its own over its sequence's blocks:
// what the functions above compute when they are called in turn, bit for bit. x bf16 [n, D] is overwritten; cos, sin f32
// [n, R/2]; cache bf16 [count, blocks, block size, L + R], the blocks of a layer one after another; blocks i32 [n, blocks per
// sequence], lengths i64 [n] as in k2_mla_decode: of the rows that a token sees, the last one is its own and is written.
// blocks null: a block is a row of a contiguous cache, and so many tokens belong to each in turn as n has for it.
// Blocks and lengths are checked before anything is written; after another error x and these rows are of no use.
k2_status k2_decode_layers(const k2_layer* layers, int64_t count, const k2_tensor* cos, const k2_tensor* sin,
                           const k2_tensor* blocks, const k2_tensor* lengths, k2_tensor* cache, k2_tensor* x);
// The first half of one layer, for experts from elsewhere: x += attention, normed bf16 [n, D] = what router and experts read.
// Router, bias, mlp and records are not looked at; the cache is [1, blocks, block size, L + R].
k2_status k2_decode_attention(const k2_layer* layer, const k2_tensor* cos, const k2_tensor* sin, const k2_tensor* blocks,
                              const k2_tensor* lengths, k2_tensor* cache, k2_tensor* x, k2_tensor* normed);

// Muon, where k2_muon_here says 1; elsewhere these give K2_NO_ISA. alone: 1 for the calling thread without the others.
int k2_muon_here(void);
// Momentum f32 [n] in place, M ← M + new_share·(G − M), with G = scale · gradient f32 or bf16 [n]. out bf16 [n]: what is to be made
// orthogonal, with nesterov G + momentum·(M − G), else M. The differences are taken from the nearer end, as torch's lerp does.
k2_status k2_muon_momentum(const k2_tensor* gradient, k2_tensor* buffer, float momentum, float new_share, float scale,
                           int32_t nesterov, int32_t alone, k2_tensor* out);
// Newton-Schulz steps on matrices: x bf16 [n, A, B] over norms f32 [n] -> out bf16 [n, A, B], all contiguous. For each row
// (a, b, c) of steps f32 [steps, 3], X ← a·X + (b·G + c·G²)·X with G = X·Xᵀ; G, the sum in brackets and X are rounded to bf16.
// Of matrices with more rows than columns, X is the transpose.
k2_status k2_newton_schulz(const k2_tensor* x, const k2_tensor* norms, const k2_tensor* steps, int32_t alone, k2_tensor* out);
// weight f32 [n] ← keep · weight + by · update bf16 [n]; squares: Σ update²
k2_status k2_muon_update(k2_tensor* weight, const k2_tensor* update, float keep, float by, int32_t alone, float* squares);
// All of that for matrices of many weights, each from its gradient to its weight in one core's cache: gradients, buffers and
// weights are `count` tensors each [.., A, B] of 2 to 4 dimensions whose matrices are contiguous. weight ← keep · weight + by · O,
// O the steps on the bf16 momentum over `shrink` times its norm, as bf16; by and squares (Σ O²) f32 [count].
typedef struct {
  float momentum, new_share, scale, keep, shrink;
  int32_t nesterov;
} k2_muon_rule;
k2_status k2_muon_step(const k2_muon_rule* rule, const k2_tensor* steps, int64_t count, const k2_tensor* gradients,
                       const k2_tensor* buffers, const k2_tensor* weights, const float* by, int32_t alone, float* squares);

// Causal attention for training, where k2_causal_here says 1; elsewhere K2_NO_ISA. q, k bf16 [B, H, T, X], v and out bf16
// [B, H, T, V], X and V multiples of 16; spans i64 [n, 3]: row, first token, token behind the last of documents that see only
// themselves. stats f32 [B, H, T, 2], written for the backward pass: a token's largest logit m and 1 / Σ exp(logit − m); largest
// f32 [H]: the largest logit of all. Tokens in no span are not written.
int k2_causal_here(void);
k2_status k2_causal_forward(const k2_tensor* q, const k2_tensor* k, const k2_tensor* v, const k2_tensor* spans, float scale,
                            int32_t alone, k2_tensor* stats, k2_tensor* largest, k2_tensor* out);
k2_status k2_causal_backward(const k2_tensor* q, const k2_tensor* k, const k2_tensor* v, const k2_tensor* spans, float scale,
                             int32_t alone, const k2_tensor* stats, const k2_tensor* out, const k2_tensor* grad_out,
                             k2_tensor* grad_q, k2_tensor* grad_k, k2_tensor* grad_v);

// Sum of a buffer's bytes with the widest loads of the chosen instruction set: the reader of `k2 bench memory`.
k2_status k2_read(const k2_tensor* buffer, uint64_t* sum);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
