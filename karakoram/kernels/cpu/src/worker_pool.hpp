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
constexpr int kScratchSlots = 5, kLayerScratch = 4;
void* thread_scratch(int slot, size_t bytes);

// Sharing work and waiting for the others takes 0.5 µs where their cores are neighbours and 3 where they are not (a host moves
// virtual cores about); half of the work must be worth that. Of a time it is enough to know the order of magnitude.
constexpr int64_t kAloneNs = 8000;

template <class F>
void parallel(int64_t items, const F& work) {
  parallel_for(
      items, [](int64_t item, void* context, int thread) { (*static_cast<const F*>(context))(item, thread); },
      const_cast<F*>(&work));
}

template <class F>
void parallel_if(bool worth, int64_t items, const F& work) {
  if (worth) return parallel(items, work);
  for (int64_t item = 0; item < items; item++) work(item, 0);
}

}  // namespace k2
