// What a GPU's runtime would answer to launches, and what it refuses to launch.
//
// Where CUDA's headers name the error of a refusal, it is that one. Where they do not, it is what the driver is known to
// give (clusters: cudaErrorInvalidClusterSize), and on a device without clusters cudaErrorNotSupported.
#include "host_contexts.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "host_devices.h"

namespace anl {
namespace host {
namespace {

// ---- kernels ---------------------------------------------------------------------------------------------------------------

// What a kernel has been told on a device.
struct Permissions {
  int dynamic = -1;  // bytes of shared memory; -1: nothing was said
  bool wide_clusters = false;
};

// Registers are not known on the host: 64 per thread, unless a test says otherwise.
struct KernelState {
  std::atomic<size_t> static_shared{0};  // the most that was seen so far: known once the kernel has run
  int registers = 64;
  Permissions on[NUM_DEVICES];
};
std::mutex kernels_mutex;
std::map<const void*, KernelState> kernels;

KernelState& state_of(const void* kernel) {
  const std::lock_guard lock(kernels_mutex);
  return kernels[kernel];
}

// Where the kernel is in its module: the same in every process, whatever the addresses are.
uint64_t identity(const void* kernel) {
  Dl_info info = {};
  return dladdr(kernel, &info) ? uint64_t(static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase)) : 0;
}

// A kernel on the current device.
struct Kernel {
  const Device& device;
  KernelState& state;
  Permissions& told;

  explicit Kernel(const void* kernel)
      : device(device_of(current_device())), state(state_of(kernel)), told(state.on[current_device()]) {}

  size_t static_shared() const { return device.toy ? 0 : state.static_shared.load(); }
  Footprint footprint(unsigned threads, size_t dynamic) const {
    return {threads, state.registers, static_shared() + dynamic};
  }
  int max_threads() const { return std::min(device.threads, device.registers / state.registers / 32 * 32); }
  int without_asking() const { return std::min(device.shared, SHARED_WITHOUT_ASKING); }
  // How much static shared memory leaves room for so much dynamic.
  size_t most_static(size_t dynamic) const {
    const size_t most = told.dynamic < 0 ? without_asking() : device.shared;
    return dynamic < most ? most - dynamic : 0;
  }
  int max_dynamic() const { return told.dynamic < 0 ? without_asking() - int(static_shared()) : told.dynamic; }
};

// ---- what is refused -------------------------------------------------------------------------------------------------------

struct Refusal {
  cudaError_t error = cudaSuccess;
  const char* why = "";
};

unsigned product(const dim3& d) { return d.x * d.y * d.z; }

Refusal refuse_block(const Kernel& kernel, const dim3& block, size_t dynamic) {
  const Device& device = kernel.device;
  if (!block.x || !block.y || !block.z || block.x > 1024 || block.y > 1024 || block.z > 64)
    return {cudaErrorInvalidConfiguration, "a block of no such size"};
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads > uint64_t(device.threads)) return {cudaErrorInvalidConfiguration, "more threads than a block may have"};
  if (threads > uint64_t(kernel.max_threads())) return {cudaErrorLaunchOutOfResources, "more registers than a block may have"};
  if (dynamic > size_t(std::max(0, kernel.max_dynamic())))
    return {cudaErrorInvalidValue, "more dynamic shared memory than the kernel has asked for"};
  if (kernel.static_shared() + dynamic > size_t(device.shared))
    return {cudaErrorInvalidValue, "more shared memory than a block may have"};
  if (!ctas_per_sm(device, kernel.footprint(unsigned(threads), dynamic)))
    return {cudaErrorLaunchOutOfResources, "a block that does not fit an SM"};
  return {};
}

Refusal refuse_grid(const dim3& grid) {
  if (!grid.x || !grid.y || !grid.z) return {cudaErrorInvalidConfiguration, "a grid without blocks"};
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return {cudaErrorInvalidConfiguration, "a grid that is too large"};
  return {};
}

Refusal refuse_cluster_size(const Kernel& kernel, unsigned cluster) {
  if (!kernel.device.max_cluster) return {cudaErrorNotSupported, "clusters on a device without them"};
  if (!cluster || cluster > unsigned(kernel.device.max_cluster)) return {cudaErrorInvalidClusterSize, "a cluster of no such size"};
  if (cluster > PORTABLE_CLUSTER && !kernel.told.wide_clusters)
    return {cudaErrorInvalidClusterSize, "a cluster above the portable size that was not asked for"};
  return {};
}

// The cluster's dimensions, of which there may be none; and whether the launch starts early.
struct Cluster1d {
  bool given = false;
  unsigned size = 1;
  bool early = false;
};

Refusal read_attributes(const cudaLaunchConfig_t& config, Cluster1d& cluster) {
  if (config.numAttrs && !config.attrs) return {cudaErrorInvalidValue, "attributes that are not there"};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeIgnore) continue;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      cluster.early = attribute.val.programmaticStreamSerializationAllowed;
      continue;
    }
    if (attribute.id != cudaLaunchAttributeClusterDimension) return {cudaErrorInvalidValue, "an attribute that is none"};
    const auto& d = attribute.val.clusterDim;
    if (d.y != 1 || d.z != 1) return {cudaErrorNotSupported, "clusters of more than one dimension are not emulated"};
    cluster.given = true;
    cluster.size = d.x;
  }
  return {};
}

