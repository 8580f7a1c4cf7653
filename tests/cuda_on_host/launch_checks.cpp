// What a device refuses: `launch_checks DEVICE WHAT [name=number ...]` prints the errors (and numbers) that came of it.
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <string>

#include "cuda/reduce.cuh"
#include "host_devices.h"

extern "C" int anl_host_use_device(int device);
extern "C" unsigned anl_host_contexts();
extern "C" void anl_host_reset();
namespace anl {
namespace host {
void set_registers(const void* kernel, int registers);
}
}  // namespace anl

using namespace anl::gpu;

namespace {

std::map<std::string, long long> given;
long long number(const char* name, long long otherwise) {
  const auto found = given.find(name);
  return found == given.end() ? otherwise : found->second;
}
void say(cudaError_t error) { printf("%s\n", cudaGetErrorName(error)); }

// ---- kernels ---------------------------------------------------------------------------------------------------------------

__global__ void nothing(int) {}
__global__ void has_static_shared(int) {
  ANL_STATIC_SHARED(char[4096], bytes);
  bytes[threadIdx.x] = 0;
}
__global__ void traps(int) { __trap(); }

// One instruction that sm_80 does not have.
__global__ void instruction(int which) {
  ANL_SHARED(uint4, staged);
  ANL_STATIC_SHARED(Barrier, barrier);
  Barrier* const unknown = &barrier;
  switch (which) {
    case 0: return barrier_init(unknown, 1);
    case 1: return barrier_expect(unknown, 0);
    case 2: return barrier_wait(unknown, 0);
    case 3: return bulk_copy(SharedPlace(staged), staged, 16, unknown);
    case 4: return cluster_sync();
    case 5: return cluster_wait();
    case 6: staged[cluster_rank()].x = 0; return;
    case 7: return cluster_send16(staged, {}, unknown, 0);
  }
}

using Kernel = void (*)(int);
const std::map<std::string, Kernel> KERNELS = {
    {"nothing", nothing}, {"has_static_shared", has_static_shared}, {"traps", traps}, {"instruction", instruction}};
const void* address(Kernel kernel) { return reinterpret_cast<const void*>(kernel); }

// ---- launches --------------------------------------------------------------------------------------------------------------

struct Configuration {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  Configuration() {
    config.gridDim = dim3(number("grid", 1), number("grid_y", 1), number("grid_z", 1));
    config.blockDim = dim3(number("block", 32), number("block_y", 1), number("block_z", 1));
    config.dynamicSmemBytes = size_t(number("shared", 0));
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(number("cluster", 1)), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = given.count("cluster");
  }
};

// Before the launch or query; false: it was refused, and said.
bool tell(Kernel kernel) {
  anl::host::set_registers(address(kernel), int(number("registers", 64)));
  cudaError_t error = cudaSuccess;
  if (given.count("ask"))
    error = cudaFuncSetAttribute(address(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(number("ask", 0)));
  if (!error && number("wide", 0))
    error = cudaFuncSetAttribute(address(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error) say(error);
  return !error;
}

void launch(Kernel kernel) {
  const Configuration c;
  for (long long i = 0; i < number("times", 1); ++i) {
    if (!tell(kernel)) return;
    say(cudaLaunchKernelEx(&c.config, kernel, int(number("which", 0))));
  }
}

void occupancy(Kernel kernel) {
  const Configuration c;
  if (!tell(kernel)) return;
  int clusters = -1, widest = -1, blocks = -1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, address(kernel), &c.config);
  cudaOccupancyMaxPotentialClusterSize(&widest, address(kernel), &c.config);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address(kernel), int(c.config.blockDim.x), c.config.dynamicSmemBytes);
  printf("%s %d %d %d\n", cudaGetErrorName(error), clusters, widest, blocks);
}

void attributes(Kernel kernel) {
  cudaFuncAttributes a;
  say(cudaFuncGetAttributes(&a, address(kernel)));
  printf("%zu %d %d %d %d %d\n", a.sharedSizeBytes, a.maxDynamicSharedSizeBytes, a.maxThreadsPerBlock, a.numRegs,
         a.ptxVersion, a.binaryVersion);
}

// ---- errors and contexts ---------------------------------------------------------------------------------------------------

// What each call answers that needs the current device's context.
void every_call() {
  const Configuration c;
  int n = 0;
  cudaFuncAttributes a;
  say(cudaLaunchKernelEx(&c.config, nothing, 0));
  say(cudaFuncGetAttributes(&a, address(nothing)));
  say(cudaFuncSetAttribute(address(nothing), cudaFuncAttributeMaxDynamicSharedMemorySize, 0));
  say(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, address(nothing), 32, 0));
  say(cudaMemsetAsync(&n, 0, sizeof(n), nullptr));
  say(cudaGetLastError());
  say(cudaPeekAtLastError());
}

