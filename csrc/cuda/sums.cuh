// The sums of both sweeps in a thread, what merges them over threads, and a row between its sweeps. What is summed, and
// what follows from it, stands in row_math.h.
//
// The sums leave the target out. A kernel puts -inf in its place where it keeps the row (what lies outside the row is
// -inf too), reads the target's logit apart, and writes the target's gradient last.
#pragma once

#include "class_exps.cuh"
#include "packed.cuh"
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

// The sums of some of a row's classes about the largest of them. Float ones, of which many are made, are of the exps as
// ClassExps makes them; once they are merged, double ones are about the largest logit itself.
template <class A, bool FULL>
struct AnchoredSums {
  A max;  // -inf if there are none
  A min;  // +inf if there are none; from the first sweep of float logits, a little below the smallest
  FirstSums<Scalar<A>, FULL> sums;

  // What is subtracted from the logits while sums are made: max, and any number if that is none.
  ANL_DEVICE A anchor() const { return max == A(-INF) ? A(0) : max; }
  ANL_DEVICE ClassExps<A, FULL> exps() const { return ClassExps<A, FULL>::about(anchor()); }

  // max is known; z: a logit, or -inf for what does not count. NaN and +inf leave a NaN in the sum of exps.
  ANL_DEVICE void add(A z, A anchor) {
    sums.add_exp(ClassExps<A, FULL>::about(anchor).at(z));
    add_gap(z, anchor);
  }
  ANL_DEVICE void add_gap(A z, A anchor) {
    const A x = z - anchor;
    sums.template add_gap<true>(x);
    if (x != A(-INF)) min = z < min ? z : min;
  }
  // One class more, of any size.
  ANL_DEVICE void include(A z) {
    if (z > max) rebase(z);
    add(z, anchor());
  }

  // A class that exists; count_existing(how many, the smallest) does the rest for all that do.
  ANL_DEVICE void add_class(A z, A anchor) {
    sums.add_exp(ClassExps<A, FULL>::about(anchor).at(z));
    sums.template add_gap<false>(z - anchor);
  }
  ANL_DEVICE void count_existing(A count, A low) {
    min = smaller(min, low);
    sums.of[COUNT] += count;
  }

  // The same for E of them, the smallest of which is `low`; exps: exps(). Most often all exist, and need no looking at.
  template <int E>
  ANL_DEVICE void add_all(const A (&z)[E], A low, const ClassExps<A, FULL>& exps) {
    if (low > A(-INF)) {
      add_classes(z, exps);
      count_existing(A(E), low);
    } else {
#pragma unroll
      for (int j = 0; j < E; ++j) {
        sums.add_exp(exps.at(z[j]));
        add_gap(z[j], anchor());
      }
    }
  }
  // Classes that exist, without count_existing.
  template <int E>
  ANL_DEVICE void add_classes(const A (&z)[E], const ClassExps<A, FULL>& exps) {
    if constexpr (std::is_same_v<A, float> && !FULL) {
      sums.of[GAP] += exps.add(z, anchor(), sums.of[TAIL]);
    } else {
#pragma unroll
      for (int j = 0; j < E; ++j) sums.add_exp(exps.at(z[j]));
      sums.of[GAP] += exps.sum_of_gaps(z, anchor());
    }
  }
  // E classes more, of any size.
  template <int E>
  ANL_DEVICE void include_all(const A (&z)[E]) {
    A high = z[0], low = z[0];
#pragma unroll
    for (int j = 1; j < E; ++j) {
      high = larger(high, z[j]);
      low = smaller(low, z[j]);
    }
    if (high > max) rebase(high);
    add_all(z, low, exps());
  }
  // Besides their exps: classes that all exist, the sum of anchor - z, and the smallest z.
  ANL_DEVICE void add_existing(A count, A gap, A low) {
    sums.of[GAP] += gap;
    count_existing(count, low);
  }

  // The same sums about a larger max.
  ANL_DEVICE void rebase(A larger) {
    if (max == larger) return;
    const ClassExps<A, FULL> before = exps();
    const A by = sums.of[COUNT] > A(0) ? larger - max : A(0);
    max = larger;
    sums.rebase(by, sums.of[COUNT] > A(0) ? before.scale_to(exps()) : A(1));
  }

  // The same, for good: the exps are then exact.
  ANL_DEVICE void settle(A larger) {
    if constexpr (sizeof(A) == 4) sums.of[TAIL] *= exps().correction(anchor());
    if (max < larger) sums.rebase(sums.of[COUNT] > A(0) ? larger - max : A(0));
    max = larger;
  }

  // Other classes, whose sums are about the same max.
  ANL_DEVICE void add(const AnchoredSums& other) {
    min = other.min < min ? other.min : min;
    sums.add(other.sums);
  }
};

