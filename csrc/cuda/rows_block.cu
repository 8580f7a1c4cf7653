// A row in one CTA's shared memory: read once, swept there, its gradient written once.
//
// Several CTAs share a multiprocessor, so that one computes while another loads. Sums are float32 in a thread and a warp
// (float64 for float64), and float64 from warp to warp.
#include "plans.h"
#include "staged.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr int64_t STATIC_SHARED = 2 << 10;  // what the kernel has besides the row

// What the warps of a CTA tell one another of a row.
template <class T, bool FULL>
struct Exchange {
  T max[MAX_WARPS];
  AnchoredSums<double, FULL> first[MAX_WARPS];
  SecondSums<Scalar<double>, FULL> second[MAX_WARPS];
  RowSweep<T> sweep;
  RowGradient<T, FULL> gradient;
  bool sweeps_again;
};

template <class S, bool FULL>
struct BlockRow {
  using T = acc_t<S>;

  const Params& p;
  Exchange<T, FULL>& shared;
  const StagedRow<S>& staged;

  // The row's sums, in warp 0.
  ANL_DEVICE AnchoredSums<double, FULL> first_sums() const {
    auto s = none<AnchoredSums<T, FULL>>();
    staged.each([&](T z) { s.max = z > s.max ? z : s.max; });
    s.max = block_reduce(s.max, Largest<T>(), shared.max);
    const T anchor = s.anchor();
    staged.each([&](T z) { s.add(z, anchor); });
    return block_merge(s, shared.first);
  }

  ANL_DEVICE SecondSums<Scalar<double>, FULL> second_sums() const {
    auto s = none<SecondSums<Scalar<T>, FULL>>();
    const RowSweep<T> sweep = shared.sweep;
    sweep.run(s, [&](const auto& add) { staged.each(add); });
    return block_merge(s, shared.second);
  }

  // The row's loss, in warp 0, which does the row's mathematics; its gradient is then in shared.gradient.
  ANL_DEVICE T run(int64_t r, T z_y, T weight, double denominator) const {
    const Program& program = p.call.program;
    const bool first_warp = threadIdx.x < WARP, writes = threadIdx.x == 0;
    const AnchoredSums<double, FULL> sums = first_sums();
    Row<T> row = {};
    if (first_warp) {
      row.set_first_sums(program, sums, z_y);
      if (writes) {
        shared.sweep = row.sweep(program);
        shared.sweeps_again = row.second;
      }
    }
    if (needs_second(program)) {
      __syncthreads();
      if (shared.sweeps_again) {
        const auto again = second_sums();
        if (first_warp) row.set_second_sums(program, again);
      }
    }
    T loss = T(0);
    if (first_warp) {
      if (p.call.op == Op::STATS) {
        if (writes) write_statistics(p, r, row);
      } else {
        RowGradient<T, FULL> gradient;
        loss = finish_row<T, FULL>(p, r, row, weight, denominator, writes, gradient);
        if (writes) shared.gradient = gradient;
      }
    }
    __syncthreads();
    return loss;
  }
};

template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS, sizeof(S) == 8 ? 1 : 3)
    rows_block_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  using Exchanged = Exchange<T, FULL>;
  ANL_SHARED(S, memory);
  ANL_STATIC_SHARED(Exchanged, shared);
  const Call& call = p.call;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  const int64_t rows = p.plan.block.rows_per_cta, begin = blockIdx.x * rows;
  const int64_t end = begin + rows < p.num_rows ? begin + rows : p.num_rows;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = label_at(call, r);
    const Label kind = label_kind(call, y);
    S* grad = call.grad ? static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r) : nullptr;
    if (kind != Label::LIVE) {
      if (threadIdx.x == 0) total += double(write_unread_row<T>(p, r, kind));
      if (grad) fill(grad, call.num_classes, unread_value<T>(kind));
      continue;
    }
    const S* logits = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r);
    const StagedRow<S> staged(memory, logits, int(call.num_classes));
    staged.load();
    const T z_y = widen(logits[y]);
    staged.wait_and_mask(y);
    __syncthreads();
    const BlockRow<S, FULL> row = {p, shared, staged};
    total += double(row.run(r, z_y, row_weight<T>(call, y, kind), denominator));
    if (grad) {
      const RowGradient<T, FULL> gradient = shared.gradient;
      by_parts<FULL>(call.program, [&](auto parts) {
        const auto value = [&](T z) { return gradient.template at<decltype(parts)::value>(z); };
        staged.store(grad, y, gradient.row.target, value);
      });
    }
    __syncthreads();
  }
  finish_loss<T>(p, blockIdx.x, total, denominator);
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_block_kernel<S, FULL>), grid, block, NO_CLUSTER, p.plan.shared_bytes, stream, p);
}

}  // namespace

bool fits_block(const Call& call, const Limits& limits, int ctas) {
  const int64_t bytes = staged_row_bytes(call) + STATIC_SHARED + RESERVED_SHARED;
  return ctas * bytes <= limits.shared_bytes + RESERVED_SHARED;
}

Plan plan_block(const Call& call, const Limits& limits) {
  const int64_t bytes = staged_row_bytes(call);
  const BlockPlan block = {ceil_div(rows_of(call), LOSS_PARTS)};
  Plan plan = plan_of_rows(Kernel::BLOCK, call, threads_for(bytes / PACK_BYTES / 4, MAX_THREADS, limits),
                           block.rows_per_cta);
  plan.shared_bytes = bytes;
  plan.block = block;
  return plan;
}

cudaError_t launch_block(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
