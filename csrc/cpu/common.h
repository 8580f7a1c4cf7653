// Small things both traversals need: labels, scratch memory, scalars of the arithmetic type.
#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace anl {
namespace ANL_ISA {
namespace {

constexpr double INF = __builtin_inf();
constexpr double NaN = __builtin_nan("");

ANL_INLINE int64_t load_target(const Call& call, int64_t r) {
  switch (call.target_type) {
    case INT64: return static_cast<const int64_t*>(call.target)[r];
    case INT32: return static_cast<const int32_t*>(call.target)[r];
    case INT16: return static_cast<const int16_t*>(call.target)[r];
    default: return static_cast<const uint8_t*>(call.target)[r];
  }
}

template <class T>
ANL_INLINE double class_weight(const Call& call, int64_t y) {
  return call.weight ? double(static_cast<const T*>(call.weight)[y]) : 1.0;
}

template <class T>
ANL_INLINE double grad_output(const Call& call, int64_t r) {
  return double(static_cast<const T*>(call.grad_output)[r * call.grad_output_stride]);
}

template <class T>
ANL_INLINE double entropy_scale(const Call& call) {
  return call.log_q ? double(*static_cast<const T*>(call.entropy_scale)) : 0.0;
}

// Uninitialised memory for trivially copyable things, freed at the end of the scope.
template <class X>
struct Scratch {
  X* data;
  explicit Scratch(int64_t n) : data(nullptr) {
    if (posix_memalign(reinterpret_cast<void**>(&data), 64, (n > 0 ? n : 1) * sizeof(X))) abort();
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

template <class T>
ANL_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
ANL_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}

// The statistics of an ignored row are those of a uniform one: any f is finite there, and its result is dropped.
ANL_INLINE void write_ignored_statistics(const Call& call, int64_t r, int64_t num_rows) {
  const double K = double(call.num_classes), log_k = log(K), T = call.program.log_floor_neg;
  const double w = pow(1.0 - 1.0 / K, call.program.gamma);
  const double values[NUM_STATS] = {0.0, log_k, -log_k, K, K * log_k, K * (T - log_k), 1.0, K, K * w * log_k,
                                    K * w, K * (call.program.focal_floor - w * log_k), K * w, 0.0};
  for (int i = 0; i < NUM_STATS; ++i) call.stats[i * num_rows + r] = values[i];
}

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
