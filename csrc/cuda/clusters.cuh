// How large clusters may be, and how many of them a device holds.
#pragma once

#include <array>
#include <map>
#include <mutex>

#include "launch.cuh"

namespace anl {
namespace gpu {

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

// cudaError_t of count_clusters, whose answer goes to the int `found`.
#define ANL_COUNT_CLUSTERS(kernel, threads, cluster, shared_bytes, found)                                            \
  ([&]() -> cudaError_t {                                                                                            \
    static ::anl::gpu::ClusterCounts counts;                                                                         \
    return ::anl::gpu::count_clusters(counts, reinterpret_cast<const void*>(kernel), threads, cluster, shared_bytes, \
                                      found);                                                                        \
  }())

}  // namespace gpu
}  // namespace anl
