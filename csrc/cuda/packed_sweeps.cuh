// The sweeps of lean kernels over classes of 16 bits, in words of two: packed instructions compare and select, products
// widen, scale and add up (packed.cuh). All lanes of a warp call these together; `inside`: the lane has classes at all.
#pragma once

#include "row_gradient.cuh"

namespace anl {
namespace gpu {

// The half of `value` in the place of a class, if that is one of the words'.
template <int W>
ANL_DEVICE void put_half(uint32_t (&words)[W], int at, uint32_t value) {
  const uint32_t half = at % 2 ? 0xffff0000u : 0x0000ffffu;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const uint32_t mask = at >= 0 && j == at / 2 ? half : 0;  // a choice of words would be made by an index, in memory
    words[j] = (words[j] & ~mask) | (value & mask);
  }
}

// Exps are about `base`, some logit that was the largest when it was chosen: another is only chosen where exps would become
// huge. Sums of logits as short as these are exact, or nearly so, and need no anchor.
template <class S>
struct PackedFirstSweep {
  using Sums = AnchoredSums<float, false>;
  static constexpr float ROOM = 20.0f;  // above base: a sum of exp(20) is as good as one of 1

  const Diagonals<3> log2e = log2e_diagonals<S, 3>();
  const uint32_t both = halves<S>();
  float base = 0.0f, tail = 0.0f, sum = 0.0f, count = 0.0f;
  float gap = 0.0f, gaps = 0.0f;  // the sum of base - z, of so many: those added one by one
  Quad shift = {};
  uint32_t high = twice(Format<S>::MINUS_INF), low = twice(Format<S>::INF), limit = high;

  // W words of classes. target: which of them is the target, or below 0. Where a class of the warp's does not exist, or
  // one is FAR, one_by_one(add) calls add(j, z) for the lane's classes besides the target instead.
  template <int W, class F>
  ANL_DEVICE void add(uint32_t (&words)[W], bool inside, int target, const F& one_by_one) {
    const bool any_target = __any_sync(ALL_LANES, target >= 0);
    if (any_target) put_half(words, target, target < 2 ? words[1] : words[0]);  // a class of another word in its place
    uint32_t largest = words[0], smallest = words[0];
#pragma unroll
    for (int j = 1; j < W; ++j) {
      largest = larger2<S>(largest, words[j]);
      smallest = smaller2<S>(smallest, words[j]);
    }
    const uint32_t near =
        above2<S>(smallest, twice(Format<S>::FAR_BELOW)) & ~above2<S>(largest, twice(Format<S>::FAR_ABOVE));
    const uint32_t beyond = above2<S>(largest, limit);
    if (__any_sync(ALL_LANES, inside && near != twice(Format<S>::ONE))) {
      if (inside) one_by_one([&](int, S z) { add_one(z); });
      __syncwarp();
      shift = quad(about(base).shift);
      return;
    }
    if (__any_sync(ALL_LANES, inside && beyond)) {
      if (inside && beyond) choose_base(fmaxf(low_half<S>(largest), high_half<S>(largest)));
      __syncwarp();
      shift = quad(about(base).shift);
    }
    if (any_target) put_half(words, target, 0);
    Quad sums = {};
#pragma unroll
    for (int j = 0; j < W; j += 4) sums = sum_of_eight<S>(words + j, both, sums);
    if (any_target) put_half(words, target, twice(Format<S>::LOWEST));
    Two exps = {};
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const Quad x = times_diagonals<S>(words[j], words[j + 1], log2e, shift);
#pragma unroll
      for (int k = 0; k < 4; k += 2) exps = add2(exps, {exp2_approx(x.of[k]), exp2_approx(x.of[k + 1])});
    }
    if (!inside) return;
    tail += exps.of[0] + exps.of[1];
    sum += sums.of[0] + sums.of[2];
    count += 2.0f * W - (target >= 0 ? 1.0f : 0.0f);
    high = larger2<S>(high, largest);
    low = smaller2<S>(low, smallest);
  }

  ANL_DEVICE void add_one(S stored) {
    const float z = widen(stored);
    if (z == -float(INF)) return;
    if (z > low_half<S>(limit)) choose_base(z);
    tail += about(base).at(z);
    gap += base - z;
    gaps += 1.0f;
    high = larger2<S>(high, twice(stored.bits));
    low = smaller2<S>(low, twice(stored.bits));
  }

  static ANL_DEVICE ClassExps<float, false> about(float base) { return ClassExps<float, false>::about(base); }

  ANL_DEVICE void choose_base(float largest) {
    if (count + gaps > 0.0f) tail *= about(base).scale_to(about(largest));
    if (gaps > 0.0f) gap += gaps * (largest - base);
    base = largest;
    limit = twice(narrow<S>(largest + ROOM).bits);
  }

  ANL_DEVICE Sums result() const {
    Sums s = none<Sums>();
    if (!(count + gaps > 0.0f)) return s;
    s.max = fmaxf(low_half<S>(high), high_half<S>(high));
    s.sums.of[TAIL] = tail * about(base).scale_to(s.exps());
    if (gaps > 0.0f) s.sums.of[GAP] = gap + gaps * (s.max - base);
    s.sums.of[COUNT] = gaps;
    s.add_existing(count, fmaf(count, s.max, -sum), fminf(low_half<S>(low), high_half<S>(low)));
    return s;
  }
};

