// The sweeps of lean kernels over classes of 16 bits, in words of two: packed instructions compare and select, products
// widen, scale and add up (packed.cuh). All lanes of a warp call these together; `inside`: the lane has classes at all.
#pragma once

#include "packed.cuh"
#include "sums.cuh"

namespace anl {
namespace gpu {

template <class S>
struct PackedFirstSweep {
  using Sums = AnchoredSums<float, false>;

  Sums& sums;
  const Diagonals log2e = log2e_diagonals<S>();
  const uint32_t both = halves<S>();
  Quad shift = quad(sums.exps().shift);

  // W words of classes. Where one of the warp's words must not be taken as it is (`odd`, or a class does not exist),
  // one_by_one() adds the lane's classes instead.
  template <int W, class F>
  ANL_DEVICE void add(const uint32_t (&words)[W], bool inside, bool odd, const F& one_by_one) {
    uint32_t high = words[0], low = words[0];
#pragma unroll
    for (int j = 1; j < W; ++j) {
      high = larger2<S>(high, words[j]);
      low = smaller2<S>(low, words[j]);
    }
    const float largest = fmaxf(low_half<S>(high), high_half<S>(high));
    const float smallest = fminf(low_half<S>(low), high_half<S>(low));
    odd = odd || !(smallest > -float(INF));
    if (__any_sync(ALL_LANES, inside && (odd || largest > sums.max))) {
      const bool any_odd = __any_sync(ALL_LANES, inside && odd);
      if (any_odd && inside)
        one_by_one();
      else if (inside && largest > sums.max)
        sums.rebase(largest);
      __syncwarp();
      shift = quad(sums.exps().shift);
      if (any_odd) return;
    }
    Quad sum = {};
#pragma unroll
    for (int j = 0; j < W; j += 4) sum = sum_of_eight<S>(words + j, both, sum);
    float tail[2] = {};
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const Quad x = times_diagonals<S>(words[j], words[j + 1], log2e, shift);
#pragma unroll
      for (int k = 0; k < 4; ++k) tail[k % 2] += exp2_approx(x.of[k]);
    }
    if (!inside) return;
    sums.sums.add_exp(tail[0] + tail[1]);
    sums.add_existing(2.0f * W, fmaf(2.0f * W, sums.anchor(), -(sum.of[0] + sum.of[2])), smallest);
  }
};

// Of losses that do not ask for the mass below the clamp.
template <class S>
struct PackedSecondSweep {
  using Sums = SecondSums<Scalar<float>, false>;

  const uint32_t both = halves<S>();
  uint32_t bound;  // the largest of the stored numbers that are not above the clamp
  float low, lift; // the same, and how far above it the clamp is

  ANL_DEVICE explicit PackedSecondSweep(float clamp_bound) {
    S down = narrow<S>(clamp_bound);
    if (widen(down) > clamp_bound) down.bits += down.bits & 0x8000 ? 1 : down.bits & 0x7fff ? -1 : 0x8001;
    if (down.bits == Bits<S>::MINUS_INF) down.bits = Bits<S>::LOWEST;
    bound = twice(down.bits);
    low = widen(down);
    lift = clamp_bound - low;
  }

  template <int W>
  ANL_DEVICE void add(Sums& sums, const uint32_t (&words)[W], bool inside) const {
    Quad sum = {}, count = {};
#pragma unroll
    for (int j = 0; j < W; j += 4) {
      uint32_t raised[4], above[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        raised[k] = larger2<S>(words[j + k], bound);
        above[k] = above2<S>(words[j + k], bound);
      }
      sum = sum_of_eight<S>(raised, both, sum);
      count = sum_of_eight<S>(above, both, count);
    }
    if (!inside) return;
    const float found = count.of[0] + count.of[2];
    sums.of[ABOVE_COUNT] += found;
    sums.of[ABOVE_SUM] += fmaf(-found, lift, fmaf(-2.0f * W, low, sum.of[0] + sum.of[2]));
  }
};

// The gradient of classes that all exist. SLOPES: what multiplies the exps depends on the clamp, too.
template <class S, bool SLOPES>
struct PackedGradient {
  const Diagonals log2e = log2e_diagonals<S>();
  uint32_t bound;
  Quad shift, offset, slope;
  Diagonals more_offset, more_slope;  // of classes above the clamp

  ANL_DEVICE explicit PackedGradient(const RowGradient<float, false>& g)
      : bound(PackedSecondSweep<S>(g.bound).bound), shift(quad(g.exps.shift)), offset(quad(g.row.offset)),
        more_offset(diagonals_of_above<S>(g.row.offset_above - g.row.offset)) {
    if constexpr (SLOPES) {
      slope = quad(g.row.slope);
      more_slope = diagonals_of_above<S>(g.row.slope_above - g.row.slope);
    } else {
      slope.of[0] = g.row.slope;
    }
  }

  // The gradient in the place of the logits.
  template <int W>
  ANL_DEVICE void operator()(uint32_t (&words)[W]) const {
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const uint32_t a = above2<S>(words[j], bound), b = above2<S>(words[j + 1], bound);
      const Quad x = times_diagonals<S>(words[j], words[j + 1], log2e, shift);
      Quad value = times_diagonals<bfloat16_t>(a, b, more_offset, offset), slopes;
      if constexpr (SLOPES) slopes = times_diagonals<bfloat16_t>(a, b, more_slope, slope);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        value.of[k] = fmaf(exp2_approx(x.of[k]), SLOPES ? slopes.of[k] : slope.of[0], value.of[k]);
      words[j] = narrow2<S>(value.of[0], value.of[1]);
      words[j + 1] = narrow2<S>(value.of[2], value.of[3]);
    }
  }
};

}  // namespace gpu
}  // namespace anl
