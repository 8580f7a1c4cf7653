// The gradient from the rows' coefficients: logits read once (with the entropy term three times), gradient written once.
#include "entropy.cuh"
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 512;

template <class S>
struct GlobalRow {
  const S* logits;
  S* grad;

  ANL_DEVICE GlobalRow(const Call& call, int64_t r)
      : logits(static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r)),
        grad(static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r)) {}
};

// f(k, z_k) to element k of the gradient, for 0 <= k - begin < count, by `takers` threads of which this is number
// `taker`. With packs, begin is where the row's packs begin: up to one pack before the row. With `unread`, the logits are
// not read, and z_k is 0.
template <class S, class F>
ANL_DEVICE void transform(const Params& p, const GlobalRow<S>& row, int begin, int count, int taker, int takers,
                          bool unread, const F& f) {
  using T = acc_t<S>;
  constexpr int P = PACK<S>;
  const int K = int(p.call.num_classes), end = begin + count < K ? begin + count : K;
  if (!p.plan.gradient.packs) {
    for (int k = begin + taker; k < end; k += takers) row.grad[k] = narrow<S>(f(k, unread ? T(0) : widen(row.logits[k])));
    return;
  }
  for (int k = begin + taker * P; k < end; k += takers * P) {
    T x[P] = {};
    if (k >= 0 && k + P <= K) {
      if (!unread) widen_pack<S>(load16(row.logits + k), x);
#pragma unroll
      for (int v = 0; v < P; ++v) x[v] = f(k + v, x[v]);
      store16(row.grad + k, narrow_pack<S>(x));
      continue;
    }
#pragma unroll
    for (int v = 0; v < P; ++v)
      if (unsigned(k + v) < unsigned(K)) row.grad[k + v] = narrow<S>(f(k + v, unread ? T(0) : widen(row.logits[k + v])));
  }
}

// Where the packs of the row begin: its first class or up to one pack before it.
template <class S>
ANL_DEVICE int first_pack(const Params& p, const GlobalRow<S>& row) {
  return p.plan.gradient.packs ? -int(reinterpret_cast<uintptr_t>(row.logits) / sizeof(S) % PACK<S>) : 0;
}

// A group of lanes takes a unit: some of a row's classes.
template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS, 1) rows_gradient_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  const int lanes = p.plan.gradient.lanes, classes = int(p.plan.gradient.classes_per_unit);
  const int64_t units = ceil_div(p.call.num_classes + PACK<S> - 1, classes);
  const int64_t unit = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const int64_t r = units == 1 ? unit : unit / units;
  if (r >= p.num_rows) return;
  const KnownRow<T, FULL> known(p, r);
  const GlobalRow<S> row(p.call, r);
  const int y = known.label(p.call, r);
  const RowGradient<T, FULL> gradient = known.gradient;
  const int begin = first_pack(p, row) + int(unit - r * units) * classes;
  by_parts<FULL>(p.call.program, [&](auto parts) {
    transform(p, row, begin, classes, int(threadIdx.x) % lanes, lanes, known.unread, [&](int k, T z) {
      return k == y ? gradient.row.target : gradient.template at<decltype(parts)::value>(z);
    });
  });
}

// The whole row's sums, by the CTA; a few dozen classes per thread in T, then on in double.
template <class S>
ANL_DEVICE EntropySums<double> entropy_sums(const Params& p, const GlobalRow<S>& row,
                                            const EntropyRow<acc_t<S>>& entropy, EntropySums<double>* shared) {
  using T = acc_t<S>;
  constexpr int RUN = 64;
  const T* log_q = static_cast<const T*>(p.call.log_q);
  const int K = int(p.call.num_classes), step = int(blockDim.x);
  EntropySums<double> sums = {0.0, 0.0};
  for (int begin = int(threadIdx.x); begin < K; begin += step * RUN) {
    const int end = K - begin > step * RUN ? begin + step * RUN : K;
    EntropySums<T> part = {T(0), T(0)};
    for (int k = begin; k < end; k += step) entropy.add(part, widen(row.logits[k]), log_q[k]);
    sums = MergeEntropy<double>()(sums, {double(part.mass), double(part.moment)});
  }
  return block_reduce(sums, MergeEntropy<double>(), shared);
}

// A CTA takes a row.
template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS, 1) rows_gradient_entropy_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_STATIC_SHARED(EntropySums<double>[2 * WARP], shared);
  const int64_t r = blockIdx.x;
  const KnownRow<T, FULL> known(p, r);
  const GlobalRow<S> row(p.call, r);
  const RowGradient<T, FULL> gradient = known.gradient;
  const T* log_q = static_cast<const T*>(p.call.log_q);
  auto entropy = EntropyRow<T>::begin(gradient.max, known.inv_sum, *static_cast<const T*>(p.call.entropy_scale));
  if (!known.unread) {
    entropy.set_center(entropy_sums(p, row, entropy, shared));
    entropy.set_lost(entropy_sums(p, row, entropy, shared + WARP));
  }
  __syncthreads();  // in place, the gradient overwrites what other threads' sums read
  const int y = known.label(p.call, r);
  const int begin = first_pack(p, row), count = int(p.call.num_classes) - begin;
  by_parts<FULL>(p.call.program, [&](auto parts) {
    transform(p, row, begin, count, int(threadIdx.x), int(blockDim.x), known.unread, [&](int k, T z) {
      const T own = k == y ? gradient.row.target : gradient.template at<decltype(parts)::value>(z);
      return known.unread ? own : own + entropy.at(z, log_q[k]);
    });
  });
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  if (p.call.log_q)
    return ANL_LAUNCH((rows_gradient_entropy_kernel<S, FULL>), grid, block, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((rows_gradient_kernel<S, FULL>), grid, block, NO_CLUSTER, 0, stream, p);
}

}  // namespace

Plan plan_gradient(const Call& call, const Limits& limits) {
  const int64_t N = rows_of(call), K = call.num_classes, pack = pack_of(call);
  GradientPlan gradient = {};
  gradient.packs = equally_aligned(call) && (call.log_q || K >= 4 * pack);
  gradient.lanes = int(std::min<int64_t>(WARP, power_of_two(ceil_div(K, gradient.packs ? 4 * pack : 4))));
  gradient.classes_per_unit = std::min<int64_t>(WARP * 4 * 8, power_of_two(K + pack - 1));
  Plan plan = {};
  plan.kernel = Kernel::GRADIENT;
  plan.cluster = 1;
  plan.threads = call.log_q ? threads_for(K / 8, MAX_THREADS, limits) : threads_for(128, 128, limits);
  const int64_t units = N * ceil_div(K + pack - 1, gradient.classes_per_unit);
  plan.blocks = call.log_q ? N : ceil_div(units * gradient.lanes, plan.threads);
  plan.gradient = gradient;
  return plan;
}

cudaError_t launch_gradient(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