// The largest number, as it is stored, that is not above x; finite.
template <class S>
ANL_DEVICE S stored_below(float x) {
  S down;
  if constexpr (std::is_same_v<S, bfloat16_t>) {  // half of a float's bits, which grow as numbers below 0 fall
    const uint32_t bits = __float_as_uint(x);
    down.bits = uint16_t((bits + (int32_t(bits) < 0 ? 0xffff : 0)) >> 16);
  } else {
    down = narrow<S>(x);
    if (widen(down) > x) down.bits += down.bits & 0x8000 ? 1 : down.bits & 0x7fff ? -1 : 0x8001;
  }
  return down.bits == Format<S>::MINUS_INF ? S{Format<S>::LOWEST} : down;
}

// The heights of classes above the clamp.
template <class S>
struct PackedHeights {
  using Sums = SecondSums<Scalar<float>, false>;

  const uint32_t both = halves<S>();
  uint32_t bound;  // the largest of the stored numbers that are not above the clamp
  float low, lift; // the same, and how far above it the clamp is

  ANL_DEVICE explicit PackedHeights(float clamp_bound) {
    const S down = stored_below<S>(clamp_bound);
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

// The same where a lane's words are its own, and no tensor core adds them up: of the words' lower halves and of their upper
// ones. Sums of 16-bit numbers lose nothing to a bound that is as large as they are. Up to MOST words.
template <class S>
struct WordHeights {
  static constexpr int MOST = 256;  // whole numbers that are exact in both formats
  const float clamp[2];
  const S low[2];  // the largest of the stored numbers that are not above the clamp
  const uint32_t bound;
  uint32_t count = 0;
  Two raised = {};

  ANL_DEVICE WordHeights(float lower_clamp, float upper_clamp)
      : clamp{lower_clamp, upper_clamp}, low{stored_below<S>(lower_clamp), stored_below<S>(upper_clamp)},
        bound(uint32_t(low[1].bits) << 16 | low[0].bits) {}

  template <int W>
  ANL_DEVICE void add(const uint32_t (&words)[W]) {
    Two sum;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const uint32_t high = larger2<S>(words[j], bound);
      count = add2<S>(count, above2<S>(words[j], bound));
      const Two halves = {low_half<S>(high), high_half<S>(high)};
      sum = j > 0 ? add2(sum, halves) : halves;
    }
    raised = add2(raised, sum);
  }
  // Adds the halves 0 or 1 of all `words` to the sums.
  ANL_DEVICE void finish(int half, float words, SecondSums<Scalar<float>, false>& sums) const {
    const float found = half ? high_half<S>(count) : low_half<S>(count), base = widen(low[half]);
    sums.of[ABOVE_COUNT] += found;
    sums.of[ABOVE_SUM] += fmaf(-found, clamp[half] - base, fmaf(-words, base, raised.of[half]));
  }
};

// Of losses that ask for no more.
template <class S>
struct PackedSecondSweep {
  typename PackedHeights<S>::Sums& sums;
  const PackedHeights<S> heights;

  template <int W, class F>
  ANL_DEVICE void add(uint32_t (&words)[W], bool inside, int target, const F&) const {
    if (target >= 0) put_half(words, target, twice(Format<S>::LOWEST));
    __syncwarp();
    heights.add(sums, words, inside);
  }
};

// The gradient of classes that all exist. EXACT: what multiplies the exps depends on the clamp, too, or what is added for
// classes above it is a small difference. Else two parts of each factor are enough for a gradient of 16 bits.
template <class S, bool EXACT>
struct PackedGradient {
  static constexpr int PARTS = EXACT ? 3 : 2;
  const Diagonals<PARTS> log2e = log2e_diagonals<S, PARTS>();
  uint32_t bound;
  Quad shift, offset, slope;
  Diagonals<PARTS> more_offset, more_slope;  // of classes above the clamp

  static ANL_DEVICE bool needs_exact(const RowGradient<float, false>& g) {
    constexpr float MOST = 0x1p16f;  // for such logits, what two parts leave of log2(e) is made up for in the slope
    const float more = g.row.offset_above - g.row.offset;
    return g.row.slope != g.row.slope_above || !(fabsf(more) <= fabsf(g.row.offset_above)) || !(fabsf(g.max) < MOST);
  }

  ANL_DEVICE explicit PackedGradient(const RowGradient<float, false>& g)
      : bound(twice(stored_below<S>(g.bound).bits)), shift(quad(g.exps.shift)), offset(quad(g.row.offset)),
        more_offset(diagonals_of_above<S, PARTS>(g.row.offset_above - g.row.offset)) {
    if constexpr (EXACT) {
      slope = quad(g.row.slope);
      more_slope = diagonals_of_above<S, PARTS>(g.row.slope_above - g.row.slope);
    } else {
      slope.of[0] = g.row.slope * exp2_approx(g.max * log2e_rest<S>());
    }
  }

  // The gradient in the place of the logits.
  template <int W, class F>
  ANL_DEVICE void operator()(uint32_t (&words)[W], bool, const F&) const {
#pragma unroll
    for (int j = 0; j < W; j += 2) {
      const uint32_t a = above2<S>(words[j], bound), b = above2<S>(words[j + 1], bound);
      const Quad x = times_diagonals<S>(words[j], words[j + 1], log2e, shift);
      Quad value = times_diagonals<bfloat16_t>(a, b, more_offset, offset), slopes;
      if constexpr (EXACT) slopes = times_diagonals<bfloat16_t>(a, b, more_slope, slope);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int i = 2 * k;
        const Two exps = {exp2_approx(x.of[i]), exp2_approx(x.of[i + 1])};
        const Two by = EXACT ? Two{slopes.of[i], slopes.of[i + 1]} : Two{slope.of[0], slope.of[0]};
        const Two g = fma2(exps, by, {value.of[i], value.of[i + 1]});
        words[j + k] = narrow2<S>(g.of[0], g.of[1]);
      }
    }
  }
};

}  // namespace gpu
}  // namespace anl