Refusal refuse_launch(const Kernel& kernel, const cudaLaunchConfig_t& config, const Cluster1d& cluster) {
  if (const Refusal no = refuse_grid(config.gridDim); no.error) return no;
  if (const Refusal no = refuse_block(kernel, config.blockDim, config.dynamicSmemBytes); no.error) return no;
  if (!cluster.given) return {};
  if (const Refusal no = refuse_cluster_size(kernel, cluster.size); no.error) return no;
  if (config.gridDim.x % cluster.size) return {cudaErrorInvalidConfiguration, "a grid that is no multiple of the cluster"};
  const Footprint cta = kernel.footprint(product(config.blockDim), config.dynamicSmemBytes);
  if (!active_clusters(kernel.device, cta, cluster.size)) return {cudaErrorInvalidClusterSize, "a cluster that no GPC holds"};
  return {};
}

std::atomic<unsigned> protocol_uses{0}, launches{0};  // since they were last read
std::string to_refuse;                                // '1' for each launch that a test wants refused
cudaError_t refusal = cudaErrorInvalidConfiguration;  // with this

struct Recorded {
  unsigned grid, block, cluster;
  size_t shared;
  uint64_t kernel;
  std::string parameters;
};
bool is_recording = false;
std::vector<Recorded> recorded;

cudaError_t refused(const Refusal& refusal) {
  fprintf(stderr, "CUDA on the host: refused, %s (%s)\n", refusal.why, cudaGetErrorName(refusal.error));
  return answer(refusal.error);
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, void (*body)(void*), void* context) {
  if (const cudaError_t error = enter_context()) return answer(error);
  const Kernel kernel(function);
  Cluster1d cluster;
  if (const Refusal no = read_attributes(config, cluster); no.error) return refused(no);
  if (const Refusal no = refuse_launch(kernel, config, cluster); no.error) return refused(no);
  const unsigned number = launches++;
  if (number < to_refuse.size() && to_refuse[number] == '1') return refused({refusal, "as a test asks"});
  if (recording()) return cudaSuccess;
  Launch launch = {config.gridDim, config.blockDim, cluster.size, config.dynamicSmemBytes, body, context};
  launch.identity = identity(function);
  launch.code = kernel.device.ptx;
  launch.starts_early = cluster.early;
  launch.static_shared = &kernel.state.static_shared;
  launch.most_static_shared = kernel.device.toy ? SIZE_MAX : kernel.most_static(config.dynamicSmemBytes);
  switch (run(launch)) {
    case Outcome::DONE: return cudaSuccess;
    case Outcome::REFUSED: return answer(cudaErrorInvalidValue);
    default: return answer(broken[current_device()] = cudaErrorLaunchFailure);
  }
}

bool recording() { return is_recording; }
void record(const cudaLaunchConfig_t& config, const void* kernel, const Parameters& parameters) {
  Cluster1d cluster;
  read_attributes(config, cluster);
  recorded.push_back({config.gridDim.x, config.blockDim.x, cluster.size, config.dynamicSmemBytes, identity(kernel),
                      parameters.bytes});
}

namespace {

struct Captured {
  cudaLaunchConfig_t config;
  std::vector<cudaLaunchAttribute> attributes;
  const void* kernel;
  std::function<void()> body;
};
bool is_capturing = false;
std::vector<Captured> captured;

}  // namespace

bool captures() { return is_capturing; }
void capture(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  captured.push_back({config, {config.attrs, config.attrs + config.numAttrs}, kernel, std::move(body)});
}

void note_protocol() { protocol_uses.fetch_add(1, std::memory_order_relaxed); }

void set_registers(const void* kernel, int registers) { state_of(kernel).registers = registers; }

}  // namespace host
}  // namespace anl

using namespace anl::host;

// ---- for the tests, by ctypes ----------------------------------------------------------------------------------------------

