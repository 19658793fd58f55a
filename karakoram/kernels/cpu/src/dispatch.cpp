// Chosen once, at the first call, by CPUID; forced by k2_isa_choose. The result of a choice that was never made is "auto".
#include "dispatch.hpp"

#include <atomic>
#include <cstring>

#include "errors.hpp"
#include "worker_pool.hpp"
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace k2 {
namespace {

bool amx_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool avx512_here() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool bf16_here() {
#if defined(__x86_64__)
  return avx512_here() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool amx_here() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  return bf16_here() && bf16 && tile && amx_permitted();
#else
  return false;
#endif
}

bool avx2_here() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

struct Choice {
  const char* name;
  const Kernels* (*table)();
  bool (*here)();
  bool automatic;
};

constexpr Choice kChoices[] = {  // best first
    {"amx", k2_kernels_amx, amx_here, true},
    {"avx512", k2_kernels_avx512, bf16_here, true},
    {"avx512f", k2_kernels_avx512f, avx512_here, true},
    {"avx2", k2_kernels_avx2, avx2_here, true},
    {"scalar", k2_kernels_scalar, [] { return true; }, true},
    {"amx_emulated", k2_kernels_amx_emulated, bf16_here, false},
};

std::atomic<const Kernels*> chosen{nullptr};
std::atomic<bool> deterministic_chosen{false};

const Kernels* find(const char* name) {
  const bool any = !strcmp(name, "auto");
  for (const Choice& choice : kChoices)
    if ((any ? choice.automatic : !strcmp(name, choice.name)) && choice.here() && choice.table()) return choice.table();
  return nullptr;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (!table) chosen.store(table = find("auto"), std::memory_order_release);
  return *table;
}

bool deterministic() { return deterministic_chosen.load(std::memory_order_relaxed); }

}  // namespace k2

using namespace k2;

extern "C" {

int k2_abi_version(void) { return K2_ABI_VERSION; }

int k2_isa_available(const char* name) { return find(name) != nullptr; }

k2_status k2_isa_choose(const char* name) {
  const Kernels* table = find(name);
  if (!table) return fail(K2_NO_ISA, "the instruction set %s is not built in, or not usable on this processor", name);
  chosen.store(table, std::memory_order_release);
  return K2_OK;
}

const char* k2_isa_chosen(void) { return kernels().name; }

void k2_deterministic_choose(int on) { deterministic_chosen.store(on != 0, std::memory_order_relaxed); }

int k2_deterministic_chosen(void) { return deterministic(); }

k2_status k2_threads_choose(int threads) {
  if (threads < 1 || threads > cores_permitted())
    return fail(K2_BAD_SHAPE, "%d threads cannot be used: 1 to %d are permitted", threads, cores_permitted());
  choose_threads(threads);
  return K2_OK;
}

int k2_threads_chosen(void) { return pool_threads(); }

k2_status k2_read(const k2_tensor* buffer, uint64_t* sum) try {
  K2_TRY(check_tensor("buffer", buffer, K2_U8, 1));
  if (!sum) return fail(K2_BAD_CALL, "the sum has no place");
  if (reinterpret_cast<uintptr_t>(buffer->data) % 8) return fail(K2_BAD_ALIGNMENT, "buffer is not aligned to 8 bytes");
  constexpr int64_t kPiece = 1 << 20;  // bytes
  const int64_t bytes = buffer->shape[0] / 8 * 8, pieces = (bytes + kPiece - 1) / kPiece;
  std::atomic<uint64_t> total{0};
  const auto* words = static_cast<const uint64_t*>(buffer->data);
  parallel(pieces, [&](int64_t piece, int) {
    const int64_t from = piece * kPiece / 8, to = bytes / 8 < from + kPiece / 8 ? bytes / 8 : from + kPiece / 8;
    total.fetch_add(kernels().read(words + from, to - from), std::memory_order_relaxed);
  });
  *sum = total.load();
  return K2_OK;
} K2_CATCH
}
