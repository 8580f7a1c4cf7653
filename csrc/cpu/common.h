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

// Uninitialised memory for trivially copyable things, freed at the end of the scope. Throws if there is none.
template <class X>
struct Scratch {
  X* data;
  explicit Scratch(int64_t n) : data(nullptr) {
    const size_t bytes = size_t(n > 0 ? n : 1) * sizeof(X);
    if (posix_memalign(reinterpret_cast<void**>(&data), 64, bytes)) throw_no_memory(int64_t(bytes));
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

ANL_INLINE void write_ignored_statistics(const Call& call, int64_t r, int64_t num_rows) {
  double values[NUM_STATS];
  ignored_statistics(double(call.num_classes), call.program, values);
  for (int i = 0; i < NUM_STATS; ++i) call.stats[i * num_rows + r] = values[i];
}

// Of a row whose label is no class.
ANL_INLINE void write_bad_statistics(const Call& call, int64_t r, int64_t num_rows) {
  for (int i = 0; i < NUM_STATS; ++i) call.stats[i * num_rows + r] = i == STAT_VALID ? 1.0 : NaN;
}

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
