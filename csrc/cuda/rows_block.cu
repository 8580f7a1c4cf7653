// A row in one CTA's shared memory: read once, swept there, its gradient written once.
//
// Several CTAs share a multiprocessor, so that one computes while another loads. Sums are float32 in a thread and a warp
// (float64 for float64), and float64 from warp to warp.
#include "staged.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / WARP;

// What the warps of a CTA tell one another of a row.
template <class T>
struct Exchange {
  T max[MAX_WARPS];
  FirstSums<T> first[MAX_WARPS];
  SecondSums<T> second[MAX_WARPS];
  SecondSweep<T> sweep;
  GradientRow<T> gradient;
  bool sweeps_again;
};

template <class S, bool FOCAL>
struct BlockRow {
  using T = acc_t<S>;

  const Params& p;
  Exchange<T>& shared;
  const Stretch<S>& stretch;

  ANL_DEVICE int warp() const { return int(threadIdx.x) / WARP; }
  ANL_DEVICE int warps() const { return int(blockDim.x) / WARP; }

  // The warps' sums, in order; the max is the row's in all of them.
  ANL_DEVICE FirstSums<double> first_sums() const {
    FirstSums<T> s = FirstSums<T>::none();
    stretch.each([&](T x) { s.max = x > s.max ? x : s.max; });
    s.max = block_reduce(s.max, Largest<T>(), shared.max);
    const T anchor = s.anchor();
    stretch.each([&](T x) { s.add(x, anchor); });
    s.min = warp_reduce(s.min, Smallest<T>());
    s.tail = warp_reduce(s.tail, Add<T>());
    s.gap = warp_reduce(s.gap, Add<T>());
    s.count = warp_reduce(s.count, Add<T>());
    if (lane_index() == 0) shared.first[warp()] = s;
    __syncthreads();
    FirstSums<double> all = convert<double>(shared.first[0]);
    for (int w = 1; w < warps(); ++w) all = MergeFirst<double>()(all, convert<double>(shared.first[w]));
    return all;
  }

  ANL_DEVICE SecondSums<double> second_sums() const {
    SecondSums<T> s = SecondSums<T>::none();
    const SecondSweep<T> sweep = shared.sweep;
    stretch.each([&](T x) { sweep.template add<FOCAL>(s, x); });
    s = warp_reduce(s, MergeSecond<T>());
    if (lane_index() == 0) shared.second[warp()] = s;
    __syncthreads();
    SecondSums<double> all = convert<double>(shared.second[0]);
    for (int w = 1; w < warps(); ++w) all = MergeSecond<double>()(all, convert<double>(shared.second[w]));
    return all;
  }

  // The row's loss; its gradient is then in shared.gradient. Warp 0 does the row's mathematics.
  ANL_DEVICE T run(int64_t r, T z_y, T weight, double denominator) const {
    const bool first_warp = warp() == 0;
    const FirstSums<double> sums = first_sums();
    Row<T> row = {};
    if (first_warp) {
      row.begin(p.call.program, sums, z_y);
      if (threadIdx.x == 0) {
        shared.sweep = row.sweep(p.call.program);
        shared.sweeps_again = row.second;
      }
    }
    if (p.call.program.needs) {
      __syncthreads();
      if (shared.sweeps_again) {
        const SecondSums<double> again = second_sums();
        if (first_warp) row.take(again, FOCAL);
      }
    }
    T loss = T(0);
    if (first_warp) {
      const bool writes = threadIdx.x == 0;
      if (p.call.op == Op::STATS) {
        if (writes) write_statistics(p, r, row);
      } else {
        GradientRow<T> gradient;
        loss = finish_row<T, FOCAL>(p, r, row, weight, denominator, writes, gradient);
        if (writes) shared.gradient = gradient;
      }
    }
    __syncthreads();
    return loss;
  }
};

template <class S, bool FOCAL>
__global__ void __launch_bounds__(MAX_THREADS, sizeof(S) == 8 ? 1 : 3) rows_block_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(S, memory);
  ANL_STATIC_SHARED(Exchange<T>, shared);
  const Call& call = p.call;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  const int64_t begin = blockIdx.x * p.plan.rows, end = begin + p.plan.rows < p.num_rows ? begin + p.plan.rows : p.num_rows;
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
    const Stretch<S> stretch(memory, logits, int(call.num_classes));
    stretch.load();
    const T z_y = widen(logits[y]);
    stretch.arrive(y);
    __syncthreads();
    const BlockRow<S, FOCAL> row = {p, shared, stretch};
    total += double(row.run(r, z_y, row_weight<T>(call, y, kind), denominator));
    if (grad) {
      const GradientRow<T> gradient = shared.gradient;
      stretch.store(grad, y, gradient.target, [&](T x) { return gradient.template at<FOCAL>(x); });
    }
    __syncthreads();
  }
  finish_loss<T>(p, blockIdx.x, total, denominator);
}

template <class S, bool FOCAL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_block_kernel<S, FOCAL>), grid, block, NO_CLUSTER, p.plan.shared_bytes, stream, p);
}

}  // namespace

cudaError_t launch_block(const Params& p, cudaStream_t stream) {
  return by_variant(p.call, [&](auto s, auto focal) {
    return launch_variant<typename decltype(s)::type, decltype(focal)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
