// The gradient times a number that is on the device.
#include <algorithm>

#include "kernels.h"
#include "primitives.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int THREADS = 256;

// Runs of side-by-side elements, as much of one at a time as a CTA has threads for.
template <class S>
__global__ void __launch_bounds__(THREADS) scale_runs_kernel(const __grid_constant__ Scaling s) {
  using T = acc_t<S>;
  constexpr int P = PACK<S>;
  const T factor = *static_cast<const T*>(s.factor);
  if (factor == T(1)) return;
  const int64_t tile = int64_t(blockDim.x) * P, n = s.size[2];
  const int64_t tiles = ceil_div(n + P - 1, tile), total = s.size[0] * s.size[1] * tiles;
  for (int64_t i = blockIdx.x; i < total; i += gridDim.x) {
    const int64_t run = i / tiles;
    S* g = static_cast<S*>(s.grad) + run / s.size[1] * s.strides[0] + run % s.size[1] * s.strides[1];
    const int64_t shift = int64_t(reinterpret_cast<uintptr_t>(g) / sizeof(S) % P);
    const int64_t k = i % tiles * tile + int64_t(threadIdx.x) * P - shift;
    if (k >= 0 && k + P <= n) {
      T x[P];
      widen_pack<S>(load16<Cache::STREAM>(g + k), x);
#pragma unroll
      for (T& v : x) v *= factor;
      store16<Cache::STREAM>(g + k, narrow_pack<S>(x));
    } else {
      for (int64_t j = k < 0 ? 0 : k; j < n && j < k + P; ++j) g[j] = narrow<S>(widen(g[j]) * factor);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(THREADS) scale_elements_kernel(const __grid_constant__ Scaling s) {
  using T = acc_t<S>;
  const T factor = *static_cast<const T*>(s.factor);
  if (factor == T(1)) return;
  const int64_t total = s.size[0] * s.size[1] * s.size[2];
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t run = i / s.size[2];
    S* g = static_cast<S*>(s.grad) + run / s.size[1] * s.strides[0] + run % s.size[1] * s.strides[1] +
           i % s.size[2] * s.strides[2];
    *g = narrow<S>(widen(*g) * factor);
  }
}

// The smallest stride last, and dimensions that are one run of memory as one.
Scaling in_order(const Scaling& given) {
  int order[3] = {0, 1, 2};
  std::sort(order, order + 3, [&](int a, int b) { return given.strides[a] < given.strides[b]; });
  Scaling s = given;
  for (int i = 0; i < 3; ++i) s.size[i] = s.strides[i] = 1;
  int at = 3;
  for (int i : order) {
    const int64_t size = given.size[i], stride = given.strides[i];
    if (size == 1) continue;
    if (at < 3 && stride == s.strides[at] * s.size[at]) {
      s.size[at] *= size;
    } else {
      s.size[--at] = size;
      s.strides[at] = stride;
    }
  }
  return s;
}

template <class S>
cudaError_t launch_scaling(const Scaling& s, const Limits& limits, cudaStream_t stream) {
  const int threads = std::min(limits.max_threads, THREADS);
  const int64_t total = s.size[0] * s.size[1] * s.size[2], tile = int64_t(threads) * PACK<S>;
  const dim3 grid(unsigned(std::min(ceil_div(total, tile), 8 * int64_t(limits.num_sms)))), block(threads);
  if (s.strides[2] == 1 && 2 * s.size[2] > tile)
    return ANL_LAUNCH((scale_runs_kernel<S>), grid, block, NO_CLUSTER, 0, stream, s);
  return ANL_LAUNCH((scale_elements_kernel<S>), grid, block, NO_CLUSTER, 0, stream, s);
}

}  // namespace

cudaError_t launch_scale(const Scaling& scaling, const Limits& limits, cudaStream_t stream) {
  const Scaling s = in_order(scaling);
  return by_storage<half_t, bfloat16_t>(
      s.dtype, [&](auto x) { return launch_scaling<typename decltype(x)::type>(s, limits, stream); });
}

}  // namespace gpu
}  // namespace anl
