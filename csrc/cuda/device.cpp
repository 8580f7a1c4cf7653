#include "device.h"

#include <cuda.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_DEVICES = 64;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "reading a device's attributes");
  return value;
}

void check_index(int device) {
  if (device >= MAX_DEVICES) throw std::runtime_error("anl_kernels: more than 64 CUDA devices");
}

// ---- contexts, by the driver's functions: the runtime has none for them, and the module is not linked with libcuda -----

struct Driver {
  CUresult (*retain)(CUcontext*, CUdevice);
  CUresult (*push)(CUcontext);
  CUresult (*pop)(CUcontext*);
};

template <class F>
void find(F& function, const char* name) {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  constexpr unsigned VERSION = 12000;
  check(cudaGetDriverEntryPointByVersion(name, &found, VERSION, cudaEnableDefault, nullptr), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault), name);
#endif
  if (!found) throw std::runtime_error(std::string("anl_kernels: the NVIDIA driver has no ") + name);
  function = reinterpret_cast<F>(found);
}

const Driver& driver() {
  static const Driver known = [] {
    Driver d = {};
    find(d.retain, "cuDevicePrimaryCtxRetain");
    find(d.push, "cuCtxPushCurrent");
    find(d.pop, "cuCtxPopCurrent");
    return d;
  }();
  return known;
}

void check_driver(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("anl_kernels: ") + what + " failed: CUDA driver error " + std::to_string(result));
}

// Retained once and for good, as PyTorch does whose memory the logits are.
CUcontext primary_context(int device) {
  static CUcontext known[MAX_DEVICES];
  static std::once_flag once[MAX_DEVICES];
  check_index(device);
  std::call_once(once[device],
                 [&] { check_driver(driver().retain(&known[device], device), "finding the logits' device"); });
  return known[device];
}

// ---- limits --------------------------------------------------------------------------------------------------------

Limits read_limits(int device) {
  Limits limits = {};
  limits.arch = arch_of(device);
  limits.num_sms = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.max_threads = attribute(cudaDevAttrMaxThreadsPerBlock, device);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.registers = attribute(cudaDevAttrMaxRegistersPerBlock, device);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  limits.max_cluster = 1;
  limits.protocols = ALL_PROTOCOLS;
  return limits;
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("anl_kernels: ") + what + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

bool is_refusal(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:  // of an attribute: more shared memory than there is
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidClusterSize:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNotSupported:
    case cudaErrorInvalidDeviceFunction:  // no machine code for this device
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion: return true;
    default: return false;
  }
}

OnDevice::OnDevice(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "finding the current device");
  device_ = device < 0 ? current : device;
  if (device_ == current) return;
  int count = 0;
  check(cudaGetDeviceCount(&count), "counting the devices");
  if (device_ >= count) check(cudaErrorInvalidDevice, "choosing the logits' device");
  check_driver(driver().push(primary_context(device_)), "choosing the logits' device");
  pushed_ = true;
}

OnDevice::~OnDevice() {
  CUcontext popped = nullptr;
  if (pushed_) driver().pop(&popped);
}

int arch_of(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
}

Limits limits_of(int device) {
  static Limits known[MAX_DEVICES];
  static bool complete[MAX_DEVICES];
  static std::mutex mutex;
  check_index(device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!complete[device]) {
    known[device] = read_limits(device);
    // An error may be another program's doing: no clusters this time, and the next call asks again.
    Limits& limits = known[device];
    complete[device] = !attribute(cudaDevAttrClusterLaunch, device) ||
                       (widest_rows_cluster(limits, limits.max_cluster) == cudaSuccess &&
                        can_start_early(limits.early_starts) == cudaSuccess);
    if (!complete[device]) cudaGetLastError();
  }
  return known[device];
}

}  // namespace gpu
}  // namespace anl
