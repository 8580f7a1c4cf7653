// anl_kernels._cuda: pybind11 over raw pointers, a device and a stream. Knows nothing of PyTorch, never waits for a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "kernels.h"

namespace py = pybind11;

namespace anl {
namespace gpu {
namespace {

// ---- devices -------------------------------------------------------------------------------------------------------

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and by nobody else
  throw std::runtime_error(std::string("anl_kernels: ") + what + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// The device a call runs on is the current one while it is launched. -1: whichever is.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "finding the current device");
    device_ = device < 0 ? before_ : device;
    if (device_ != before_) check(cudaSetDevice(device_), "choosing the logits' device");
  }
  ~OnDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  int index() const { return device_; }

 private:
  int before_ = 0, device_ = 0;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "reading a device's attributes");
  return value;
}

Limits read_limits(int device) {
  Limits limits = {};
  limits.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.num_sms = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.max_threads = attribute(cudaDevAttrMaxThreadsPerBlock, device);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.registers = attribute(cudaDevAttrMaxRegistersPerBlock, device);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  // Sixteen CTAs on the data centre's chips, eight on others.
  const bool wide = limits.arch / 10 == 9 || limits.arch / 10 == 10;
  limits.max_cluster = !attribute(cudaDevAttrClusterLaunch, device) ? 1 : wide ? 16 : 8;
  return limits;
}

const Limits& limits_of(int device) {
  constexpr int MAX_DEVICES = 64;
  static Limits known[MAX_DEVICES];
  static std::once_flag once[MAX_DEVICES];
  if (device >= MAX_DEVICES) throw std::runtime_error("anl_kernels: more than 64 CUDA devices");
  std::call_once(once[device], [&] { known[device] = read_limits(device); });
  return known[device];
}

// ---- launches ------------------------------------------------------------------------------------------------------

using Entry = cudaError_t (*)(const Params&, cudaStream_t);

struct Family {
  const char* name;
  Entry entry;
};

Family family_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::SMALL: return {"the kernel rows_small", launch_small};
    case Kernel::BLOCK: return {"the kernel rows_block", launch_block};
    case Kernel::CLUSTER: return {"the kernel rows_cluster", launch_cluster};
    case Kernel::SPLIT: return {"the kernel rows_split", launch_split};
    case Kernel::GRADIENT: return {"the kernel rows_gradient", launch_gradient};
    case Kernel::SPATIAL: return {"the kernel spatial", launch_spatial};
    default: return {"the kernel columns", launch_columns};
  }
}

struct Where {
  int device;
  cudaStream_t stream;
  py::object empty;  // bytes -> the address of so much uninitialised memory, which lives until the call returns
};

Where make_where(int device, Address stream, py::object empty) {
  return {device, reinterpret_cast<cudaStream_t>(stream), std::move(empty)};
}

// The parts of one allocation.
class Memory {
 public:
  template <class X>
  void reserve(X*& part, int64_t n) {
    if (n <= 0) return;
    parts_.push_back({reinterpret_cast<void**>(&part), bytes_});
    bytes_ += (n * int64_t(sizeof(X)) + 255) / 256 * 256;
  }
  void allocate(const py::object& empty) {
    if (!bytes_) return;
    char* base = reinterpret_cast<char*>(empty(bytes_).cast<Address>());
    for (const auto& [part, offset] : parts_) *part = base + offset;
  }

 private:
  std::vector<std::pair<void**, int64_t>> parts_;
  int64_t bytes_ = 0;
};

void run(const Call& call, Reduction reduction, Address loss, const Where& where) {
  Params p = {};
  p.call = call;
  fold_rows(p.call);
  p.num_rows = p.call.outer * p.call.inner;
  if (p.num_rows == 0) return;
  const OnDevice on(where.device);
  p.plan = select(p.call, limits_of(on.index()));
  p.reduction = reduction;
  if (reduction != NONE) p.loss = reinterpret_cast<void*>(loss);
  if (call.op == Op::STATS) ignored_statistics(double(call.num_classes), call.program, p.ignored);
  if (!p.loss && p.plan.num_tickets == 1) p.plan.num_tickets = 0;  // it is finish_loss's
  Memory memory;
  if (p.loss && p.plan.loss_parts > 1) memory.reserve(p.loss_parts, p.plan.loss_parts);
  if (reduction == MEAN && p.plan.blocks > 1) memory.reserve(p.weight_parts, WEIGHT_PARTS);
  memory.reserve(p.tickets, p.plan.num_tickets);
  memory.reserve(p.scratch, p.plan.scratch_bytes);
  memory.allocate(where.empty);
  if (p.weight_parts || p.plan.num_tickets) check(launch_prepare(p, where.stream), "the kernel prepare");
  const Family family = family_of(p.plan.kernel);
  check(family.entry(p, where.stream), family.name);
}

// ---- what Python calls ---------------------------------------------------------------------------------------------

void row_loss(const Program& program, int dtype, const Triple& shape, Address logits, const Triple& logits_strides,
              Address grad, const Triple& grad_strides, Address target, int target_type, int64_t ignore_index,
              Address weight, int reduction, Address loss, Address coefs, const Where& where) {
  Call call = make_call(Op::LOSS, dtype, shape, logits, logits_strides);
  set_grad(call, grad, grad_strides);
  set_target(call, target, target_type, ignore_index);
  call.program = program;
  call.weight = reinterpret_cast<const void*>(weight);
  call.coefs = reinterpret_cast<void*>(coefs);
  if (reduction == NONE) call.row_loss = reinterpret_cast<void*>(loss);
  run(call, Reduction(reduction), loss, where);
}

