// A row that one CTA or a cluster keeps in shared memory between its sweeps: what its threads do together, and what their
// warps tell one another. The row's mathematics is warp 0's.
#pragma once

#include "long_rows.cuh"

namespace anl {
namespace gpu {

template <class S, bool FULL, int MAX_WARPS>
struct RowMemory {
  using T = acc_t<S>;
  using First = AnchoredSums<double, FULL>;
  using Second = SecondSums<Scalar<double>, FULL>;
  union {  // by warp
    AnchoredSums<T, FULL> first[MAX_WARPS];
    SecondSums<Scalar<T>, FULL> second[MAX_WARPS];
  };
  Row<T> row;
  RowSweep<T, FULL> sweep;
  RowGradient<T, FULL> gradient;
  bool sweeps_again, all_exist;
  int64_t y;
  double denominator, grad_scale, loss;  // thread 0's: what the CTA keeps for all its rows

  ANL_DEVICE void start(double known_denominator) {
    if (threadIdx.x > 0) return;
    denominator = known_denominator;
    grad_scale = inverse(known_denominator);
    loss = 0.0;
  }
};

// What is read of a live row besides its classes.
struct ChipRow {
  int64_t r, y;
  bool packs;   // the gradient's packs are aligned as the logits' are
  bool writes;  // the CTA writes what is kept of the row
};

enum class Pass { FIRST, AGAIN, LAST };  // over a row

// chip.walk(part, pass): over the part's packs (PlainWalk);
// chip.merge_first<Wide>(own, by_warp), chip.merge_second<Wide>(own, by_warp): in warp 0, the sums of all threads that share
// the row. All threads of the CTA call these.
template <class S, bool FULL, class Chip, class Memory>
ANL_DEVICE void run_chip_row(const Params& p, const ChipRow& live, const GlobalRowPart<S>& part, Chip& chip,
                             Memory& shared) {
  using T = acc_t<S>;
  const Call& call = p.call;
  const Program& program = call.program;
  const bool first_warp = threadIdx.x < WARP, first_thread = threadIdx.x == 0;
  const T edge = part.edge_logit();
  const T z_y = first_warp ? part.logit_of(live.y) : T(0);
  if (first_thread) shared.y = live.y;

  auto sums = none<AnchoredSums<T, FULL>>();
  part.first_sweep(program, sums, chip.walk(part, Pass::FIRST));
  add_edge(sums, edge);
  const auto all = chip.template merge_first<typename Memory::First>(sums, shared.first);
  if (first_warp) {
    Row<T> row;
    row.set_first_sums(program, all, z_y);
    if (first_thread) {
      shared.row = row;
      shared.sweep = row.template sweep<FULL>(program);
      shared.sweeps_again = row.second;
      shared.all_exist = all.sums.of[COUNT] == double(call.num_classes - 1);
    }
  }
  if (needs_second(program)) {
    __syncthreads();
    if (shared.sweeps_again) {
      auto second = none<SecondSums<Scalar<T>, FULL>>();
      const RowSweep<T, FULL> sweep = shared.sweep;
      part.second_sweep(second, sweep, shared.all_exist, chip.walk(part, Pass::AGAIN));
      add_edge(second, sweep, edge);
      const auto all_second = chip.template merge_second<typename Memory::Second>(second, shared.second);
      if (first_thread) shared.row.set_second_sums(program, all_second);
    }
  }
  if (first_warp) {
    __syncwarp();
    const Row<T> row = shared.row;
    const bool writes = first_thread && live.writes;
    if (call.op == Op::STATS) {
      if (writes) write_statistics<FULL>(p, live.r, row);
    } else {
      RowGradient<T, FULL> gradient;
      const T weight = row_weight<T>(call, shared.y, Label::LIVE);
      const T loss = finish_row<T, FULL>(p, live.r, row, weight, shared.grad_scale, writes, gradient);
      if (first_thread) {
        shared.gradient = gradient;
        shared.loss += double(loss);
      }
    }
  }
  __syncthreads();
  const RowGradient<T, FULL> gradient = shared.gradient;
  const auto last_walk = chip.walk(part, Pass::LAST);
  if (part.grad)
    part.template write_gradient<FULL, Cache::STREAM>(program, gradient, shared.all_exist, live.packs, last_walk);
  else
    last_walk.chunks([](int, int, const auto&) {});
  part.template write_edge<FULL>(program, gradient, edge);
}

}  // namespace gpu
}  // namespace anl