EXPORTED unsigned anl_host_protocol_uses() { return protocol_uses.exchange(0); }
EXPORTED unsigned anl_host_launches() { return launches.exchange(0); }
// "010": the second of the launches that follow is refused with that error.
EXPORTED void anl_host_refuse(const char* launches_to_refuse, int error) {
  launches = 0;
  to_refuse = launches_to_refuse;
  refusal = cudaError_t(error);
}
// From now on launches are kept (on: and not run), instead of those that were.
EXPORTED void anl_host_record(int on) {
  is_recording = on != 0;
  recorded.clear();
}
// How many launches were kept; the last one's grid, block, cluster, dynamic shared memory and kernel (where that is in the
// module), and its parameters.
EXPORTED unsigned anl_host_recorded(uint64_t sizes[5], const char** bytes, uint64_t* count) {
  if (recorded.empty()) return 0;
  const Recorded& last = recorded.back();
  sizes[0] = last.grid, sizes[1] = last.block, sizes[2] = last.cluster, sizes[3] = last.shared;
  sizes[4] = last.kernel;
  *bytes = last.parameters.data();
  *count = last.parameters.size();
  return unsigned(recorded.size());
}
// From here on launches are kept, instead of those that were; or no longer.
EXPORTED void anl_host_capture(int on) {
  is_capturing = on != 0;
  if (on) captured.clear();
}
EXPORTED int anl_host_replay() {
  for (Captured& one : captured) {
    one.config.attrs = one.attributes.data();
    const auto run = [](void* body) { (*static_cast<std::function<void()>*>(body))(); };
    if (const cudaError_t error = launch(one.config, one.kernel, run, &one.body)) return error;
  }
  return cudaSuccess;
}
// ---- the runtime -----------------------------------------------------------------------------------------------------------

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!exists(device)) return answer(cudaErrorInvalidDevice);
  const Device& d = device_of(device);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = d.threads; break;
    case cudaDevAttrMultiProcessorCount: *value = d.gpcs.processors(); break;
    case cudaDevAttrL2CacheSize: *value = d.l2; break;
    case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = d.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = std::min(d.shared, SHARED_WITHOUT_ASKING); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_sm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = RESERVED_SHARED; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.threads_per_sm; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = d.registers; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = d.registers_per_sm; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = d.ctas_per_sm; break;
    case cudaDevAttrClusterLaunch: *value = d.max_cluster > 0; break;
    default: return answer(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!exists(device)) return answer(cudaErrorInvalidDevice);
  const Device& d = device_of(device);
  *properties = {};
  snprintf(properties->name, sizeof(properties->name), "%s", d.name);
  properties->major = d.major;
  properties->minor = d.minor;
  properties->multiProcessorCount = d.gpcs.processors();
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  if (const cudaError_t error = enter_context()) return answer(error);
  memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (const cudaError_t error = enter_context()) return answer(error);
  const Kernel kernel(function);
  *attributes = {};
  attributes->sharedSizeBytes = kernel.static_shared();
  attributes->maxThreadsPerBlock = kernel.max_threads();
  attributes->numRegs = kernel.state.registers;
  attributes->ptxVersion = kernel.device.ptx;
  attributes->binaryVersion = kernel.device.binary;
  attributes->maxDynamicSharedSizeBytes = kernel.max_dynamic();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t error = enter_context()) return answer(error);
  const Kernel kernel(function);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || kernel.static_shared() + size_t(value) > size_t(kernel.device.shared)) return answer(cudaErrorInvalidValue);
    kernel.told.dynamic = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    kernel.told.wide_clusters = value != 0;
  } else {
    return answer(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function, const cudaLaunchConfig_t* config) {
  if (const cudaError_t error = enter_context()) return answer(error);
  const Kernel kernel(function);
  Cluster1d cluster;
  if (const Refusal no = read_attributes(*config, cluster); no.error) return answer(no.error);
  if (!cluster.given) return answer(cudaErrorInvalidClusterSize);  // "must be specified, else [...] an error"
  if (const Refusal no = refuse_cluster_size(kernel, cluster.size); no.error) return answer(no.error);
  *clusters = 0;
  if (refuse_block(kernel, config->blockDim, config->dynamicSmemBytes).error) return cudaSuccess;
  *clusters = active_clusters(kernel.device, kernel.footprint(product(config->blockDim), config->dynamicSmemBytes), cluster.size);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* cluster, const void* function, const cudaLaunchConfig_t* config) {
  if (const cudaError_t error = enter_context()) return answer(error);
  const Kernel kernel(function);
  if (!kernel.device.max_cluster) return answer(cudaErrorNotSupported);
  *cluster = 0;
  if (refuse_block(kernel, config->blockDim, config->dynamicSmemBytes).error) return cudaSuccess;
  const Footprint cta = kernel.footprint(product(config->blockDim), config->dynamicSmemBytes);
  int size = kernel.told.wide_clusters ? kernel.device.max_cluster : std::min(kernel.device.max_cluster, PORTABLE_CLUSTER);
  while (size > 0 && !active_clusters(kernel.device, cta, unsigned(size))) --size;
  *cluster = size;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared_bytes) {
  if (const cudaError_t error = enter_context()) return answer(error);
  if (threads <= 0) return answer(cudaErrorInvalidValue);
  const Kernel kernel(function);
  const bool fits = !refuse_block(kernel, dim3(unsigned(threads)), shared_bytes).error;
  *blocks = fits ? ctas_per_sm(kernel.device, kernel.footprint(unsigned(threads), shared_bytes)) : 0;
  return cudaSuccess;
}