// ---- the second sweep ------------------------------------------------------------------------------------------------

// The largest number that counts as below the clamp, rounded down: what is above it is so as it is stored, in every kernel.
template <class T>
ANL_DEVICE T clamp_bound(T max, T log_sum, T clamp_height) {
  return add_down(max, log_sum - clamp_height);
}

constexpr float NEAR = 64.0f;  // a bound so small leaves a sum of logits nearly all its digits

// row_math.h's second sweep over logits as they are stored. What heights and exps are rounded by is made up for in `correct`.
template <class T, bool FULL>
struct RowSweep {
  using M = Scalar<T>;

  SecondSweep<M> classes;
  T max, bound;
  ClassExps<T, FULL> exps;

  // each(add) calls add(z) for every logit of the thread's, or for arrays of them. What the row's loss looks for is asked
  // before, not per class; a full kernel makes the mass that few losses read in any case. all_finite: no logit is infinite.
  template <class F>
  ANL_DEVICE void run(SecondSums<M, FULL>& sums, const F& each, bool all_finite = false) const {
    if constexpr (FULL) {
      if (classes.focal) return each(Adder<true, true>{*this, sums});
    } else {
      if (by_bound()) return each(Adder<false, false>{*this, sums, all_finite && fabs(bound) < NEAR});
    }
    each(Adder<true, false>{*this, sums});
  }

  template <bool MASS, bool FOCAL>
  struct Adder {
    const RowSweep& row;
    SecondSums<M, FULL>& sums;
    const bool is_near = false;

