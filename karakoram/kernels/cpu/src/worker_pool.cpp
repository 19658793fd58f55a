// A worker waits for a new round: it looks for 200 µs, then sleeps on a condition variable, so that an idle pool costs
// nothing and torch's own threads get the cores between calls. Waking a sleeping virtual core takes 50 µs and more, and a
// decoded token makes ten calls a layer: looking covers the gaps between them.
//
// Workers are pinned to the second, third … core that the process may use; a caller that is found on one of theirs moves to
// the first one, else both would share a core until the scheduler notices (seen: two threads as slow as one).
//
// A round is open while it has items. Workers that find it open join; when the caller finds no item left, it closes the round
// and waits for those that joined: on a busy machine, one that the scheduler keeps away is not waited for.
//
// A fork leaves the child without threads; it starts anew with its first call.
#include "worker_pool.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

namespace k2 {
namespace {

constexpr auto kLookFor = std::chrono::microseconds(200);

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
bool look_for(Ready ready) {  // true as soon as it is, false when the time is over
  const auto until = std::chrono::steady_clock::now() + kLookFor;
  do {
    for (int look = 0; look < 64; look++) {
      if (ready()) return true;
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

constexpr uint64_t kRound = 1 << 16, kOpen = 1 << 15;

struct Pool {
  std::mutex callers;  // one parallel_for at a time
  std::mutex sleep;
  std::condition_variable wake, finished;
  // Side by side: the cache line goes back and forth between the threads as a whole, once or twice a round.
  alignas(64) std::atomic<uint64_t> round{0};  // number · kRound + kOpen + workers that joined
  std::atomic<int64_t> next{0};
  int64_t items = 0;
  void (*work)(int64_t, void*, int) = nullptr;
  void* context = nullptr;
  std::atomic<int> left{0};  // of those that joined
  // Workers on `wake`, and the caller on `finished`. Who goes to sleep says so here and then looks at `round` or `left` once
  // more; who changes those looks here afterwards: one of both sees the other.
  std::atomic<int> asleep{0};
  std::atomic<bool> waiting{false};
  std::atomic<bool> stop{false};
  std::atomic<bool> failed{false};  // an item threw
  std::atomic<int> threads{0};  // workers and caller; 0 while they change
  int first_core = -1;          // where no worker is pinned
  std::vector<std::thread> workers;
};

std::atomic<Pool*> pool{nullptr};
std::atomic<int> wanted_threads{0};
std::mutex* creation = new std::mutex;
thread_local bool inside = false;  // a call from within a call runs alone

void take_items(Pool& p, int thread) {
  for (;;) {
    const int64_t item = p.next.fetch_add(1, std::memory_order_relaxed);
    if (item >= p.items) return;
    try {
      p.work(item, p.context, thread);
    } catch (...) {  // no memory: told to the caller by the calling thread
      p.failed = true;
    }
  }
}

void pin_to(int core_of_permitted) {
#if defined(__linux__)
  cpu_set_t permitted, one;
  if (sched_getaffinity(0, sizeof permitted, &permitted)) return;
  int seen = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &permitted) && seen++ == core_of_permitted) {
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      pthread_setaffinity_np(pthread_self(), sizeof one, &one);
      return;
    }
#else
  (void)core_of_permitted;
#endif
}

int first_permitted() {
  int first = -1;
#if defined(__linux__)
  cpu_set_t permitted;
  if (sched_getaffinity(0, sizeof permitted, &permitted)) return first;
  while (++first < CPU_SETSIZE && !CPU_ISSET(first, &permitted)) {
  }
#endif
  return first;
}

// Moves the calling thread to the first permitted core if it is on another, and lets it free again.
void leave_to_workers(const Pool& p) {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (here == p.first_core || here == first_permitted()) return;
  cpu_set_t permitted;
  if (sched_getaffinity(0, sizeof permitted, &permitted)) return;
  pin_to(0);
  pthread_setaffinity_np(pthread_self(), sizeof permitted, &permitted);
#else
  (void)p;
#endif
}

// Takes part in the round if it is open still.
void join(Pool& p, int thread) {
  uint64_t round = p.round.load(std::memory_order_acquire);
  do {
    if (!(round & kOpen)) return;
  } while (!p.round.compare_exchange_weak(round, round + 1));
  take_items(p, thread);
  p.left.fetch_add(1);
  if (p.waiting.load()) {
    std::lock_guard<std::mutex> lock(p.sleep);
    p.finished.notify_one();
  }
}

void live(Pool* p, int thread, uint64_t seen) {
  pin_to(thread);
  inside = true;
  const auto number = [&] { return p->round.load() / kRound; };
  for (;;) {
    if (!look_for([&] { return number() != seen; })) {
      std::unique_lock<std::mutex> lock(p->sleep);
      p->asleep.fetch_add(1);
      p->wake.wait(lock, [&] { return number() != seen || p->stop; });
      p->asleep.fetch_sub(1);
    }
    if (p->stop) return;
    seen = number();
    join(*p, thread);
  }
}

void forget_after_fork() {  // the child has no workers, and locks may be held by threads that are not there
  pool = nullptr;
  creation = new std::mutex;
  inside = false;
}

void end_workers(Pool& p) {  // by whoever holds `callers`
  p.threads.store(0);
  {
    std::lock_guard<std::mutex> asleep(p.sleep);
    p.stop = true;
    p.round.fetch_add(kRound);
  }
  p.wake.notify_all();
  for (std::thread& worker : p.workers) worker.join();
  p.workers.clear();
  p.stop = false;
}

Pool* running_pool() {
  const int threads = pool_threads();
  Pool* p = pool.load(std::memory_order_acquire);
  if (p && p->threads.load(std::memory_order_acquire) == threads) return p;
  std::lock_guard<std::mutex> lock(*creation);
  p = pool.load();
  if (p && p->threads.load() == threads) return p;
  static bool registered = false;
  if (!registered) {
    pthread_atfork(nullptr, nullptr, forget_after_fork);
    registered = true;
  }
  if (!p) pool.store(p = new Pool);  // never deleted: callers may hold it, and so may a forked child's copy
  std::lock_guard<std::mutex> no_caller(p->callers);  // until the new workers are there: a round counts those that it began with
  end_workers(*p);
  p->first_core = first_permitted();
  const uint64_t round = p->round.load() / kRound;
  try {
    for (int thread = 1; thread < threads; thread++) p->workers.emplace_back(live, p, thread, round);
  } catch (const std::exception&) {  // the system gives no more threads: these must do, from now on
    wanted_threads.store(static_cast<int>(p->workers.size()) + 1);
  }
  p->threads.store(static_cast<int>(p->workers.size()) + 1, std::memory_order_release);
  return p;
}

struct Scratch {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~Scratch() {
    for (void* block : data) free(block);
  }
};
thread_local Scratch scratch;

int cores_by_quota() {  // cgroup v2 "quota period", v1 two files; 0 without a limit
  long long quota = 0, period = 0;
  char first[32] = "";
  if (FILE* file = fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (fscanf(file, "%31s %lld", first, &period) == 2 && strcmp(first, "max") != 0) quota = atoll(first);
    fclose(file);
  } else {
    if (FILE* v1 = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
      if (fscanf(v1, "%lld", &quota) != 1) quota = 0;
      fclose(v1);
    }
    if (FILE* v1 = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
      if (fscanf(v1, "%lld", &period) != 1) period = 0;
      fclose(v1);
    }
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

}  // namespace

int cores_permitted() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t permitted;
  if (!sched_getaffinity(0, sizeof permitted, &permitted)) cores = CPU_COUNT(&permitted);
#endif
  const int quota = cores_by_quota();
  if (quota && quota < cores) cores = quota;
  return cores > 0 ? cores : 1;
}

int pool_threads() {
  int threads = wanted_threads.load();
  if (threads == 0) {
    // Asked once, by the first caller, whose own affinity is that of the process: workers are pinned, it is not.
    threads = cores_permitted();
    wanted_threads.store(threads);
  }
  return threads;
}

void choose_threads(int threads) {
  const int most = cores_permitted();
  wanted_threads.store(threads < 1 ? 1 : threads > most ? most : threads);
}

void parallel_for(int64_t items, void (*work)(int64_t, void*, int), void* context) {
  if (items <= 0) return;
  if (items == 1 || inside || pool_threads() == 1) {
    for (int64_t item = 0; item < items; item++) work(item, context, 0);
    return;
  }
  Pool* p = running_pool();
  std::lock_guard<std::mutex> lock(p->callers);
  inside = true;
  leave_to_workers(*p);
  p->items = items;
  p->work = work;
  p->context = context;
  p->next.store(0, std::memory_order_relaxed);
  p->left.store(0, std::memory_order_relaxed);
  p->round.store((p->round.load() / kRound + 1) * kRound + kOpen);
  if (p->asleep.load()) {
    { std::lock_guard<std::mutex> asleep(p->sleep); }  // who has counted itself asleep is, or has seen the new round
    p->wake.notify_all();
  }
  take_items(*p, 0);
  const int joined = static_cast<int>(p->round.fetch_and(~kOpen) % kOpen);
  const auto all_left = [&] { return p->left.load() == joined; };
  if (!look_for(all_left)) {
    std::unique_lock<std::mutex> asleep(p->sleep);
    p->waiting.store(true);
    p->finished.wait(asleep, all_left);
    p->waiting.store(false);
  }
  inside = false;
  if (p->failed.exchange(false)) throw std::bad_alloc();
}

void* thread_scratch(int slot, size_t bytes) {
  if (scratch.bytes[slot] < bytes) {
    free(scratch.data[slot]);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data[slot] = aligned_alloc(64, rounded);
    scratch.bytes[slot] = scratch.data[slot] ? rounded : 0;
  }
  return scratch.data[slot];
}

}  // namespace k2
