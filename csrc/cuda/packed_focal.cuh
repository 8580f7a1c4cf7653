// The sweeps of losses with focal weights over classes of 16 bits, in words of two (packed_sweeps.cuh).
//
// Where p is small, w = (1 - p)^gamma is 1 - u with u = p (gamma + p gamma (1 - gamma) / 2), to the last bit of a float. So
// the sums with w are those without it, which packed instructions make, and small corrections; and w is no power, but a
// multiply-add. The few classes whose p is larger are taken one by one. Below the clamp, u is less than half of the last
// bit of 1, and left out.
#pragma once

#include "packed_sweeps.cuh"

namespace anl {
namespace gpu {

// u, of numbers e about a row's largest logit: p is norm e.
struct FocalSeries {
  static constexpr float LOG_MOST = -5.5451775f;  // p is 2^-8 at most
  float shift, log2_norm, first, second;

  // Whether it is exact enough: of rows whose classes all exist.
  template <class Clamped>
  static ANL_DEVICE bool fits(const Clamped& row, float max) {
    const float gamma = float(row.gamma), third = gamma * (1.0f - gamma) * (2.0f - gamma) / 6.0f;  // multiplies p^3
    const float clamp = row.log_sum - row.threshold;                                             // 15.94 for 2^-23
    return fabsf(third) <= 0.5f && clamp > 15.9f && clamp < 80.0f && fabsf(max) < 0x1p12f;
  }

  ANL_DEVICE FocalSeries(float max, float log_sum, double power) : shift(-(max * LOG2_E)) {
    const float gamma = float(power), norm = exp2_approx(log2_norm = -fmaf(log_sum, LOG2_E, fmaf(max, LOG2_E, shift)));
    first = gamma * norm;
    second = 0.5f * gamma * (1.0f - gamma) * norm * norm;
  }
  ANL_DEVICE float at(float e) const { return e * fmaf(e, second, first); }

  // The largest logit, as it is stored, whose p is no more than that.
  template <class S>
  static ANL_DEVICE uint32_t top(float max, float log_sum) {
    return twice(stored_below<S>(max + (log_sum + LOG_MOST)).bits);
  }
};

// The largest of the words' lower halves, and of their upper ones.
template <class S, int W>
ANL_DEVICE uint32_t largest_of(const uint32_t (&words)[W]) {
  uint32_t largest = words[0];
#pragma unroll
  for (int j = 1; j < W; ++j) largest = larger2<S>(largest, words[j]);
  return largest;
}

template <class S>
struct PackedFocalSweep {
  using Sums = SecondSums<Scalar<float>, true>;

  const RowSweep<float, true>& row;
  Sums& sums;
  SecondSums<Scalar<float>, false> above = {};  // the heights are those above `bound`
  const PackedHeights<S> clamp;
  const FocalSeries series;
  const Diagonals<3> log2e = log2e_diagonals<S, 3>();
  const uint32_t top;
  Quad shift;
  float u = 0.0f, ux = 0.0f;                     // of classes above the clamp, and of others as if they were at `low`
  float sum = 0.0f, count = 0.0f, slots = 0.0f;  // of all logits; how many they are, and with the target

  ANL_DEVICE PackedFocalSweep(const RowSweep<float, true>& sweep, Sums& found)
      : row(sweep), sums(found), clamp(sweep.bound), series(sweep.max, sweep.classes.log_sum, sweep.classes.gamma),
        top(FocalSeries::top<S>(sweep.max, sweep.classes.log_sum)), shift(quad(series.shift)) {}

  // Like PackedFirstSweep's. one_by_one(add) calls add(j, z) for the lane's classes besides the target.
  template <int W, class F>
  ANL_DEVICE void add(uint32_t (&words)[W], bool inside, int target, const F& one_by_one) {
    const bool any_target = __any_sync(ALL_LANES, target >= 0);
    if (any_target) put_half(words, target, twice(Format<S>::LOWEST));
    const uint32_t largest = largest_of<S>(words);
    if (__any_sync(ALL_LANES, inside && above2<S>(largest, top))) {
      if (inside) row.run(sums, [&](const auto& add) { one_by_one([&](int, S z) { add(widen(z)); }); });
      __syncwarp();
      return;
    }
    if (any_target) put_half(words, target, 0);
    Quad all = {};
#pragma unroll
    for (int j = 0; j < W; j += 4) all = sum_of_eight<S>(words + j, clamp.both, all);
    if (any_target) put_half(words, target, twice(Format<S>::LOWEST));
    clamp.add(above, words, inside);
    float of[2] = {}, times_x[2] = {};
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const uint32_t a = larger2<S>(words[j], clamp.bound), b = larger2<S>(words[j + 1], clamp.bound);
      const Quad x = times_diagonals<S>(a, b, log2e, shift);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float v = series.at(exp2_approx(x.of[k]));
        of[k % 2] += v;
        times_x[k % 2] = fmaf(v, x.of[k], times_x[k % 2]);
      }
    }
    if (!inside) return;
    u += of[0] + of[1];
    ux += times_x[0] + times_x[1];
    sum += all.of[0] + all.of[2];
    slots += 2.0f * W;
    count += 2.0f * W - (target >= 0 ? 1.0f : 0.0f);
  }

