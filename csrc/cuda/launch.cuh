// Launches of kernels: what the runtime has to be told before, clusters, errors. Included by primitives.cuh.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>

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

template <class... P, class... A>
cudaError_t launch(KernelAttributes& known, void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster,
                   size_t shared_bytes, cudaStream_t stream, const A&... arguments) {
  const cudaError_t error = prepare(known, reinterpret_cast<const void*>(kernel), cluster, shared_bytes);
  if (error) return error;
  cudaLaunchAttribute dimension;
  const cudaLaunchConfig_t config = launch_config(grid, block, cluster, shared_bytes, stream, dimension);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The answers of cudaOccupancyMaxActiveClusters, which takes its time. Only those that say that a cluster fits: a refusal
// may be another program's doing, and is asked for again.
struct ClusterCounts {
  std::mutex mutex;
  std::map<std::array<int64_t, 4>, int> known;  // by device, threads, cluster, shared bytes
};

// How many clusters of a kernel the current device holds at a time; cudaErrorInvalidClusterSize if none.
inline cudaError_t count_clusters(ClusterCounts& counts, const void* kernel, unsigned threads, unsigned cluster,
                                  size_t shared_bytes, int& found) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::array<int64_t, 4> key = {device, int64_t(threads), int64_t(cluster), int64_t(shared_bytes)};
  const std::lock_guard<std::mutex> lock(counts.mutex);
  if (const auto known = counts.known.find(key); known != counts.known.end()) {
    found = known->second;
    return cudaSuccess;
  }
  KernelAttributes once = {};  // the same is asked for again: no harm
  cudaLaunchAttribute dimension;
  const cudaLaunchConfig_t config = launch_config(cluster, threads, cluster, shared_bytes, nullptr, dimension);
  if (const cudaError_t error = prepare(once, kernel, cluster, shared_bytes)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&found, kernel, &config)) return error;
  if (found < 1) return cudaErrorInvalidClusterSize;
  counts.known[key] = found;
  return cudaSuccess;
}

// The widest cluster of a kernel with so many threads and so much shared memory, a power of two; 1 where the kernel's
// machine code was made for a device that has no clusters.
inline cudaError_t widest_cluster(const void* kernel, unsigned threads, size_t shared_bytes, int& cluster) {
  constexpr int HAS_CLUSTERS = 90;
  constexpr unsigned WIDEST = 16;
  cudaFuncAttributes attributes;
  KernelAttributes once = {};
  cudaLaunchAttribute unused;
  const cudaLaunchConfig_t config = launch_config(WIDEST, threads, NO_CLUSTER, shared_bytes, nullptr, unused);
  int widest = 0;
  cluster = 1;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  if (attributes.ptxVersion < HAS_CLUSTERS || attributes.binaryVersion < HAS_CLUSTERS) return cudaSuccess;
  if (const cudaError_t error = prepare(once, kernel, WIDEST, shared_bytes)) return error;
  if (const cudaError_t error = cudaOccupancyMaxPotentialClusterSize(&widest, kernel, &config)) return error;
  while (2 * cluster <= widest) cluster *= 2;
  return cudaSuccess;
}

// cudaError_t of the launch: ANL_LAUNCH((a_kernel<float>), grid, block, cluster, shared_bytes, stream, params).
// `cluster` CTAs in a row along x, or NO_CLUSTER. Shared memory above 48 KB and clusters above 8 are asked for.
#define ANL_LAUNCH(kernel, grid, block, cluster, shared_bytes, stream, ...)                              \
  ([&]() -> cudaError_t {                                                                                \
    static ::anl::gpu::KernelAttributes known;                                                           \
    return ::anl::gpu::launch(known, kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__);   \
  }())

// cudaError_t of count_clusters, whose answer goes to the int `found`.
#define ANL_COUNT_CLUSTERS(kernel, threads, cluster, shared_bytes, found)                                            \
  ([&]() -> cudaError_t {                                                                                            \
    static ::anl::gpu::ClusterCounts counts;                                                                         \
    return ::anl::gpu::count_clusters(counts, reinterpret_cast<const void*>(kernel), threads, cluster, shared_bytes, \
                                      found);                                                                        \
  }())

}  // namespace gpu
}  // namespace anl
