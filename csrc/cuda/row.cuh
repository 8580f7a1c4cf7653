// A row between its sweeps.
#pragma once

#include "sums.cuh"

namespace anl {
namespace gpu {

template <class T>
struct Row {
  using M = Scalar<T>;

  RowStatistics<M> stats;
  T max, inv_sum;
  bool second;  // whether the second sweep has anything to find

  // After the first sweep. A NaN or +inf among the logits, or a target that does not exist, makes everything NaN.
  template <class A, bool FULL>
  ANL_DEVICE void set_first_sums(const Program& prog, AnchoredSums<A, FULL> first, T z_y) {
    first.settle(A(z_y) > first.max ? A(z_y) : first.max);
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

  template <bool FULL>
  ANL_DEVICE RowSweep<T, FULL> sweep(const Program& prog) const {
    const auto classes = SecondSweep<M>::of_row(prog, stats.log_sum);
    return {classes, max, clamp_bound(max, stats.log_sum, M::set(prog.clamp_height)), ClassExps<T, FULL>::about(max)};
  }

  // After the second sweep.
  template <class A, bool FULL>
  ANL_DEVICE void set_second_sums(const Program& prog, SecondSums<Scalar<A>, FULL> sums) {
    sweep<FULL>(prog).correct(sums);
    anl::set_second_sums<M>(stats, sums.of, norm_of<FULL>(prog, inv_sum));
  }
};

}  // namespace gpu
}  // namespace anl
