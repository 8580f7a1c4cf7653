// CUDA C++ for g++: included before everything else when a .cu file is compiled for the host (-DANL_CUDA_ON_HOST).
//
// Here are the language's keywords, built-in types and functions. engine.h runs the threads, host_primitives.h has the
// host's side of csrc/cuda/primitives.cuh (and is included there), host_runtime.h what csrc/cuda/launch.cuh and module.cpp
// call of CUDA's runtime.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline  // not forced: that takes g++ more than twice as long, and the tests are no quicker
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#include "engine.h"
#include "host_runtime.h"

#define threadIdx (::anl::host::self().index)
#define blockIdx (::anl::host::self().cta->index)

// Objects, not macros: the launches have members of these names.
template <dim3 anl::host::Launch::* SIZE>
struct anl_launch_size {
  template <unsigned dim3::* D>
  struct Of {
    operator unsigned() const { return ::anl::host::self().cta->launch->*SIZE.*D; }
  };
  Of<&dim3::x> x;
  Of<&dim3::y> y;
  Of<&dim3::z> z;
};
inline constexpr anl_launch_size<&anl::host::Launch::block> blockDim;
inline constexpr anl_launch_size<&anl::host::Launch::grid> gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __vimax3_s32(int a, int b, int c) { return std::max({a, b, c}); }
inline unsigned __vimax3_u32(unsigned a, unsigned b, unsigned c) { return std::max({a, b, c}); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
template <class T>
T add_rounded_down(T a, T b) {
  const T sum = a + b, more = sum - a, error = (a - (sum - more)) + (b - more);  // Knuth's: exact
  return error < 0 ? std::nextafter(sum, -std::numeric_limits<T>::infinity()) : sum;
}
inline float __fadd_rd(float a, float b) { return add_rounded_down(a, b); }
inline double __dadd_rd(double a, double b) { return add_rounded_down(a, b); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;

[[noreturn]] inline void __trap() { ::anl::host::fail("__trap() was called"); }

// ---- barriers, shuffles and votes ----------------------------------------------------------------------------------------

// So that a race report names the kernel's line.
#define ANL_IN_PLACE inline __attribute__((always_inline))
using anl_location = std::source_location;
ANL_IN_PLACE void __syncthreads(anl_location where = anl_location::current()) { ::anl::host::sync_cta(where); }
ANL_IN_PLACE void __syncwarp(unsigned mask = 0xffffffffu) { ::anl::host::sync_warp(mask); }

namespace anl {
namespace host {

// What lane `from(lane)` of the mask brought, or the lane's own value if that is no lane of the segment.
template <class T>
T shuffle(unsigned mask, T value, int from, bool inside) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>, "shuffles take numbers of 32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const Exchanged all = exchange(mask, bits);
  if (!inside) return value;
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that takes no part in it");
  const uint64_t word = all.of(from);
  memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace host
}  // namespace anl

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int own = int(::anl::host::lane());
  return ::anl::host::shuffle(mask, value, own / width * width + (lane & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int own = int(::anl::host::lane()), from = own ^ bits;
  return ::anl::host::shuffle(mask, value, from, from / width <= own / width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int own = int(::anl::host::lane()), from = own + int(by);
  return ::anl::host::shuffle(mask, value, from, from / width == own / width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int own = int(::anl::host::lane()), from = own - int(by);
  return ::anl::host::shuffle(mask, value, from, from >= own / width * width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const ::anl::host::Exchanged all = ::anl::host::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(all.of(lane)) << lane;
  return votes;
}
template <class F>
int reduce_lanes(unsigned mask, int value, const F& f) {
  const ::anl::host::Exchanged all = ::anl::host::exchange(mask, unsigned(value));
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) value = f(value, int(all.of(lane)), lane == int(::anl::host::lane()));
  return value;
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return reduce_lanes(mask, value, [](int a, int b, bool) { return a > b ? a : b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return reduce_lanes(mask, value, [](int a, int b, bool own) { return own ? a : a + b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
ANL_IN_PLACE int __syncthreads_or(int predicate, anl_location where = anl_location::current()) {
  return ::anl::host::sync_cta_or(predicate != 0, where);
}
ANL_IN_PLACE int __syncthreads_and(int predicate, anl_location where = anl_location::current()) {
  return !::anl::host::sync_cta_or(predicate == 0, where);
}

// ---- atomics: relaxed, as CUDA's ------------------------------------------------------------------------------------------

template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats have no fixed order");
  return std::atomic_ref<T>(*p).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* p, T value) {
  return std::atomic_ref<T>(*p).exchange(value, std::memory_order_relaxed);
}
template <class T>
T atomicMax(T* p, T value) {
  T before = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (before < value && !std::atomic_ref<T>(*p).compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
  return before;
}