  // What has not been taken one by one.
  ANL_DEVICE void finish() const {
    constexpr float LN2 = 0.6931471805599453f;
    const SecondSweep<Scalar<float>>& of_row = row.classes;
    const float found = above.of[ABOVE_COUNT], x = fmaf(clamp.low, LOG2_E, series.shift);
    const float u_low = (slots - found) * series.at(exp2_approx(x)), u_above = u - u_low;
    const float u_log = LN2 * fmaf(series.log2_norm, u_above, fmaf(-x, u_low, ux));  // of u_j l_j
    const float heights = fmaf(found, (row.bound - row.max) - of_row.threshold, above.of[ABOVE_SUM]);
    sums.of[ABOVE_COUNT] += found;
    sums.of[ABOVE_SUM] += heights;
    sums.of[FOCAL_SUM] += fmaf(count, of_row.log_sum, fmaf(count, row.max, -sum)) + u_log;
    sums.of[FOCAL_WEIGHT] += count - u_above;
    sums.of[FOCAL_ABOVE_SUM] +=
        fmaf(found, of_row.focal_clamp_height - (of_row.log_sum - of_row.threshold), heights) - u_log;
    sums.of[FOCAL_ABOVE_WEIGHT] += found - u_above;
  }
};

// The gradient of classes that all exist. Of u, p gamma is enough: where what is added nearly cancels the multiple of p,
// there are hundreds of such classes, and the target's gradient is hundreds of times as large.
template <class S>
struct PackedFocalGradient {
  const RowGradient<float, true>& row;
  const FocalSeries series;
  const uint32_t bound, top;
  const Diagonals<2> log2e = log2e_diagonals<S, 2>();
  Quad shift, offset, slope;
  Diagonals<3> more_offset;  // of classes above the clamp
  Diagonals<2> more_slope;

  ANL_DEVICE explicit PackedFocalGradient(const RowGradient<float, true>& g)
      : row(g), series(g.max, g.row.log_sum, g.row.gamma), bound(twice(stored_below<S>(g.bound).bits)),
        top(FocalSeries::top<S>(g.max, g.row.log_sum)), shift(quad(series.shift)),
        offset(quad(g.row.offset + g.row.weight)),
        more_offset(diagonals_of_above<S, 3>((g.row.offset_above - g.row.offset) + (g.row.weight_above - g.row.weight))) {
    const float rest = exp2_approx(g.max * log2e_rest<S>()), norm = exp2_approx(series.log2_norm);
    const float low = (g.row.slope * norm - g.row.weight * series.first) * rest;
    const float high = (g.row.slope_above * norm - g.row.weight_above * series.first) * rest;
    slope = quad(low);
    more_slope = diagonals_of_above<S, 2>(high - low);
  }

  // each(f) calls f(j, z) for the lane's classes besides the target.
  template <int W, class F>
  ANL_DEVICE void operator()(uint32_t (&words)[W], bool inside, const F& each) const {
    const uint32_t largest = largest_of<S>(words);
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const uint32_t a = above2<S>(words[j], bound), b = above2<S>(words[j + 1], bound);
      const Quad x = times_diagonals<S>(words[j], words[j + 1], log2e, shift);
      const Quad slopes = times_diagonals<bfloat16_t>(a, b, more_slope, slope);
      Quad value = times_diagonals<bfloat16_t>(a, b, more_offset, offset);
#pragma unroll
      for (int k = 0; k < 4; ++k) value.of[k] = fmaf(exp2_approx(x.of[k]), slopes.of[k], value.of[k]);
      words[j] = narrow2<S>(value.of[0], value.of[1]);
      words[j + 1] = narrow2<S>(value.of[2], value.of[3]);
    }
    if (inside && above2<S>(largest, top)) {
      each([&](int j, S stored) {
        const float z = widen(stored);
        if (z > low_half<S>(top)) put_half(words, j, twice(narrow<S>(row.template at<FOCAL_PARTS>(z)).bits));
      });
    }
    __syncwarp();
  }
};

}  // namespace gpu
}  // namespace anl
