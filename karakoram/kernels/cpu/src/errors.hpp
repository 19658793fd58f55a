// The last error of a thread, in words, and checks of tensor descriptors at the door.
#pragma once
#include "../include/karakoram.h"

namespace k2 {

// Remembers a printf-formatted message for k2_last_error and returns the status.
k2_status fail(k2_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

const char* dtype_name(int32_t dtype);

// Dtype, number of dimensions and non-null data of an argument; rows contiguous in the last dimension.
k2_status check_tensor(const char* name, const k2_tensor* tensor, int32_t dtype, int ndim);

#define K2_TRY(call)                       \
  do {                                     \
    const k2_status k2_status_ = (call);   \
    if (k2_status_ != K2_OK) return k2_status_; \
  } while (0)

}  // namespace k2
