// What the engine promises, and what it must refuse: `engine_checks NAME` runs one kernel and prints what came of it.
#include <stdio.h>

#include <string>
#include <vector>

#include "cuda/reduce.cuh"

using namespace anl::gpu;

namespace {

struct Arguments {
  const uint4* in;
  float* out;
  unsigned* counters;
};

__global__ void barrier_of_some(const Arguments) {
  if (threadIdx.x % 2) __syncthreads();
}

__global__ void barriers_apart(const Arguments) {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
}

// A thread may not see a copy before it waited for it: `out` gets what was there before and after.
__global__ void copies(const Arguments a) {
  ANL_SHARED(uint4, staged);
  copy_async16(staged + threadIdx.x, a.in + threadIdx.x);
  copy_async_commit();
  const float before = reinterpret_cast<float*>(staged + threadIdx.x)[0];
  copy_async_wait<0>();
  a.out[2 * threadIdx.x] = before;
  a.out[2 * threadIdx.x + 1] = reinterpret_cast<float*>(staged + threadIdx.x)[0];
}

__global__ void copy_not_waited_for(const Arguments a) {
  ANL_SHARED(uint4, staged);
  copy_async16(staged + threadIdx.x, a.in + threadIdx.x);
  copy_async_commit();
}

__global__ void copy_of_unaligned(const Arguments a) {
  ANL_SHARED(float, staged);
  copy_async16(staged + 1, a.in);
}

template <unsigned EXPECTED>
__global__ void bulk(const Arguments a) {
  ANL_SHARED(uint4, staged);
  ANL_STATIC_SHARED(Barrier, barrier);
  if (threadIdx.x == 0) barrier_init(&barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(&barrier, EXPECTED);
    bulk_copy(SharedPlace(staged), a.in, 64 * 16, &barrier);
  }
  barrier_wait(&barrier, 0);
  a.out[threadIdx.x] = reinterpret_cast<float*>(staged)[4 * threadIdx.x];
}

__global__ void shuffle_from_nobody(const Arguments a) {
  if (threadIdx.x % 32 < 8) a.out[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 9);
}

__global__ void shuffles(const Arguments a) {
  const float x = float(threadIdx.x);
  float sum = warp_reduce(x, Add<float>());
  if (threadIdx.x % 32 < 8) sum += __shfl_xor_sync(0xffu, x, 1);
  a.out[threadIdx.x] = sum + float(__popc(__ballot_sync(ALL_LANES, threadIdx.x % 3 == 0)));
}

__global__ void neighbours(const Arguments a) {
  ANL_STATIC_SHARED(float[64], own);
  own[threadIdx.x] = float(100 * cluster_rank() + threadIdx.x);
  cluster_sync();
  const unsigned next = (cluster_rank() + 1) % 4;
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = cluster_map(own, next)[threadIdx.x];
  cluster_sync();
}

// The order in which CTAs come by.
__global__ void order(const Arguments a) {
  if (threadIdx.x == 0) a.out[atomicAdd(a.counters, 1u)] = float(blockIdx.x);
}

__global__ void shared_of_nobody(const Arguments a) {
  ANL_SHARED(float, staged);
  a.out[threadIdx.x] = staged[threadIdx.x];
}

__global__ void past_the_end(const Arguments) {
  ANL_SHARED(float, staged);
  staged[1024 / sizeof(float) + (threadIdx.x == 0)] = 1.0f;
}

struct EarlyArguments : Arguments {};
bool starts_early(const EarlyArguments&) { return true; }
__global__ void early(const EarlyArguments a) {
  wait_for_previous_launch();
  a.out[threadIdx.x] = float(threadIdx.x);
}
__global__ void early_by_half(const EarlyArguments) {
  if (threadIdx.x < 32) wait_for_previous_launch();
}

template <class A = Arguments, class K>
int run(K kernel, unsigned grid, unsigned cluster) {
  std::vector<uint4> in(64);
  for (unsigned i = 0; i < 64; ++i) in[i].x = __float_as_uint(float(i));
  std::vector<float> out(256, -1.0f);
  unsigned counters[2] = {0, 0};
  A arguments;
  static_cast<Arguments&>(arguments) = {in.data(), out.data(), counters};
  const cudaError_t error = ANL_LAUNCH(kernel, grid, 64, cluster, 1024, nullptr, arguments);
  printf("%s", cudaGetErrorName(error));
  for (float x : out) printf(" %g", x);
  printf("\n");
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  if (name == "barrier_of_some") return run(barrier_of_some, 1, 1);
  if (name == "barriers_apart") return run(barriers_apart, 1, 1);
  if (name == "copies") return run(copies, 1, 1);
  if (name == "copy_not_waited_for") return run(copy_not_waited_for, 1, 1);
  if (name == "copy_of_unaligned") return run(copy_of_unaligned, 1, 1);
  if (name == "bulk") return run(bulk<1024>, 1, 1);
  if (name == "bulk_too_little") return run(bulk<1008>, 1, 1);
  if (name == "bulk_too_much") return run(bulk<1040>, 1, 1);
  if (name == "shuffle_from_nobody") return run(shuffle_from_nobody, 1, 1);
  if (name == "shuffles") return run(shuffles, 1, 1);
  if (name == "neighbours") return run(neighbours, 4, 4);
  if (name == "early") return run<EarlyArguments>(early, 1, 1);
  if (name == "early_by_half") return run<EarlyArguments>(early_by_half, 1, 1);
  if (name == "order") return run(order, 40, 1);
  if (name == "shared_of_nobody") return run(shared_of_nobody, 1, 1);
  if (name == "past_the_end") return run(past_the_end, 1, 1);
  return 1;
}
