// Four callers at once while the number of threads changes, for ThreadSanitizer: prints "ok" if every result is the same.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "karakoram.h"

namespace {

constexpr int64_t kRows = 9, kInputs = 128, kOutputs = 800;  // enough work to be shared

k2_tensor matrix(void* data, int32_t dtype, int64_t rows, int64_t columns) {
  return {data, dtype, 2, {rows, columns}, {columns, 1}};
}

}  // namespace

int main() {
  std::vector<uint16_t> weight(kOutputs * kInputs), x(kRows * kInputs, 0x3F80);
  for (size_t i = 0; i < weight.size(); i++) weight[i] = static_cast<uint16_t>(0x3F00 + i % 200);
  void* data = aligned_alloc(64, static_cast<size_t>(k2_packed_bytes(K2_BF16_PANELS, kOutputs, kInputs)));
  k2_tensor plain = matrix(weight.data(), K2_BF16, kOutputs, kInputs), in = matrix(x.data(), K2_BF16, kRows, kInputs);
  k2_tensor packed = matrix(data, K2_BF16_PANELS, kOutputs, kInputs);
  if (k2_pack_bf16(&plain, &packed)) return 1;

  const auto product = [&] {
    std::vector<float> y(kRows * kOutputs);
    k2_tensor out = matrix(y.data(), K2_F32, kRows, kOutputs);
    if (k2_linear(&in, &packed, &out)) abort();
    return y;
  };
  const std::vector<float> expected = product();
  std::atomic<bool> right{true}, over{false};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; caller++)
    callers.emplace_back([&] {
      for (int call = 0; call < 200; call++)
        if (product() != expected) right = false;
    });
  const int most = k2_threads_chosen();
  std::thread change([&] {
    for (int n = 0; !over; n++) k2_threads_choose(1 + n % most);
  });
  for (std::thread& caller : callers) caller.join();
  over = true;
  change.join();
  puts(right ? "ok" : "results differ");
  free(data);
}