void row_stats(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address target,
               int target_type, int64_t ignore_index, double min_prob, double gamma, unsigned needs, Address stats,
               const Where& where) {
  Call call = make_call(Op::STATS, dtype, shape, logits, logits_strides);
  set_target(call, target, target_type, ignore_index);
  call.program = make_program(min_prob, gamma, needs);
  call.stats = reinterpret_cast<double*>(stats);
  run(call, NONE, 0, where);
}

void row_grad(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address grad,
              const Triple& grad_strides, Address target, int target_type, double min_prob, double gamma,
              unsigned needs, Address coefs, Address grad_output, int64_t grad_output_stride, Address log_q,
              Address entropy_scale, const Where& where) {
  Call call = make_grad_call(dtype, shape, logits, logits_strides, grad, grad_strides, target, target_type, min_prob,
                             gamma, needs, coefs, grad_output, grad_output_stride, log_q, entropy_scale);
  run(call, NONE, 0, where);
}

void column_sums(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address coefs,
                 Address sums, const Where& where) {
  Call call = make_call(Op::COLUMN_SUMS, dtype, shape, logits, logits_strides);
  call.coefs = reinterpret_cast<void*>(coefs);
  call.sums = reinterpret_cast<double*>(sums);
  run(call, NONE, 0, where);
}

void scale(int dtype, const Triple& shape, Address grad, const Triple& strides, Address factor, const Where& where) {
  Scaling s = {reinterpret_cast<void*>(grad), DType(dtype), {}, {}, reinterpret_cast<const void*>(factor)};
  for (int i = 0; i < 3; ++i) {
    s.size[i] = shape[i];
    s.strides[i] = strides[i];
  }
  if (shape[0] * shape[1] * shape[2] == 0) return;
  const OnDevice on(where.device);
  check(launch_scale(s, limits_of(on.index()), where.stream), "the kernel scale");
}

// ---- what runs here ------------------------------------------------------------------------------------------------

#if !defined(ANL_CUDA_ARCHS)
#define ANL_CUDA_ARCHS ""
#endif

// "80", "90" and, as PTX for whatever is newer, "90+PTX".
bool runs_on(const std::string& compiled, int arch) {
  const int number = std::stoi(compiled);
  if (compiled.find("PTX") != std::string::npos) return arch >= number;
  return arch / 10 == number / 10 && arch >= number;
}

// Why the kernels cannot run on that device (-1: the current one, or any at all), or "".
std::string why_not(int device) {
  int count = 0, driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "there is no NVIDIA driver here";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("there is no usable NVIDIA GPU here: ") + cudaGetErrorString(error);
  }
  if (device < 0) check(cudaGetDevice(&device), "finding the current device");
  const std::string archs = ANL_CUDA_ARCHS;
  if (archs.empty()) return "";
  const int arch = limits_of(device).arch;
  std::istringstream list(archs);
  for (std::string one; std::getline(list, one, ';');)
    if (runs_on(one, arch)) return "";
  return "the kernels were compiled for sm " + archs + ", and the GPU is sm " + std::to_string(arch) +
         ": install with ANL_KERNELS_CUDA_ARCHS=" + std::to_string(arch);
}

py::dict info() {
  py::dict d;
  d["archs"] = ANL_CUDA_ARCHS;
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  d["runtime"] = runtime;
  d["driver"] = driver;  // the newest CUDA it can run; 0: there is none
  py::list devices;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  cudaGetLastError();
  for (int i = 0; i < count; ++i) devices.append(limits_of(i).arch);
  d["devices"] = devices;
  return d;
}

// How a loss of this shape would run on a device: for tests and the table of kernels.
py::dict plan_for(int dtype, const Triple& shape, const Triple& strides, int device) {
  Call call = make_call(Op::LOSS, dtype, shape, 0, strides);
  fold_rows(call);
  const OnDevice on(device);
  const Plan plan = select(call, limits_of(on.index()));
  const std::string name = family_of(plan.kernel).name;
  py::dict d;
  d["kernel"] = name.substr(name.rfind(' ') + 1);
  d["blocks"] = plan.blocks;
  d["threads"] = plan.threads;
  d["cluster"] = plan.cluster;
  d["shared_bytes"] = plan.shared_bytes;
  return d;
}

}  // namespace
}  // namespace gpu
}  // namespace anl

PYBIND11_MODULE(_cuda, m) {
  using namespace anl;
  m.doc() = "Fused robust losses on NVIDIA GPUs, over raw pointers.";
  py::class_<Program>(m, "Program", py::module_local())
      .def(py::init([](const Terms& terms, double min_prob, double gamma) { return make_program(terms, min_prob, gamma); }))
      .def_readonly("needs", &Program::needs);
  py::class_<gpu::Where>(m, "Where", py::module_local()).def(py::init(&gpu::make_where));
  m.def("row_loss", &gpu::row_loss);
  m.def("row_stats", &gpu::row_stats);
  m.def("row_grad", &gpu::row_grad);
  m.def("column_sums", &gpu::column_sums);
  m.def("scale", &gpu::scale);
  m.def("why_not", &gpu::why_not);
  m.def("info", &gpu::info);
  m.def("plan_for", &gpu::plan_for);
}
