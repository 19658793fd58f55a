// One pool of threads for the whole process: pinned one to a core, asleep between calls, shared by all callers in turn.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace k2 {

// Calls work(item, context, thread) for every item in [0, items), on the pool and on the calling thread. Which thread does
// an item is not determined; results must not depend on it. Several callers are served one after another.
void parallel_for(int64_t items, void (*work)(int64_t item, void* context, int thread), void* context);

int pool_threads();               // how many parallel_for uses, the caller included
int cores_permitted();            // affinity and control group
void choose_threads(int threads); // at most cores_permitted()

// Memory of one thread that stays between calls, aligned to 64 bytes; null where there is none. Slots are independent.
constexpr int kScratchSlots = 4;
void* thread_scratch(int slot, size_t bytes);

template <class F>
void parallel(int64_t items, const F& work) {
  parallel_for(
      items, [](int64_t item, void* context, int thread) { (*static_cast<const F*>(context))(item, thread); },
      const_cast<F*>(&work));
}

}  // namespace k2
