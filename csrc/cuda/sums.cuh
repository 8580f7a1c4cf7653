// The sums of both sweeps in a thread, what merges them over threads, and a row between its sweeps. What is summed, and
// what follows from it, stands in row_math.h.
//
// The sums leave the target out. A kernel puts -inf in its place where it keeps the row (what lies outside the row is
// -inf too), reads the target's logit apart, and writes the target's gradient last.
#pragma once

#include "reduce.cuh"

namespace anl {
namespace gpu {

constexpr double INF = __builtin_inf();
constexpr double NOT_A_NUMBER = __builtin_nan("");

template <class T>
ANL_DEVICE T minus_inf() {
  return T(-INF);
}

// ---- the first sweep -------------------------------------------------------------------------------------------------

// The sums of some of a row's classes about the largest of them. A is float or double: double where many are merged.
template <class A, bool FULL>
struct AnchoredSums {
  A max;  // -inf if there are none
  A min;  // +inf if there are none
  FirstSums<Scalar<A>, FULL> sums;

  // What is subtracted from the logits while sums are made: max, and any number if that is none.
  ANL_DEVICE A anchor() const { return max == A(-INF) ? A(0) : max; }

  // max is known; z: a logit, or -inf for what does not count. NaN and +inf leave a NaN in the sum of exps.
  ANL_DEVICE void add(A z, A anchor) {
    sums.add_exp(Scalar<A>::class_exp(z - anchor));
    add_gap(z, anchor);
  }
  ANL_DEVICE void add_gap(A z, A anchor) {
    const A x = z - anchor;
    sums.template add_gap<true>(x);
    if (x != A(-INF)) min = z < min ? z : min;
  }

  // The same of a class that exists; count_existing(how many, the smallest) does the rest for all that do.
  ANL_DEVICE void add_existing(A z, A anchor) {
    sums.add_exp(Scalar<A>::class_exp(z - anchor));
    sums.template add_gap<false>(z - anchor);
  }
  ANL_DEVICE void count_existing(A count, A low) {
    min = low < min ? low : min;
    sums.of[COUNT] += count;
  }

  // The same for E of them, the smallest of which is `low`. Most often all exist, and need no looking at.
  template <int E>
  ANL_DEVICE void add_all(const A (&z)[E], A low, A anchor) {
#pragma unroll
    for (int j = 0; j < E; ++j) sums.add_exp(Scalar<A>::class_exp(z[j] - anchor));
    if (low > A(-INF)) {
#pragma unroll
      for (int j = 0; j < E; ++j) sums.template add_gap<false>(z[j] - anchor);
      count_existing(A(E), low);
    } else {
#pragma unroll
      for (int j = 0; j < E; ++j) add_gap(z[j], anchor);
    }
  }

  // The same sums about a larger max.
  ANL_DEVICE void rebase(A larger) {
    if (max == larger) return;
    sums.rebase(sums.of[COUNT] > A(0) ? larger - max : A(0));
    max = larger;
  }

  // Other classes, whose sums are about the same max.
  ANL_DEVICE void add(const AnchoredSums& other) {
    min = other.min < min ? other.min : min;
    sums.add(other.sums);
  }
};

// ---- the second sweep ------------------------------------------------------------------------------------------------

// row_math.h's second sweep over logits as they are stored.
template <class T>
struct RowSweep {
  using M = Scalar<T>;

  SecondSweep<M> classes;
  T max;

