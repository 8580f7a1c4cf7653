// The formulas are written over a policy M: M::V is a number or a vector of them (one row or one class per lane), with
// M::set, exp, log, log1p, expm1, sqrt, divide (to an ulp or two) for the mathematics of a row, and for every class
//   class_exp(x)                    exp, as fast as it is accurate enough for a sum or a gradient
//   class_exp_and_rest(l, rest)     exp(l), and 1 - exp(l) without cancellation, for l <= 0
//   add_where(mask, sum, x)         sum += x where mask
// A mask is what a comparison of two V gives and `mask ? V : V` takes; M::negate(mask) is its opposite.
#pragma once

#if defined(__CUDACC__)
#define ANL_HD __host__ __device__ __forceinline__
#else
#define ANL_HD inline __attribute__((always_inline))
#endif

namespace anl {

// x^gamma for x >= 0. The published exponents avoid the logarithm.
template <class M>
ANL_HD typename M::V focal_weight(typename M::V x, double gamma) {
  using V = typename M::V;
  if (gamma == 0.5) return M::sqrt(x);
  if (gamma == 0.0) return M::set(1.0);
  if (gamma == 1.0) return x;
  if (gamma == 2.0) return x * x;
  const V zero = M::set(0.0);
  return x > zero ? M::exp(M::set(gamma) * M::log(x)) : zero;
}

}  // namespace anl
