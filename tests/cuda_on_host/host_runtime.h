// CUDA's runtime, as far as csrc/cuda calls it, and the part of the driver's interface that changes contexts: over the
// devices of host_devices.h. Names and numbers are CUDA's; what CUDA refuses is refused (host_runtime.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>
#include <tuple>
#include <utility>

#include "engine.h"

#define CUDART_VERSION 13000  // 13.0

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorDeviceUninitialized = 201,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorUnknown = 999,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// ---- devices ---------------------------------------------------------------------------------------------------------------

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);

// ---- kernels and launches --------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  char pad[64];
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* cluster, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared_bytes);

namespace anl {
namespace host {

// A kernel's parameters as they lie in its constant memory.
struct Parameters {
  std::string bytes;
  template <class P>
  void add(const P& parameter) {
    bytes.resize((bytes.size() + alignof(P) - 1) / alignof(P) * alignof(P));
    bytes.append(reinterpret_cast<const char*>(&parameter), sizeof(P));
  }
};

// Whether launches are only kept, with their parameters, for what reads the kernels' machine code (tests/cuda_gates).
bool recording();
void record(const cudaLaunchConfig_t& config, const void* kernel, const Parameters& parameters);

// The kernel as the engine runs it: body(context) in every thread.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context);

// As a graph does: keeps launches while a test asks for it, to run them again with the same parameters.
bool captures();
void capture(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

// Counts what CTAs do to one another: memory that orders them, clusters, bulk copies (csrc/cuda/kernels.h, Protocol).
void note_protocol();

}  // namespace host
}  // namespace anl

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  std::tuple<P...> parameters(std::forward<A>(arguments)...);
  if (anl::host::recording()) {
    anl::host::Parameters all;
    std::apply([&](const auto&... each) { (all.add(each), ...); }, parameters);
    anl::host::record(*config, reinterpret_cast<const void*>(kernel), all);
  }
  const auto body = [&] { std::apply(kernel, parameters); };
  using Body = decltype(body);
  const auto address = reinterpret_cast<const void*>(kernel);
  const auto run = [](void* context) { (*static_cast<Body*>(context))(); };
  void* const context = const_cast<void*>(static_cast<const void*>(&body));
  const cudaError_t error = anl::host::launch(*config, address, run, context);
  if (!error && anl::host::captures())
    anl::host::capture(*config, address, [kernel, parameters] { std::apply(kernel, parameters); });
  return error;
}

// ---- the driver's contexts --------------------------------------------------------------------------------------------------

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_DEVICE = 101, CUDA_ERROR_INVALID_CONTEXT = 201 };
using CUdevice = int;
using CUcontext = struct CUctx_st*;

enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1,
  cudaDriverEntryPointVersionNotSufficent = 2,
};
// Knows cuDeviceGet, cuDevicePrimaryCtxRetain, cuCtxPushCurrent, cuCtxPopCurrent and cuCtxGetCurrent.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* status = nullptr);
