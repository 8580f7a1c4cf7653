// Launches of kernels, and what the runtime has to be told before. Included by primitives.cuh.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>

namespace anl {
namespace gpu {

constexpr unsigned NO_CLUSTER = 0;

// What a kernel has been told on each device, once: that it may have all shared memory there is, and wide clusters.
struct KernelAttributes {
  static constexpr int MAX_DEVICES = 64;
  std::atomic<bool> all_shared[MAX_DEVICES], wide_cluster[MAX_DEVICES];
};

inline cudaError_t allow_all_shared(const void* kernel, int device) {
  int bytes = 0;
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes - int(attributes.sharedSizeBytes));
}

inline cudaError_t prepare(KernelAttributes& known, const void* kernel, unsigned cluster, size_t shared_bytes) {
  constexpr size_t WITHOUT_ASKING = 32 << 10;  // 48 KB with what the kernel has of static shared memory
  constexpr unsigned PORTABLE_CLUSTER = 8;
  const bool shared = shared_bytes > WITHOUT_ASKING, wide = cluster > PORTABLE_CLUSTER;
  if (!shared && !wide) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const int slot = device % KernelAttributes::MAX_DEVICES;
  const bool certain = device == slot;
  if (shared && !(certain && known.all_shared[slot])) {
    if (const cudaError_t error = allow_all_shared(kernel, device)) return error;
    known.all_shared[slot] = certain;
  }
  if (wide && !(certain && known.wide_cluster[slot])) {
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
      return error;
    known.wide_cluster[slot] = certain;
  }
  return cudaSuccess;
}

// The attributes point to `dimension`, which must live as long. A cluster of one is named like any other: the occupancy
// query refuses a configuration that names none.
inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
                                        cudaStream_t stream, cudaLaunchAttribute& dimension) {
  dimension = {};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &dimension;
  config.numAttrs = cluster == NO_CLUSTER ? 0 : 1;
  return config;
}

// Whether a launch with this argument starts before the one ahead of it has ended: kernels.h has the Params that do.
template <class X>
bool starts_early(const X&) {
  return false;
}

template <class... P, class... A>
cudaError_t launch(KernelAttributes& known, void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster,
                   size_t shared_bytes, cudaStream_t stream, const A&... arguments) {
  const cudaError_t error = prepare(known, reinterpret_cast<const void*>(kernel), cluster, shared_bytes);
  if (error) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = launch_config(grid, block, cluster, shared_bytes, stream, attributes[0]);
  if ((starts_early(arguments) || ...)) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// cudaError_t of the launch: ANL_LAUNCH((a_kernel<float>), grid, block, cluster, shared_bytes, stream, params).
// `cluster` CTAs in a row along x, or NO_CLUSTER. Shared memory above 48 KB and clusters above 8 are asked for.
#define ANL_LAUNCH(kernel, grid, block, cluster, shared_bytes, stream, ...)                              \
  ([&]() -> cudaError_t {                                                                                \
    static ::anl::gpu::KernelAttributes known;                                                           \
    return ::anl::gpu::launch(known, kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__);   \
  }())

}  // namespace gpu
}  // namespace anl