  // each(add) calls add(z) for every logit of the thread's. What the row's loss looks for is asked before, not per class;
  // a full kernel makes the mass that few losses read in any case.
  template <bool FULL, class F>
  ANL_DEVICE void run(SecondSums<M, FULL>& sums, const F& each) const {
    if constexpr (FULL) {
      if (classes.focal) return each([&](T z) { classes.template add_as<true, true>(sums, z - max); });
    } else {
      if (!classes.mass) return each([&](T z) { classes.template add_as<false, false>(sums, z - max); });
    }
    each([&](T z) { classes.template add_as<true, false>(sums, z - max); });
  }
};

// ---- sums of either sweep: X stands for AnchoredSums or SecondSums -----------------------------------------------------

// No class, about the same max.
template <class A, bool FULL>
ANL_DEVICE void clear(AnchoredSums<A, FULL>& s) {
  s.min = A(INF);
  s.sums = {};
}
template <class M, bool FULL>
ANL_DEVICE void clear(SecondSums<M, FULL>& s) {
  s = {};
}
template <class A, bool FULL>
ANL_DEVICE void forget_max(AnchoredSums<A, FULL>& s) {
  s.max = A(-INF);
}
template <class M, bool FULL>
ANL_DEVICE void forget_max(SecondSums<M, FULL>&) {}
template <class X>
ANL_DEVICE X none() {
  X s;
  forget_max(s);
  clear(s);
  return s;
}

template <class To, class From>
ANL_DEVICE void convert_each(To& to, const From& from) {
#pragma unroll
  for (int i = 0; i < To::SIZE; ++i) to.of[i] = typename To::V(from.of[i]);
}
template <class B, class A, bool FULL>
ANL_DEVICE AnchoredSums<B, FULL> convert(const AnchoredSums<A, FULL>& s) {
  AnchoredSums<B, FULL> out = {B(s.max), B(s.min)};
  convert_each(out.sums, s.sums);
  return out;
}
template <class B, class A, bool FULL>
ANL_DEVICE SecondSums<Scalar<B>, FULL> convert(const SecondSums<Scalar<A>, FULL>& s) {
  SecondSums<Scalar<B>, FULL> out;
  convert_each(out, s);
  return out;
}

struct Merge {
  template <class A, bool FULL>
  ANL_DEVICE AnchoredSums<A, FULL> operator()(AnchoredSums<A, FULL> a, AnchoredSums<A, FULL> b) const {
    const A max = b.max > a.max ? b.max : a.max;
    a.rebase(max);
    b.rebase(max);
    a.add(b);
    return a;
  }
  template <class M, bool FULL>
  ANL_DEVICE SecondSums<M, FULL> operator()(SecondSums<M, FULL> a, const SecondSums<M, FULL>& b) const {
    a.add(b);
    return a;
  }
};
// The same where all AnchoredSums are about one max.
struct MergeSameMax {
  template <class X>
  ANL_DEVICE X operator()(X a, const X& b) const {
    a.add(b);
    return a;
  }
};

// Every number of a group of lanes' sums, about one max, by reduce(number, merge).
template <class A, bool FULL, class Reduce>
ANL_DEVICE void reduce_each(AnchoredSums<A, FULL>& s, const Reduce& reduce) {
  s.min = reduce(s.min, Smallest<A>());
#pragma unroll
  for (A& sum : s.sums.of) sum = reduce(sum, Add<A>());
}
template <class M, bool FULL, class Reduce>
ANL_DEVICE void reduce_each(SecondSums<M, FULL>& s, const Reduce& reduce) {
#pragma unroll
  for (auto& sum : s.of) sum = reduce(sum, Add<typename M::V>());
}

// A warp's sums in each of its lanes: about one max that all of them know, or about whatever is the largest.
struct WarpSum {
  template <class X>
  ANL_DEVICE X operator()(X s) const {
    reduce_each(s, [](auto number, const auto& merge) { return warp_reduce(number, merge); });
    return s;
  }
};
struct WarpMerge {
  template <class A, bool FULL>
  ANL_DEVICE AnchoredSums<A, FULL> operator()(AnchoredSums<A, FULL> s) const {
    s.rebase(warp_reduce(s.max, Largest<A>()));
    return WarpSum()(s);
  }
  template <class M, bool FULL>
  ANL_DEVICE SecondSums<M, FULL> operator()(const SecondSums<M, FULL>& s) const {
    return WarpSum()(s);
  }
};

// All threads' sums, in every lane of warp 0. `shared` has a place for every warp; a __syncthreads stands between two uses
// of it.
template <class Reduce, class X, class Wide>
ANL_DEVICE Wide block_merge(const X& own, Wide* shared, const Reduce& reduce) {
  const unsigned lane = lane_index(), warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const X s = reduce(own);
  if (lane == 0) shared[warp] = convert<double>(s);
  __syncthreads();
  if (warp > 0) return none<Wide>();
  Wide one = shared[lane < warps ? lane : 0];
  if (lane >= warps) clear(one);
  return reduce(one);
}

// ---- a row between its sweeps ------------------------------------------------------------------------------------------

// What exp(z_j - max) is multiplied with to be p_j: 1 where a full kernel's focal parts made p_j already.
template <bool FULL, class T>
ANL_DEVICE T norm_of(const Program& prog, T inv_sum) {
  return FULL && needs_focal(prog) ? T(1) : inv_sum;
}

template <class T>
struct Row {
  using M = Scalar<T>;

