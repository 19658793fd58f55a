#include "errors.hpp"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <new>
#include <stdexcept>

namespace k2 {

static thread_local char last_error[512];

k2_status fail(k2_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

k2_status fail_for_exception() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return fail(K2_NO_MEMORY, "there is not enough memory");
  } catch (const std::length_error&) {
    return fail(K2_NO_MEMORY, "there cannot be enough memory");
  } catch (const std::exception& error) {
    return fail(K2_BAD_CALL, "%s", error.what());
  } catch (...) {
    return fail(K2_BAD_CALL, "something unknown went wrong");
  }
}

bool fits(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors)
    if (factor && (factor < 0 || __builtin_mul_overflow(product, factor, &product) || product > kMostBytes)) return false;
  return true;
}

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case K2_F32: return "float32";
    case K2_BF16: return "bfloat16";
    case K2_I32: return "int32";
    case K2_I64: return "int64";
    case K2_U8: return "uint8";
    case K2_INT4_PANELS: return "int4 panels";
    case K2_BF16_PANELS: return "bf16 panels";
    case K2_FP8_PANELS: return "fp8 panels";
    default: return "an unknown dtype";
  }
}

static int64_t element_bytes(int32_t dtype) {
  switch (dtype) {
    case K2_F32:
    case K2_I32: return 4;
    case K2_BF16: return 2;
    case K2_I64: return 8;
    default: return 1;
  }
}

k2_status check_tensor(const char* name, const k2_tensor* tensor, int32_t dtype, int ndim) {
  if (!tensor) return fail(K2_BAD_SHAPE, "%s is missing", name);
  if (tensor->dtype != dtype)
    return fail(K2_BAD_DTYPE, "%s is %s, expected %s", name, dtype_name(tensor->dtype), dtype_name(dtype));
  if (tensor->ndim != ndim) return fail(K2_BAD_SHAPE, "%s has %d dimensions, expected %d", name, tensor->ndim, ndim);
  int64_t elements = 1, whole = 1, reach = 0, step = 0;  // whole: zeros left out; reach: of the last element
  for (int i = 0; i < ndim; i++) {
    const int64_t size = tensor->shape[i];
    if (size < 0) return fail(K2_BAD_SHAPE, "%s has a negative size", name);
    elements = size ? elements : 0;
    if (size > 1 && tensor->strides[i] < 0) return fail(K2_BAD_STRIDE, "%s has a negative stride", name);
    const bool too_far = size > 1 && (__builtin_mul_overflow(size - 1, tensor->strides[i], &step) ||
                                      __builtin_add_overflow(reach, step, &reach) || reach > kMostBytes);
    if (too_far || !fits({whole, size, 8})) return fail(K2_BAD_SHAPE, "%s is larger than any memory", name);
    whole *= size ? size : 1;
  }
  if (elements && !tensor->data) return fail(K2_BAD_SHAPE, "%s points nowhere", name);
  if (reinterpret_cast<uintptr_t>(tensor->data) % element_bytes(dtype))
    return fail(K2_BAD_ALIGNMENT, "%s is not aligned to its elements", name);
  if (dtype < K2_INT4_PANELS && ndim && tensor->shape[ndim - 1] > 1 && tensor->strides[ndim - 1] != 1)
    return fail(K2_BAD_STRIDE, "the last dimension of %s is not contiguous", name);
  return K2_OK;
}

}  // namespace k2

extern "C" const char* k2_last_error(void) { return k2::last_error; }