void errors_that_stay() {
  const Configuration c;
  int device = 0;
  cudaGetDevice(&device);
  say(cudaLaunchKernelEx(&c.config, traps, 0));
  every_call();
  cudaSetDevice(device == 0 ? 1 : 0);
  every_call();
  anl_host_reset();
  anl_host_use_device(device);
  every_call();
}

void errors_that_pass() {
  Configuration c;
  c.config.gridDim = dim3(0);
  say(cudaLaunchKernelEx(&c.config, nothing, 0));
  say(cudaPeekAtLastError());
  say(cudaGetLastError());
  say(cudaGetLastError());
  every_call();
}

template <class F>
F driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  if (error || found || !function) printf("%s: %s, %d\n", name, cudaGetErrorName(error), found);
  return reinterpret_cast<F>(function);
}

// The contexts that there are and the device that is current, after each step.
void contexts() {
  const auto now = [](const char* step) {
    int device = -1;
    cudaGetDevice(&device);
    printf("%s %u %d\n", step, anl_host_contexts(), device);
  };
  const auto get = driver<CUresult (*)(CUdevice*, int)>("cuDeviceGet");
  const auto retain = driver<CUresult (*)(CUcontext*, CUdevice)>("cuDevicePrimaryCtxRetain");
  const auto push = driver<CUresult (*)(CUcontext)>("cuCtxPushCurrent");
  const auto pop = driver<CUresult (*)(CUcontext*)>("cuCtxPopCurrent");
  const auto current = driver<CUresult (*)(CUcontext*)>("cuCtxGetCurrent");
  CUdevice second = -1;
  CUcontext context = nullptr, top = nullptr;
  now("nothing");
  get(&second, 1);
  now("get");
  retain(&context, second);
  now("retain");
  push(context);
  now("push");
  const Configuration c;
  cudaLaunchKernelEx(&c.config, nothing, 0);
  now("launch");
  current(&top);
  printf("current %d\n", top == context);
  pop(&top);
  printf("popped %d\n", top == context);
  now("pop");
  current(&top);
  printf("none %d %d\n", top == nullptr, pop(&top));
  cudaSetDevice(2);
  now("set");
  push(context);
  pop(nullptr);
  now("restored");
  anl_host_reset();
  now("reset");
  cudaLaunchKernelEx(&c.config, nothing, 0);
  now("first");
  driver<void*>("cuCtxPushCurrent_v2");
  void* function = nullptr;
  say(cudaGetDriverEntryPointByVersion("cuDeviceGet", &function, 99000, cudaEnableDefault, nullptr));
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = arguments[2];
  Kernel kernel = nothing;
  for (int i = 3; i < count; ++i) {
    const std::string argument = arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals), value = argument.substr(equals + 1);
    if (name == "kernel")
      kernel = KERNELS.at(value);
    else
      given[name] = atoll(value.c_str());
  }
  if (anl_host_use_device(atoi(arguments[1]))) return 2;
  if (what == "launch") launch(kernel);
  if (what == "occupancy") occupancy(kernel);
  if (what == "attributes") attributes(kernel);
  if (what == "launch_and_attributes") launch(kernel), attributes(kernel);
  if (what == "errors_that_stay") errors_that_stay();
  if (what == "errors_that_pass") errors_that_pass();
  if (what == "contexts") contexts();
  return 0;
}
