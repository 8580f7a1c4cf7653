// Kernels that the gates must find fault with, and some that they must not.
#include <stdint.h>

template <class T>
__device__ __forceinline__ T exp2_of(T x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

__device__ __forceinline__ float4 exp2_of(float4 v, float c) {
  return {exp2_of(v.x - c), exp2_of(v.y - c), exp2_of(v.z - c), exp2_of(v.w - c)};
}

template <class T>
__global__ void many_values_kernel(const T* in, T* out, int n) {
  T x[40];
#pragma unroll
  for (int i = 0; i < 40; ++i) x[i] = in[threadIdx.x + i * 256];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 40; ++i) x[i] = x[i] * x[(i + 7) % 40] + in[k];
  }
#pragma unroll
  for (int i = 0; i < 40; ++i) out[threadIdx.x + i * 256] = x[i];
}

template <class T>
__global__ void __launch_bounds__(256) indexed_kernel(const T* in, T* out, int n) {
  T x[40];
  for (int i = 0; i < 40; ++i) x[i] = in[i];
  for (int k = 0; k < n; ++k) x[k * 7 % 40] += in[k];
  for (int i = 0; i < 40; ++i) out[i] = x[i];
}

template <class T>
__global__ void __launch_bounds__(256) greedy_kernel(const T* in, T* out, int n) {
  T x[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) x[i] = in[threadIdx.x + i * 256];
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 100; ++i) x[i] = x[i] * x[(i + 7) % 100] + in[k];
  }
#pragma unroll
  for (int i = 0; i < 100; ++i) out[threadIdx.x + i * 256] = x[i];
}

// A sweep and a loop that writes, each over packs of 16 bytes.
template <class T, bool SWEEP, bool WRITES, int EXPS>
__device__ __forceinline__ void row(const T* in, T* out, int n, float c) {
  const float4* packs = reinterpret_cast<const float4*>(in);
  float sum = 0.0f;
  if (SWEEP) {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 256) {
      float4 e = exp2_of(packs[i], c);
      for (int k = 1; k < EXPS; ++k) e = exp2_of(e, c);
      sum += e.x + e.y + e.z + e.w;
    }
    out[n * 4 + threadIdx.x] = sum;
  }
  if (WRITES) {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += 256) reinterpret_cast<float4*>(out)[i] = exp2_of(packs[i], c + sum);
  }
}

template <class T>
__global__ void good_kernel(const T* in, T* out, int n, float c) {
  row<T, true, true, 1>(in, out, n, c);
}
template <class T>
__global__ void two_exps_kernel(const T* in, T* out, int n, float c) {
  row<T, true, true, 2>(in, out, n, c);
}
template <class T>
__global__ void no_sweep_kernel(const T* in, T* out, int n, float c) {
  row<T, false, true, 1>(in, out, n, c);
}
template <class T>
__global__ void no_writer_kernel(const T* in, T* out, int n, float c) {
  row<T, true, false, 1>(in, out, n, c);
}
template <class T>
__global__ void narrow_kernel(const T* in, T* out, int n, float c) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) out[i] = exp2_of(in[i] - c);
}
template <class T>
__global__ void narrow_store_kernel(const T* in, T* out, int n, float c) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    const float4 e = exp2_of(reinterpret_cast<const float4*>(in)[i], c);
    out[i * 3] = e.x + e.y + e.z + e.w;
  }
}

template __global__ void many_values_kernel<float>(const float*, float*, int);
template __global__ void indexed_kernel<float>(const float*, float*, int);
template __global__ void greedy_kernel<float>(const float*, float*, int);
template __global__ void good_kernel<float>(const float*, float*, int, float);
template __global__ void two_exps_kernel<float>(const float*, float*, int, float);
template __global__ void no_sweep_kernel<float>(const float*, float*, int, float);
template __global__ void no_writer_kernel<float>(const float*, float*, int, float);
template __global__ void narrow_kernel<float>(const float*, float*, int, float);
template __global__ void narrow_store_kernel<float>(const float*, float*, int, float);
