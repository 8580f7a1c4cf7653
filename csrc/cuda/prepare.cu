// What stands before and after a kernel: tickets, the mean's denominator, the loss from its parts.
//
// Every sum has a fixed order: a thread adds its own numbers in order, a CTA its threads', and the last step the CTAs'.
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int THREADS = 256;

// ---- before a kernel: tickets and the parts of the denominator ------------------------------------------------------

template <class T>
__global__ void prepare_kernel(const __grid_constant__ Params p) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.num_tickets;
       i += int64_t(gridDim.x) * blockDim.x)
    p.tickets[i] = 0;
  if (!p.weight_parts) return;
  ANL_STATIC_SHARED(double[WARP], shared);
  const int64_t rows = ceil_div(p.num_rows, WEIGHT_PARTS), end = (blockIdx.x + 1) * rows;
  const int64_t stop = end < p.num_rows ? end : p.num_rows;
  double sum = 0.0;
  for (int64_t r = blockIdx.x * rows + threadIdx.x; r < stop; r += blockDim.x) {
    const int64_t y = label_at(p.call, r);
    sum += double(row_weight<T>(p.call, y, label_kind(p.call, y)));
  }
  sum = block_reduce(sum, Add<double>(), shared);
  if (threadIdx.x == 0) p.weight_parts[blockIdx.x] = sum;
}

// ---- after a kernel that takes no tickets -----------------------------------------------------------------------------

template <class T>
__global__ void finish_kernel(const __grid_constant__ Params p) {
  add_loss_parts<T>(p, loss_denominator<T>(p));
}

}  // namespace

cudaError_t launch_prepare(const Params& p, cudaStream_t stream) {
  if (!p.num_tickets && !p.weight_parts) return cudaSuccess;
  const dim3 grid(p.weight_parts ? WEIGHT_PARTS : 1), block(std::min(p.plan.threads, THREADS));
  if (p.call.dtype == FLOAT64) return ANL_LAUNCH((prepare_kernel<double>), grid, block, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((prepare_kernel<float>), grid, block, NO_CLUSTER, 0, stream, p);
}

// With as many threads as the kernel itself has: the sum's order is that of its last CTA.
cudaError_t launch_finish(const Params& p, cudaStream_t stream) {
  if (p.call.dtype == FLOAT64) return ANL_LAUNCH((finish_kernel<double>), 1, p.plan.threads, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((finish_kernel<float>), 1, p.plan.threads, NO_CLUSTER, 0, stream, p);
}

}  // namespace gpu
}  // namespace anl
