// Kernels whose warps issue what test_walk.py knows beforehand.
#include <stdint.h>

__device__ __forceinline__ float exp2_of(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float sine_of(float x) {
  asm("sin.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// n turns, each of four exps; in a rare case, which depends on what is read, a sine besides.
extern "C" __global__ void sweep_kernel(const float4* in, float* out, int n, int rows) {
  for (int r = 0; r < rows; ++r) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const float4 v = in[(r * n + i) * 32 + threadIdx.x];
      sum += exp2_of(v.x) + exp2_of(v.y) + exp2_of(v.z) + exp2_of(v.w);
      if (v.x > 3.0f) {
        for (int k = 0; k < 3; ++k) sum = sine_of(sum) * sum;
      }
    }
    out[r * 32 + threadIdx.x] = sqrtf(sum);
  }
}

// What is infinite or NaN is rare, too; here that side is shorter.
extern "C" __global__ void finite_kernel(const float* in, float* out) {
  const float x = in[threadIdx.x];
  float y = 0.0f;
  if (x > -__builtin_inff()) y = exp2_of(sine_of(x) * x) * sine_of(x + 1.0f);
  out[threadIdx.x] = y;
}

// Lanes below `few` do more, so their warps do; every lane's number decides how often.
extern "C" __global__ void lanes_kernel(const float* in, float* out, int few) {
  float x = in[threadIdx.x];
  if (int(threadIdx.x) < few) {
#pragma unroll 1
    for (int i = 0; i < 5; ++i) x = exp2_of(x);
  }
#pragma unroll 1
  for (int i = 0; i < int(threadIdx.x) / 4; ++i) x = sine_of(x);
  out[threadIdx.x] = x;
}

// A loop over kinds that are parameters, through a table.
struct Kinds {
  int count;
  int kind[8];
};
extern "C" __global__ void kinds_kernel(const float* in, float* out, const __grid_constant__ Kinds kinds) {
  float x = in[threadIdx.x];
#pragma unroll 1
  for (int t = 0; t < kinds.count; ++t) {
    switch (kinds.kind[t]) {
      case 0: x = exp2_of(x); break;
      case 1: x = sine_of(sine_of(x)); break;
      case 2: x = sine_of(exp2_of(x)) + 1.0f; break;
      case 3: x = rsqrtf(x); break;
      case 4: x = x * x + 2.0f; break;
      default: x = -x;
    }
  }
  out[threadIdx.x] = x;
}

// A flag in shared memory that depends on what was read: the side that reads again is taken.
extern "C" __global__ void again_kernel(const float* in, float* out, int n) {
  __shared__ bool again;
  float x = in[threadIdx.x];
  if (threadIdx.x == 0) again = x > 2.0f;
  __syncthreads();
  if (again) {
#pragma unroll 1
    for (int i = 0; i < n; ++i) x += exp2_of(in[i * blockDim.x + threadIdx.x]);
  }
  out[threadIdx.x] = x;
}

// Numbers all at once, or, in a rare case, one after another as they are read again.
extern "C" __global__ void at_once_kernel(const float* in, float* out, int n) {
  float x[16], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += x[i] = in[i * blockDim.x + threadIdx.x];
  if (sum > 2.0f) {
#pragma unroll 1
    for (int i = 0; i < n; ++i) sum += sine_of(in[i * blockDim.x + threadIdx.x]);
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += exp2_of(x[i] * sum);
  }
  out[threadIdx.x] = sum;
}

// Words of two by tensor cores, or, in a rare case, number after number in a shorter loop.
extern "C" __global__ void packed_kernel(const float* in, float* out, int n) {
  float sum[4] = {in[threadIdx.x]};
  if (sum[0] > 2.0f) {
#pragma unroll 1
    for (int i = 0; i < n; ++i) sum[0] += sine_of(in[i * blockDim.x + threadIdx.x]);
  } else {
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const unsigned word = __float_as_uint(in[i * blockDim.x + threadIdx.x]);
      asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4}, {%4}, {%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(word));
#pragma unroll
      for (float& s : sum) s = exp2_of(s) * sum[0];
    }
  }
  out[threadIdx.x] = sum[0] + sum[1] + sum[2] + sum[3];
}

// What thread 0 tells the others, anew for each round.
extern "C" __global__ void told_kernel(const float* in, float* out, int n) {
  __shared__ int told;
  float x = in[threadIdx.x];
#pragma unroll 1
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) told = n + round;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < told; ++i) x = exp2_of(x);
    __syncthreads();
  }
  out[threadIdx.x] = x;
}

// Divisions by numbers that are known only when it runs.
extern "C" __global__ void division_kernel(const float* in, float* out, int a, int b, int64_t c, int64_t d) {
  float x = in[threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < a / b; ++i) x = exp2_of(x);
#pragma unroll 1
  for (int64_t i = 0; i < c % d; ++i) x = sine_of(x);
  out[threadIdx.x] = x;
}

// How often it stores depends on what it reads: nobody can say.
extern "C" __global__ void endless_kernel(const int* in, float* out) {
  const int n = in[threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; ++i) out[i] = float(i);
}

// Two groups of copies on their way together; n exps before the second is awaited.
extern "C" __global__ void copies_kernel(const float4* in, float* out, int n) {
  __shared__ float4 staged[2][32];
  const int t = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    const uint32_t to = uint32_t(__cvta_generic_to_shared(&staged[group][t]));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(in + group * 32 + t) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  float x = staged[0][t].x;
#pragma unroll 1
  for (int i = 0; i < n; ++i) x = exp2_of(x);
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  out[t] = x + staged[1][t].x;
}

// Lanes end depending on what they read; the plain path goes on.
extern "C" __global__ void ends_kernel(const float* in, float* out) {
  const float x = in[threadIdx.x];
  out[threadIdx.x] = x;
  if (x < 0.0f) return;
  out[blockDim.x + threadIdx.x] = exp2_of(x);
}
