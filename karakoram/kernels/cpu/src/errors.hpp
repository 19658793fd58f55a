// The last error of a thread, in words, and checks of tensor descriptors at the door.
#pragma once
#include <initializer_list>

#include "../include/karakoram.h"

namespace k2 {

// Remembers a printf-formatted message for k2_last_error and returns the status.
k2_status fail(k2_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The status and message for the exception that is being handled: the C ABI lets none out.
k2_status fail_for_exception();

// Whether a product of sizes, zeros left out, is no more than a process can address. Sizes beyond that are nonsense, and sums and
// small multiples of sizes below it cannot overflow.
constexpr int64_t kMostBytes = int64_t(1) << 47;
bool fits(std::initializer_list<int64_t> factors);

const char* dtype_name(int32_t dtype);

// Dtype, number of dimensions, possible sizes and non-null data of an argument; rows contiguous in the last dimension.
k2_status check_tensor(const char* name, const k2_tensor* tensor, int32_t dtype, int ndim);

#define K2_TRY(call)                       \
  do {                                     \
    const k2_status k2_status_ = (call);   \
    if (k2_status_ != K2_OK) return k2_status_; \
  } while (0)

// Behind the body of a function that begins with `try`.
#define K2_CATCH \
  catch (...) { return k2::fail_for_exception(); }

}  // namespace k2
