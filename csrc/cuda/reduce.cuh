// Reductions over lanes and CTAs in an order that depends on the number of threads alone.
//
// A tuple X is any trivially copyable struct of 32-bit words (or a number); merge(a, b) -> X. a always stands for the
// lower lanes, so that merge need not commute to its last bit and every lane gets the same bits.
#pragma once

#include <string.h>

#include "primitives.cuh"

namespace anl {
namespace gpu {

ANL_DEVICE unsigned lane_index() { return threadIdx.x % WARP; }

namespace detail {

template <class X, class F>
ANL_DEVICE X each_word(X x, const F& f) {
  static_assert(sizeof(X) % 4 == 0, "a tuple is shuffled in 32-bit words");
  unsigned words[sizeof(X) / 4];
  memcpy(words, &x, sizeof(X));
#pragma unroll
  for (unsigned& word : words) word = f(word);
  memcpy(&x, words, sizeof(X));
  return x;
}

}  // namespace detail

// All lanes of the warp call these.
template <class X>
ANL_DEVICE X shuffle_xor(const X& x, int mask) {
  return detail::each_word(x, [&](unsigned word) { return __shfl_xor_sync(ALL_LANES, word, mask); });
}
template <class X>
ANL_DEVICE X shuffle_from(const X& x, int lane) {
  return detail::each_word(x, [&](unsigned word) { return __shfl_sync(ALL_LANES, word, lane); });
}

// The largest of all lanes' numbers, none of which is NaN; the sum of whole numbers below 2^31.
ANL_DEVICE float warp_max(float x) {
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };  // as integers, as the floats are
  return __int_as_float(ordered(__reduce_max_sync(ALL_LANES, ordered(__float_as_int(x)))));
}
ANL_DEVICE float warp_count(float x) { return float(__reduce_add_sync(ALL_LANES, int(x))); }

// Every lane gets the reduction over its aligned group of LANES.
template <int LANES = WARP, class X, class Merge>
ANL_DEVICE X warp_reduce(X x, const Merge& merge) {
#pragma unroll 1
  for (int offset = 1; offset < LANES; offset *= 2) {
    const X other = shuffle_xor(x, offset);
    x = lane_index() & offset ? merge(other, x) : merge(x, other);
  }
  return x;
}

// Every thread gets the reduction over the CTA (whole warps, blockDim.y == 1). `shared` holds one X per warp; between two
// uses of it stands a __syncthreads.
template <class X, class Merge>
ANL_DEVICE X block_reduce(X x, const Merge& merge, X* shared) {
  x = warp_reduce(x, merge);
  const unsigned lane = lane_index(), warps = blockDim.x / WARP;
  if (warps == 1) return x;
  if (lane == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  x = shared[lane < warps ? lane : 0];
  unsigned width = 1;
  while (width < warps) width *= 2;
  for (unsigned offset = width / 2; offset > 0; offset /= 2) {  // lanes below offset take in those up to 2 offset
    const X other = shuffle_from(x, int(lane + offset) % WARP);
    if (lane + offset < warps) x = merge(x, other);
  }
  return shuffle_from(x, 0);
}

// Whether any thread of the CTA says so, whole warps of which call this. `shared` holds one number per warp; between two
// uses of it stands a __syncthreads.
ANL_DEVICE bool block_any(bool x, unsigned* shared) {
  const unsigned lane = lane_index();
  x = __any_sync(ALL_LANES, x);
  if (lane == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  return __any_sync(ALL_LANES, lane < blockDim.x / WARP && shared[lane]);
}

template <class T>
struct Add {
  ANL_DEVICE T operator()(T a, T b) const { return a + b; }
};
// Of whole numbers.
template <class T>
struct AddCount : Add<T> {};
template <class T>
struct Largest {
  ANL_DEVICE T operator()(T a, T b) const { return a > b || a != a ? a : b; }  // NaN wins
};
template <class T>
struct Smallest {
  ANL_DEVICE T operator()(T a, T b) const { return a < b || a != a ? a : b; }
};

// Of a NaN and a number, the number.
ANL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
ANL_DEVICE double larger(double a, double b) { return b > a || a != a ? b : a; }
ANL_DEVICE float smaller(float a, float b) { return fminf(a, b); }
ANL_DEVICE double smaller(double a, double b) { return b < a || a != a ? b : a; }
struct LargerNumber {
  template <class T>
  ANL_DEVICE T operator()(T a, T b) const {
    return larger(a, b);
  }
};
struct SmallerNumber {
  template <class T>
  ANL_DEVICE T operator()(T a, T b) const {
    return smaller(a, b);
  }
};

}  // namespace gpu
}  // namespace anl