    ANL_DEVICE void operator()(T z) const {
      if constexpr (MASS) {
        row.classes.template add_as<true, FOCAL>(sums, z > row.bound, z - row.max, row.exps.at(z));
      } else {
        row.add_height(sums, z);
      }
    }
    template <int E>
    ANL_DEVICE void operator()(const T (&z)[E]) const {
      if constexpr (MASS) {
        T x[E];
#pragma unroll
        for (int j = 0; j < E; ++j) x[j] = z[j];
        each_of<FOCAL>(x, *this);
      } else if (is_near) {
        row.add_near_heights(sums, z);
      } else {
        row.add_heights(sums, z);
      }
    }
  };
  ANL_DEVICE void add_height(SecondSums<M, FULL>& sums, T z) const {
    M::add_where(z > bound, sums.of[ABOVE_SUM], z - bound);
    M::add_where(z > bound, sums.of[ABOVE_COUNT], T(1));
  }
  // A class is above the clamp where the sign of its depth is set.
  template <int E>
  ANL_DEVICE void add_heights(SecondSums<M, false>& sums, const T (&z)[E]) const {
    unsigned above = 0;
    T depth = T(0);
#pragma unroll
    for (T v : z) {
      above += __float_as_uint(bound - v) >> 31;
      depth += fminf(bound - v, 0.0f);
    }
    sums.of[ABOVE_COUNT] += T(above);
    sums.of[ABOVE_SUM] -= depth;
  }
  // The same of finite logits about a bound that is NEAR: their sum loses little to it.
  template <int E>
  ANL_DEVICE void add_near_heights(SecondSums<M, false>& sums, const T (&z)[E]) const {
    constexpr unsigned INVERSE = 383;  // of 127, the exponent of a one, modulo 2^9
    unsigned ones = 0;  // as they are stored
    T sum[4] = {};
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const T one = one_if_above(z[j], bound);
      ones += __float_as_uint(one);
      sum[j % 4] = fmaf(one, z[j], sum[j % 4]);
    }
    const T above = T(int((ones >> 23) * INVERSE % (1 << 9)));
    sums.of[ABOVE_COUNT] += above;
    sums.of[ABOVE_SUM] += fmaf(-above, bound, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // Whether heights are those above `bound`.
  ANL_DEVICE bool by_bound() const { return !FULL && !classes.mass && fabs(bound) < T(FAR); }
  // What `bound` was rounded by, as often as there are classes above it, and what the exps were.
  template <class A>
  ANL_DEVICE void correct(SecondSums<Scalar<A>, FULL>& sums) const {
    if (by_bound()) sums.of[ABOVE_SUM] += sums.of[ABOVE_COUNT] * A((bound - max) - classes.threshold);
    sums.of[BELOW_MASS] *= A(exps.correction(max));
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
// From float to double, exps become exact.
template <class To, class A, bool FULL>
ANL_DEVICE To convert(const AnchoredSums<A, FULL>& s) {
  using B = decltype(To::max);
  To out = {B(s.max), B(s.min)};
  convert_each(out.sums, s.sums);
  if constexpr (sizeof(A) < sizeof(B)) out.sums.of[TAIL] *= s.exps().correction(s.anchor());
  return out;
}
template <class To, class A, bool FULL>
ANL_DEVICE To convert(const SecondSums<Scalar<A>, FULL>& s) {
  To out;
  convert_each(out, s);
  return out;
}

// A lean kernel's sums as those of a full one, for losses that do not look at the squares.
template <bool FULL>
ANL_DEVICE AnchoredSums<float, FULL> as_sums_of(const AnchoredSums<float, false>& s) {
  if constexpr (!FULL) {
    return s;
  } else {
    auto out = none<AnchoredSums<float, true>>();
    out.max = s.max;
    out.min = s.min;
    const float tail = s.sums.of[TAIL] * s.exps().correction(s.anchor());
    out.sums.of[TAIL] = s.max > -float(INF) && tail < 1.0f ? 1.0f : tail;  // the largest logit's is 1, whatever was rounded
    out.sums.of[GAP] = s.sums.of[GAP];
    out.sums.of[COUNT] = s.sums.of[COUNT];
    return out;
  }
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

// A warp's lanes; the merge does not depend on the order.
struct WholeWarp {
  template <class X, class Merge>
  ANL_DEVICE X operator()(X x, const Merge& merge) const {
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) x = merge(x, shuffle_xor(x, offset));
    return x;
  }
  ANL_DEVICE float operator()(float x, const LargerNumber&) const { return warp_max(x); }
  ANL_DEVICE float operator()(float x, const SmallerNumber&) const { return -warp_max(-x); }
  ANL_DEVICE float operator()(float x, const AddCount<float>&) const { return warp_count(x); }
};

// The sums of a warp's lanes in each of them, in Wide's arithmetic, about whatever is the largest logit of all. A sum of
// two is the same whichever comes first. Full kernels have it in loops: it is much to compile.
template <class Wide, class A, bool FULL>
ANL_DEVICE Wide merge_lanes(AnchoredSums<A, FULL> own) {
  const WholeWarp reduce;
  own.rebase(reduce(own.max, LargerNumber()));
  own.min = reduce(own.min, SmallerNumber());
  own.sums.of[COUNT] = reduce(own.sums.of[COUNT], AddCount<A>());
  Wide s = convert<Wide>(own);
#pragma unroll (FULL ? 1 : 5)
  for (int offset = 1; offset < WARP; offset *= 2)
#pragma unroll
    for (int i = 0; i < FirstSums<Scalar<A>, FULL>::SIZE; ++i)
      if (i != COUNT) s.sums.of[i] += shuffle_xor(s.sums.of[i], offset);
  return s;
}
template <class Wide, class A, bool FULL>
ANL_DEVICE Wide merge_lanes(SecondSums<Scalar<A>, FULL> own) {
  const WholeWarp reduce;
  own.of[ABOVE_COUNT] = reduce(own.of[ABOVE_COUNT], AddCount<A>());
  const bool mass = __any_sync(ALL_LANES, own.of[BELOW_MASS] != A(0));  // few losses read that
  Wide s = convert<Wide>(own);
#pragma unroll (FULL ? 1 : 5)
  for (int offset = 1; offset < WARP; offset *= 2)
#pragma unroll
    for (int i = 0; i < Wide::SIZE; ++i)
      if (i != ABOVE_COUNT && i != BELOW_MASS) s.of[i] += shuffle_xor(s.of[i], offset);
  if (mass) s.of[BELOW_MASS] = reduce(s.of[BELOW_MASS], Add<typename Wide::V>());
  return s;
}

// A warp: the sums in `count` places (at most one per lane), in every lane.
template <class Wide, class Sums>
ANL_DEVICE Wide merge_places(const Sums* places, unsigned count) {
  return merge_lanes<Wide>(lane_index() < count ? places[lane_index()] : none<Sums>());
}

// All threads' sums, in every lane of warp 0. `shared` has a place for every warp; a __syncthreads stands between two uses
// of it.
template <class Wide, class X>
ANL_DEVICE Wide block_merge(const X& own, X* shared) {
  const X s = merge_lanes<X>(own);
  if (lane_index() == 0) shared[threadIdx.x / WARP] = s;
  __syncthreads();
  return threadIdx.x < WARP ? merge_places<Wide>(shared, blockDim.x / WARP) : none<Wide>();
}

// What exp(z_j - max) is multiplied with to be p_j: 1 where a full kernel's focal parts made p_j already.
template <bool FULL, class T>
ANL_DEVICE T norm_of(const Program& prog, T inv_sum) {
  return FULL && needs_focal(prog) ? T(1) : inv_sum;
}

}  // namespace gpu
}  // namespace anl
