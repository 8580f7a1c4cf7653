// Devices that do not exist. Small ones, so that a few hundred classes fill a CTA's shared memory and a few thousand a
// cluster's: `anl_host_use_device` makes one current (called through ctypes by the tests).
#include "host_runtime.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>

namespace anl {
namespace host {
namespace {

struct Device {
  const char* name;
  int major, minor, processors, threads, registers, shared_bytes, l2_bytes;
};

constexpr Device DEVICES[] = {
    {"a small sm_90", 9, 0, 4, 64, 4096, 16 << 10, 256 << 10},
    {"a small sm_80", 8, 0, 3, 64, 4096, 12 << 10, 128 << 10},
    {"sm_90 of one warp", 9, 0, 2, 32, 2048, 6 << 10, 64 << 10},
    {"H100's numbers", 9, 0, 132, 1024, 65536, 227 << 10, 50 << 20},
    {"A100's numbers", 8, 0, 108, 1024, 65536, 163 << 10, 40 << 20},
};
constexpr int NUM_DEVICES = int(sizeof(DEVICES) / sizeof(DEVICES[0]));
constexpr unsigned MAX_CLUSTER = 16;

int in_use = 0;

bool fits(const Launch& launch) {
  const Device& device = DEVICES[in_use];
  const dim3 g = launch.grid, b = launch.block;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return false;
  if (!b.x || !b.y || !b.z || b.z > 64 || launch.threads() > unsigned(device.threads)) return false;
  if (launch.cluster < 1 || launch.cluster > MAX_CLUSTER || g.x % launch.cluster) return false;
  if (launch.cluster > 1 && device.major < 9) return false;
  return launch.shared_bytes <= size_t(device.shared_bytes);
}

}  // namespace

cudaError_t launch(const Launch& launch) {
  if (!fits(launch)) return cudaErrorInvalidConfiguration;
  return run(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}

int max_clusters(unsigned threads, unsigned cluster, size_t shared_bytes) {
  const Launch one = {cluster, threads, cluster, shared_bytes, nullptr, nullptr};
  return fits(one) ? std::max(1, DEVICES[in_use].processors / int(cluster)) : 0;
}

}  // namespace host
}  // namespace anl

using namespace anl::host;

extern "C" __attribute__((visibility("default"))) int anl_host_use_device(int device) {
  if (device < 0 || device >= NUM_DEVICES) return -1;
  in_use = device;
  return 0;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = NUM_DEVICES;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = in_use;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return anl_host_use_device(device) ? cudaErrorInvalidDevice : cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= NUM_DEVICES) return cudaErrorInvalidDevice;
  const Device& d = DEVICES[device];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = d.threads; break;
    case cudaDevAttrMultiProcessorCount: *value = d.processors; break;
    case cudaDevAttrL2CacheSize: *value = d.l2_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = d.shared_bytes < (48 << 10) ? d.shared_bytes : 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_bytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_bytes + 1024; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2 * d.threads; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = d.registers; break;
    case cudaDevAttrClusterLaunch: *value = d.major >= 9; break;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= NUM_DEVICES) return cudaErrorInvalidDevice;
  const Device& d = DEVICES[device];
  *properties = {};
  snprintf(properties->name, sizeof(properties->name), "%s", d.name);
  properties->major = d.major;
  properties->minor = d.minor;
  properties->multiProcessorCount = d.processors;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    default: return "cudaErrorLaunchFailure";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
