// The exps of a row's classes, in few instructions for each.
#pragma once

#include "scalar.cuh"
#include "two_floats.cuh"

namespace anl {
namespace gpu {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float FAR = 0x1p30f;  // logits so large are either alike or so far apart that one's exp is nothing

// The exps of a row's classes about an anchor, some logit. Lean kernels have one multiply-add for the exponent of 2, and
// round its result alone: shift is the anchor's part of it, rounded, and the correction makes up for that once per sum, not
// per class. About anchors that are FAR they take powers of 2 instead, which nothing rounds. Full kernels subtract the
// anchor: some of their sums take the exp of the largest logit to be exactly 1.
template <class T, bool FULL>
struct ClassExps {
  T unit, shift;

  static ANL_DEVICE ClassExps about(T anchor) { return {T(1), -anchor}; }
  ANL_DEVICE T at(T z) const { return exp_approx(z + shift); }
  // The sum of anchor - z, from what the exps are made of.
  template <int E>
  ANL_DEVICE T sum_of_gaps(const T (&z)[E], T) const {
    T sum = T(0);
#pragma unroll
    for (int j = 0; j < E; ++j) sum -= z[j] + shift;
    return sum;
  }
  // What multiplies exps about an anchor to make them exact.
  ANL_DEVICE T correction(T) const { return T(1); }
  // What multiplies them to make them those about another logit.
  ANL_DEVICE T scale_to(const ClassExps& other) const { return ScalarMath<T>::exp(other.shift - shift); }
};
template <>
struct ClassExps<float, false> {
  float unit, shift;

  static ANL_DEVICE ClassExps about(float anchor) {
    const float unit = fabsf(anchor) < FAR ? LOG2_E : 1.0f;
    return {unit, -(anchor * unit)};
  }
  ANL_DEVICE bool is_far() const { return unit != LOG2_E; }
  ANL_DEVICE float log2_of(float z) const { return fmaf(z, unit, shift); }
  ANL_DEVICE float at(float z) const { return exp2_approx(log2_of(z)); }
  template <int E>
  ANL_DEVICE void log2_of(const float (&z)[E], float (&l)[E]) const {
#pragma unroll
    for (int j = 0; j + 1 < E; j += 2) {
      const Two x = fma2({z[j], z[j + 1]}, {unit, unit}, {shift, shift});
      l[j] = x.of[0];
      l[j + 1] = x.of[1];
    }
    if (E % 2) l[E - 1] = log2_of(z[E - 1]);
  }
  // Adds to the sum of exps, and returns the sum of anchor - z, of classes that exist.
  template <int E>
  ANL_DEVICE float add(const float (&z)[E], float anchor, float& sum) const {
    float l[E], e[E];
    log2_of(z, l);
#pragma unroll
    for (int j = 0; j < E; ++j) e[j] = exp2_approx(l[j]);
    sum += sum_of(e);
    return fmaf(float(E), log2_of(anchor), -sum_of(l)) * inverse();
  }
  ANL_DEVICE float inverse() const { return is_far() ? 1.0f : 1.0f / LOG2_E; }
  ANL_DEVICE float correction(float anchor) const { return exp2_approx(-log2_of(anchor)); }
  ANL_DEVICE float scale_to(const ClassExps& other) const {
    return unit == other.unit ? exp2_approx(other.shift - shift) : 0.0f;
  }
};

}  // namespace gpu
}  // namespace anl
