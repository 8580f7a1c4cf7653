// What stands before and after a kernel: the mean's denominator, the loss from its parts.
//
// Every sum has a fixed order: a thread adds its own numbers in order, a CTA its threads', and the last step the CTAs'.
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int THREADS = 512;  // half a million labels on their way
constexpr int MAX_THREADS = 512;  // of a kernel whose loss has several parts
constexpr int EARLY_ARCH = 90, EARLY_DRIVER = 12030;  // the driver's: what starts early can be captured in a graph

// ---- before a kernel: the parts of the denominator ------------------------------------------------------------------

// The sum of the weights of the thread's rows: whole numbers, and exact, where classes have none.
template <class L>
ANL_DEVICE double weights_of(const Params& p) {
  constexpr int AT_ONCE = 8;  // labels on their way
  const Call& call = p.call;
  const L* labels = static_cast<const L*>(call.target);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  double sum = 0.0;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < p.num_rows; first += AT_ONCE * threads) {
    int64_t y[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t r = first + i * threads;
      y[i] = r < p.num_rows ? int64_t(labels[r]) : call.ignore_index;
    }
    int rows = 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const Label kind = label_kind(call, y[i]);
      if (!call.weight)
        rows += kind != Label::IGNORED;
      else if (call.dtype == FLOAT64)
        sum += row_weight<double>(call, y[i], kind);
      else
        sum += double(row_weight<float>(call, y[i], kind));
    }
    sum += rows;
  }
  return sum;
}

__global__ void prepare_kernel(const __grid_constant__ Params p) {
  let_next_launch_start();  // it reads what stands here after it has waited for the end of this launch
  ANL_STATIC_SHARED(double[WARP], shared);
  double sum = 0.0;
  switch (p.call.target_type) {
    case INT64: sum = weights_of<int64_t>(p); break;
    case INT32: sum = weights_of<int32_t>(p); break;
    case INT16: sum = weights_of<int16_t>(p); break;
    default: sum = weights_of<uint8_t>(p);
  }
  sum = block_reduce(sum, Add<double>(), shared);
  if (threadIdx.x == 0) p.weight_parts[blockIdx.x] = sum;
}

// ---- after a kernel that takes no tickets -----------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(MAX_THREADS, 1) finish_kernel(const __grid_constant__ Params p) {
  add_loss_parts<T>(p, loss_denominator<T>(p));
}

}  // namespace

cudaError_t can_start_early(bool& can) {
  const void* kernel = reinterpret_cast<const void*>(prepare_kernel);
  cudaFuncAttributes code;
  int driver = 0;
  can = false;
  if (const cudaError_t error = cudaDriverGetVersion(&driver)) return error;
  if (const cudaError_t error = cudaFuncGetAttributes(&code, kernel)) return error;
  can = driver >= EARLY_DRIVER && std::min(code.ptxVersion, code.binaryVersion) >= EARLY_ARCH;
  return cudaSuccess;
}

cudaError_t launch_prepare(const Params& p, const Limits& limits, cudaStream_t stream) {
  const dim3 grid(WEIGHT_PARTS), block(most_threads(THREADS, limits));
  return ANL_LAUNCH(prepare_kernel, grid, block, NO_CLUSTER, 0, stream, p);
}

// With as many threads as the kernel itself has: the sum's order is that of its last CTA.
cudaError_t launch_finish(const Params& p, cudaStream_t stream) {
  if (p.call.dtype == FLOAT64) return ANL_LAUNCH((finish_kernel<double>), 1, p.plan.threads, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((finish_kernel<float>), 1, p.plan.threads, NO_CLUSTER, 0, stream, p);
}

}  // namespace gpu
}  // namespace anl
