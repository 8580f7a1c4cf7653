// The first sweep of lean kernels over float logits, many at a time.
#pragma once

#include "sums.cuh"

namespace anl {
namespace gpu {

// While no class is above the anchor, the exponents l = log2_of(z), which the exps take in any case, are below 0, but for
// those of the anchor itself: so the smallest has the largest bits, and integers, three to an instruction, find it. What is
// above the anchor is so by a unit in its last place or more, 1.44 in l, and l's shift was rounded by 1 at most: l is above 0.
struct FloatFirstSweep {
  using Sums = AnchoredSums<float, false>;
  using Exps = ClassExps<float, false>;
  static constexpr Exps NO_ANCHOR = {1.0f, FLT_MAX};  // every class that exists is above it
  static constexpr uint32_t MISSING = 0xff800000u;       // -inf

  Sums& sums;
  Exps exps = NO_ANCHOR;
  float of_anchor = 0.0f, inverse = 0.0f;  // log2_of(anchor); from exponents of 2 to logits

  template <int E>
  ANL_DEVICE void add(const float (&z)[E]) {
    float l[E], e[E];
    exps.log2_of(z, l);
    if (largest(l) >= 0) {
      float high = z[0];
#pragma unroll
      for (int j = 1; j < E; ++j) high = larger(high, z[j]);
      sums.rebase(high);
      exps = sums.exps();
      of_anchor = exps.log2_of(sums.anchor());
      inverse = exps.inverse();
      exps.log2_of(z, l);
    }
    const uint32_t low = lowest(l);
#pragma unroll
    for (int j = 0; j < E; ++j) e[j] = exp2_approx(l[j]);
    sums.sums.add_exp(sum_of(e));
    if (low < MISSING) {
      // Rounded so that the smallest is that, or a little below it.
      const float below = (__uint_as_float(low) - of_anchor) * (inverse * (1.0f + 0x1p-20f));
      sums.add_existing(float(E), fmaf(float(E), of_anchor, -sum_of(l)) * inverse, add_down(sums.max, below));
    } else {
#pragma unroll
      for (int j = 0; j < E; ++j) sums.add_gap(z[j], sums.anchor());
    }
  }

  // The largest as integers: below 0 if all floats are.
  template <int E>
  static ANL_DEVICE int largest(const float (&l)[E]) {
    return largest_bits<int>(l, [](int a, int b, int c) { return __vimax3_s32(a, b, c); });
  }
  // The bits of the smallest, as far as any is below 0.
  template <int E>
  static ANL_DEVICE uint32_t lowest(const float (&l)[E]) {
    return largest_bits<uint32_t>(l, [](uint32_t a, uint32_t b, uint32_t c) { return __vimax3_u32(a, b, c); });
  }
  template <class X, int E, class F>
  static ANL_DEVICE X largest_bits(const float (&l)[E], const F& largest_of_three) {
    X x = X(__float_as_uint(l[0]));
#pragma unroll
    for (int j = 1; j < E; j += 2)
      x = largest_of_three(x, X(__float_as_uint(l[j])), X(__float_as_uint(l[j + 1 < E ? j + 1 : j])));
    return x;
  }
};

}  // namespace gpu
}  // namespace anl