  RowStatistics<M> stats;
  T max, inv_sum;
  bool second;  // whether the second sweep has anything to find

  // After the first sweep. A NaN or +inf among the logits, or a target that does not exist, makes everything NaN.
  template <class A, bool FULL>
  ANL_DEVICE void set_first_sums(const Program& prog, AnchoredSums<A, FULL> first, T z_y) {
    first.rebase(A(z_y) > first.max ? A(z_y) : first.max);
    max = T(first.max);
    const auto& sum = first.sums.of;
    const bool bad = !(sum[TAIL] < A(INF)) || !(z_y > T(-INF));
    const T x_y = bad ? T(NOT_A_NUMBER) : z_y - max;
    anl::set_first_sums<M>(stats, x_y, sum);
    inv_sum = M::divide(T(1), T(sum[TAIL]) + M::exp(x_y));
    second = needs_second(prog) && !bad;
    if (!second || (FULL && needs_focal(prog))) return;
    const A height = A(prog.clamp_height) - A(stats.log_sum);
    if (first.max - first.min < height) {  // every class is above the clamp
      SecondSums<Scalar<A>, false> all;
      all.set_all_above(sum[COUNT], sum[GAP], height);
      anl::set_second_sums<M>(stats, all.of, inv_sum);
      second = false;
    }
  }

  ANL_DEVICE RowSweep<T> sweep(const Program& prog) const {
    return {SecondSweep<M>::of_row(prog, stats.log_sum), max};
  }

  // After the second sweep.
  template <class A, bool FULL>
  ANL_DEVICE void set_second_sums(const Program& prog, const SecondSums<Scalar<A>, FULL>& sums) {
    anl::set_second_sums<M>(stats, sums.of, norm_of<FULL>(prog, inv_sum));
  }
};

// ---- the gradient of a row ---------------------------------------------------------------------------------------------

// row_math.h's gradient of logits as they are stored.
template <class T>
struct RowGradient {
  GradientRow<Scalar<T>> row;
  T max;

  // A row that is not read: every logit stands for 0 here.
  static ANL_DEVICE RowGradient constant(T value) { return {GradientRow<Scalar<T>>::constant(value), T(0)}; }

  template <unsigned PARTS>
  ANL_DEVICE T at(T z) const {
    return row.template at<PARTS>(z - max);
  }

  // Whether all classes are above the clamp, the smallest logit being `low`.
  ANL_DEVICE bool all_above(T low) const { return low - max > row.threshold; }
};

template <unsigned PARTS>
struct Parts {
  static constexpr unsigned value = PARTS;
};

// f(Parts<...>()) with what the gradient of the program's losses can depend on: asked before a row's classes, not for each.
template <bool FULL, class F>
ANL_DEVICE void by_parts(const Program& prog, const F& f) {
  if constexpr (FULL) {
    if (needs_focal(prog)) return f(Parts<FOCAL_PARTS>());
    f(Parts<FULL_PARTS>());
  } else {
    f(Parts<LEAN_PARTS>());
  }
}

}  // namespace gpu
}  // namespace anl
