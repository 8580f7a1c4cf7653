// Devices' contexts: which exists, which is current, which errors stay. The runtime's functions for them, and the driver's.
#include "host_contexts.h"

#include <map>
#include <string_view>
#include <vector>

struct CUctx_st {};  // a device's only context: number i of `contexts`

namespace anl {
namespace host {

std::atomic<cudaError_t> broken[NUM_DEVICES] = {};

namespace {

CUctx_st contexts[NUM_DEVICES];
std::atomic<unsigned> created{0};   // a bit per device
std::atomic<int> first_device{0};  // current in a thread that has never chosen one

struct HostThread {
  std::vector<int> contexts;  // the current one last
  cudaError_t last_error = cudaSuccess;
};
thread_local HostThread host_thread;

void create_context(int device) { created |= 1u << device; }

}  // namespace

int current_device() { return host_thread.contexts.empty() ? first_device.load() : host_thread.contexts.back(); }

cudaError_t answer(cudaError_t error) {
  if (error) host_thread.last_error = error;
  return error;
}

bool exists(int device) { return device >= 0 && device < NUM_DEVICES; }

cudaError_t enter_context() {
  const int device = current_device();
  create_context(device);
  if (host_thread.contexts.empty()) host_thread.contexts.push_back(device);
  return broken[device];
}

namespace {

CUresult get_device(CUdevice* device, int ordinal) {
  if (!exists(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult retain(CUcontext* context, CUdevice device) {
  if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  create_context(device);
  *context = &contexts[device];
  return CUDA_SUCCESS;
}
CUresult push(CUcontext context) {
  if (context < contexts || context >= contexts + NUM_DEVICES) return CUDA_ERROR_INVALID_CONTEXT;
  host_thread.contexts.push_back(int(context - contexts));
  return CUDA_SUCCESS;
}
CUresult get_current(CUcontext* context) {
  *context = host_thread.contexts.empty() ? nullptr : &contexts[host_thread.contexts.back()];
  return CUDA_SUCCESS;
}
CUresult pop(CUcontext* context) {
  if (host_thread.contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) get_current(context);
  host_thread.contexts.pop_back();
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace host
}  // namespace anl

using namespace anl::host;

// ---- for the tests ---------------------------------------------------------------------------------------------------------

// That one is current where nobody has chosen another; no context is made.
EXPORTED int anl_host_use_device(int device) {
  if (!exists(device)) return -1;
  first_device = device;
  host_thread.contexts.clear();
  return 0;
}
// A bit per device that has a context.
EXPORTED unsigned anl_host_contexts() { return created; }
EXPORTED void anl_host_create_context(int device) { create_context(device); }
// The device whose context is current in this thread; -1: none is.
EXPORTED int anl_host_current_context() { return host_thread.contexts.empty() ? -1 : host_thread.contexts.back(); }
EXPORTED int anl_host_set_device(int device) { return cudaSetDevice(device); }
// No contexts, in this thread none that is current, no errors. What kernels were told and what is known of them stays:
// csrc/cuda tells them once.
EXPORTED void anl_host_reset() {
  created = 0;
  for (std::atomic<cudaError_t>& error : broken) error = cudaSuccess;
  host_thread = {};
}

// ---- the runtime -----------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = NUM_DEVICES;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (!exists(device)) return answer(cudaErrorInvalidDevice);
  create_context(device);
  if (host_thread.contexts.empty()) host_thread.contexts.push_back(device);
  host_thread.contexts.back() = device;
  return answer(broken[device]);
}

cudaError_t cudaPeekAtLastError() {
  const cudaError_t stays = created >> current_device() & 1 ? broken[current_device()].load() : cudaSuccess;
  return stays ? stays : host_thread.last_error;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  host_thread.last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
#define NAMED(name) \
  case name: return #name;
  switch (error) {
    NAMED(cudaSuccess)
    NAMED(cudaErrorInvalidValue)
    NAMED(cudaErrorMemoryAllocation)
    NAMED(cudaErrorInvalidConfiguration)
    NAMED(cudaErrorInsufficientDriver)
    NAMED(cudaErrorInvalidDeviceFunction)
    NAMED(cudaErrorNoDevice)
    NAMED(cudaErrorInvalidDevice)
    NAMED(cudaErrorDeviceUninitialized)
    NAMED(cudaErrorNoKernelImageForDevice)
    NAMED(cudaErrorInvalidPtx)
    NAMED(cudaErrorUnsupportedPtxVersion)
    NAMED(cudaErrorIllegalAddress)
    NAMED(cudaErrorLaunchOutOfResources)
    NAMED(cudaErrorLaunchTimeout)
    NAMED(cudaErrorIllegalInstruction)
    NAMED(cudaErrorMisalignedAddress)
    NAMED(cudaErrorLaunchFailure)
    NAMED(cudaErrorNotSupported)
    NAMED(cudaErrorStreamCaptureInvalidated)
    NAMED(cudaErrorInvalidClusterSize)
    NAMED(cudaErrorUnknown)
  }
#undef NAMED
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// ---- the driver ------------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* status) {
  static const std::map<std::string_view, void*> known = {
      {"cuDeviceGet", reinterpret_cast<void*>(get_device)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(push)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(pop)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(get_current)},
  };
  if (!symbol || !function || flags != cudaEnableDefault || version > CUDART_VERSION) return answer(cudaErrorInvalidValue);
  const auto found = known.find(symbol);
  *function = found == known.end() ? nullptr : found->second;
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
