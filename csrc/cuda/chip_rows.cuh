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
    First first[MAX_WARPS];
    Second second[MAX_WARPS];
  };
  Row<T> row;
  RowSweep<T> sweep;
  RowGradient<T, FULL> gradient;
  bool sweeps_again, all_exist;
  double denominator, loss;  // thread 0's: what the CTA keeps for all its rows

  ANL_DEVICE void start(double known_denominator) {
    if (threadIdx.x > 0) return;
    denominator = known_denominator;
    loss = 0.0;
  }
};

// What is read of a live row besides its classes.
struct ChipRow {
  int64_t r, y;
  bool packs;   // the gradient's packs are aligned as the logits' are
  bool writes;  // the CTA writes what is kept of the row
};

// chip.each(part, is_last, f): f(begin, end, data) for the part's packs, pack i in data[i];
// chip.merge_first(own), chip.merge_second(own): in warp 0, the sums of all CTAs that share the row.
template <class S, bool FULL, class Chip, class Memory>
ANL_DEVICE void run_chip_row(const Params& p, const ChipRow& live, const GlobalRowPart<S>& part, const Chip& chip,
                                 Memory& shared) {
  using T = acc_t<S>;
  const Call& call = p.call;
  const Program& program = call.program;
  const bool first_warp = threadIdx.x < WARP, first_thread = threadIdx.x == 0;
  const T edge = part.edge_logit();
  const S* const logits = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, live.r);
  const T z_y = first_warp ? widen(logits[live.y]) : T(0);

  auto sums = none<AnchoredSums<T, FULL>>();
  chip.each(part, false, [&](int begin, int end, const uint4* data) {
    part.first_sweep(sums, begin, end, [&](int i) { return data[i]; });
  });
  add_edge(sums, edge);
  const auto of_cta = block_merge(sums, shared.first);
  if (first_warp) {
    const auto all = chip.merge_first(of_cta);
    Row<T> row;
    row.set_first_sums(program, all, z_y);
    if (first_thread) {
      shared.row = row;
      shared.sweep = row.sweep(program);
      shared.sweeps_again = row.second;
      shared.all_exist = all.sums.of[COUNT] == double(call.num_classes - 1);
    }
  }
  if (needs_second(program)) {
    __syncthreads();
    if (shared.sweeps_again) {
      auto second = none<SecondSums<Scalar<T>, FULL>>();
      const RowSweep<T> sweep = shared.sweep;
      chip.each(part, false, [&](int begin, int end, const uint4* data) {
        part.second_sweep(second, sweep, begin, end, [&](int i) { return data[i]; });
      });
      add_edge(second, sweep, edge);
      const auto second_of_cta = block_merge(second, shared.second);
      if (first_warp) {
        const auto all = chip.merge_second(second_of_cta);
        if (first_thread) shared.row.set_second_sums(program, all);
      }
    }
  }
  if (first_warp) {
    __syncwarp();
    const Row<T> row = shared.row;
    const bool writes = first_thread && live.writes;
    if (call.op == Op::STATS) {
      if (writes) write_statistics(p, live.r, row);
    } else {
      RowGradient<T, FULL> gradient;
      const T weight = row_weight<T>(call, live.y, Label::LIVE);
      const T loss = finish_row<T, FULL>(p, live.r, row, weight, shared.denominator, writes, gradient);
      if (first_thread) {
        shared.gradient = gradient;
        shared.loss += double(loss);
      }
    }
  }
  __syncthreads();
  const RowGradient<T, FULL> gradient = shared.gradient;
  const bool all_exist = shared.all_exist;
  chip.each(part, true, [&](int begin, int end, const uint4* data) {
    if (!part.grad) return;
    if (live.packs) {
      const auto load = [&](int i) { return data[i]; };
      part.template write_gradient<FULL, Cache::STREAM>(program, gradient, all_exist, begin, end, load);
    } else {
      const auto load = [&](int j) { return reinterpret_cast<const S*>(data)[j]; };
      part.template write_elements<FULL>(program, gradient, begin, end, load);
    }
  });
  part.template write_rest<FULL>(program, gradient, edge, live.packs);
}

}  // namespace gpu
}  // namespace anl
