// The policy of row_math.h on a GPU: a number per thread.
#pragma once

#include "primitives.cuh"

namespace anl {
namespace gpu {

// exp(x) to 2^-22 of its value, plus |x| roundings: for sums and gradients over many classes, not for scalars.
ANL_DEVICE float exp_approx(float x) { return exp2_approx(x * 1.4426950408889634f); }
ANL_DEVICE double exp_approx(double x) { return exp(x); }

// 1 / x to two ulps, in few instructions: of no x that is tiny, huge or infinite. NaN where x is 0.
ANL_DEVICE double inverse(double x) {
  double r = reciprocal_approx(x);
  r = fma(r, fma(-x, r, 1.0), r);
  return fma(r, fma(-x, r, 1.0), r);
}

// Rounded down.
ANL_DEVICE float add_down(float a, float b) { return __fadd_rd(a, b); }
ANL_DEVICE double add_down(double a, double b) { return __dadd_rd(a, b); }

template <class T>
struct ScalarMath;

template <>
struct ScalarMath<float> {
  using V = float;
  static ANL_DEVICE float set(double x) { return float(x); }
  static ANL_DEVICE float exp(float x) { return expf(x); }
  static ANL_DEVICE float log(float x) { return logf(x); }
  static ANL_DEVICE float log1p(float x) { return log1pf(x); }
  static ANL_DEVICE float expm1(float x) { return expm1f(x); }
  // To an ulp; 0 of what is below 2^-126.
  static ANL_DEVICE float sqrt(float x) {
    const float r = rsqrt_approx(fmaxf(x, 0x1p-126f)), y = x * r;
    return fmaf(fmaf(-y, y, x), 0.5f * r, y);
  }
  // Divisions by one number share its reciprocal. No divisor is tiny, and what is divided by a huge one may be 0.
  static ANL_DEVICE float divide(float a, float b) {
    const float r = reciprocal_approx(b), wrong = fmaxf(fmaf(-b, r, 1.0f), -1.0f);  // -1 where b is infinite, and r 0
    return a * fmaf(r, wrong, r);
  }
};

template <>
struct ScalarMath<double> {
  using V = double;
  static ANL_DEVICE double set(double x) { return x; }
  static ANL_DEVICE double exp(double x) { return ::exp(x); }
  static ANL_DEVICE double log(double x) { return ::log(x); }
  static ANL_DEVICE double log1p(double x) { return ::log1p(x); }
  static ANL_DEVICE double expm1(double x) { return ::expm1(x); }
  static ANL_DEVICE double sqrt(double x) { return ::sqrt(x); }
  static ANL_DEVICE double divide(double a, double b) { return a / b; }
};

// The policy of row_math.h: one row or one class per thread.
template <class T>
struct Scalar : ScalarMath<T> {
  static ANL_DEVICE T class_exp(T x) { return exp_approx(x); }
  static ANL_DEVICE T class_exp_and_rest(T l, T& rest) {
    const T e = exp_approx(l);
    rest = l > T(-0.5) ? -ScalarMath<T>::expm1(l) : T(1) - e;
    return e;
  }
  static ANL_DEVICE void add_where(bool mask, T& sum, T x) {
    if (mask) sum += x;
  }
  static ANL_DEVICE bool negate(bool mask) { return !mask; }
};

// f(v) for every v of x, which f may replace. ROLLED: of more than four, two per turn of a loop, where f is long.
template <bool ROLLED, int N, class T, class F>
ANL_DEVICE void each_of(T (&x)[N], const F& f) {
  constexpr int SOME = ROLLED && N > 4 ? 2 : N;
  static_assert(N % SOME == 0, "whole turns");
#pragma unroll 1
  for (int i = 0; i < N; i += SOME) {  // x moves up, as registers have no index
    T done[SOME];
#pragma unroll
    for (int j = 0; j < SOME; ++j) {
      done[j] = x[j];
      f(done[j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = j + SOME < N ? x[j + SOME] : done[j + SOME - N];
  }
}

}  // namespace gpu
}  // namespace anl
