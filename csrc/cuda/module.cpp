// anl_kernels._cuda: pybind11 over raw pointers, a device and a stream. Knows nothing of PyTorch, never waits for a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "device.h"

namespace py = pybind11;

namespace anl {
namespace gpu {
namespace {

// ---- launches ------------------------------------------------------------------------------------------------------

// The device refused every way to run a call; nothing has run.
struct LaunchRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::SMALL: return "rows_small";
    case Kernel::BLOCK: return "rows_block";
    case Kernel::CLUSTER: return "rows_cluster";
    case Kernel::SPLIT: return "rows_split";
    case Kernel::GRADIENT: return "rows_gradient";
    case Kernel::SPATIAL: return "spatial";
    default: return "column_sums";
  }
}

cudaError_t launch_kernel(Params& p, cudaStream_t stream) {
  switch (p.plan.kernel) {
    case Kernel::SMALL: return launch_small(p, stream);
    case Kernel::BLOCK: return launch_block(p, stream);
    case Kernel::CLUSTER: return launch_cluster(p, stream);
    case Kernel::SPLIT: return launch_split(p, stream);
    case Kernel::GRADIENT: return launch_gradient(p, stream);
    case Kernel::SPATIAL: return launch_spatial(p, stream);
    default: return launch_column_sums(p, stream);
  }
}

struct Where {
  int device;
  cudaStream_t stream;
  py::object empty;    // bytes -> the address of so much uninitialised memory, which lives until the call returns
  unsigned protocols;  // bits of Protocol that the call may use
};

Where make_where(int device, Address stream, py::object empty, unsigned protocols) {
  return {device, reinterpret_cast<cudaStream_t>(stream), std::move(empty), protocols};
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

// A mark (tickets.cuh) that no other call has had. What memory holds is by chance the same once in 2^47 times: marks begin
// at random, and are odd, so that zeros are nobody's.
uint64_t new_mark() {
  static const uint64_t begin = uint64_t(std::random_device()()) << 32 | std::random_device()();
  static std::atomic<uint64_t> calls{0};
  constexpr uint64_t SCATTER = 0x9e3779b97f4a7c15;  // odd: different calls stay different
  return ((begin + calls++) * SCATTER << 1 | 1) << COUNT_BITS;
}

// Everything that a plan launches, in stream order. A launch that is refused has written nothing of the results.
cudaError_t run_plan(const Plan& plan, Params p, const Limits& limits, const Where& where) {
  p.plan = plan;
  const bool adds_up = p.loss && plan.loss_parts > 1, trusts_tickets = limits.protocols & TICKETS;
  const bool by_ticket = adds_up && trusts_tickets && plan.loss_parts <= MOST_COUNTED;
  Memory memory;
  if (adds_up) memory.reserve(p.loss_parts, plan.loss_parts);
  if (p.reduction == MEAN && plan.blocks > 1) memory.reserve(p.weight_parts, WEIGHT_PARTS);
  memory.reserve(p.loss_ticket, by_ticket);
  memory.reserve(p.claim, plan.num_tickets > 0);
  memory.reserve(p.tickets, plan.num_tickets);
  memory.reserve(p.scratch, plan.scratch_bytes);
  memory.allocate(where.empty);
  p.mark = new_mark();
  if (p.weight_parts) {
    if (const cudaError_t error = launch_prepare(p, limits, where.stream)) return error;
    p.starts_early = trusts_tickets && limits.early_starts;  // what is launched from here on
  }
  if (const cudaError_t error = launch_kernel(p, where.stream)) return error;
  p.starts_early = false;
  // The gradient may have overwritten the logits by now: there is no other plan left to fall to.
  if (adds_up && !by_ticket && p.plan.loss_parts > 1) check(launch_finish(p, where.stream), "the kernel finish");
  return cudaSuccess;
}

// "rows_cluster (invalid cluster size)". The error is reported here, and by nobody else.
std::string refusal(const std::string& name, cudaError_t error) {
  cudaGetLastError();
  return name + " (" + cudaGetErrorString(error) + ")";
}

// Runs the first of the call's plans that the device does not refuse. Returns which it refused and why, or "".
std::string run(const Call& call, Reduction reduction, Address loss, const Where& where) {
  Params p = {};
  p.call = call;
  fold_rows(p.call);
  p.num_rows = p.call.outer * p.call.inner;
  if (p.num_rows == 0) return "";
  const OnDevice on(where.device);
  Limits limits = limits_of(on.index());
  limits.protocols = where.protocols;
  p.reduction = reduction;
  if (reduction != NONE) p.loss = reinterpret_cast<void*>(loss);
  if (call.op == Op::STATS) ignored_statistics(double(call.num_classes), call.program, p.ignored);
  const Plans plans = select(p.call, limits);
  std::string refused;
  for (int i = 0; i < plans.count; ++i) {
    const std::string name = name_of(plans.plan[i].kernel);
    const cudaError_t error = run_plan(plans.plan[i], p, limits, where);
    if (error == cudaSuccess) return refused.empty() ? "" : "the device refuses to launch " + refused + ": " + name;
    if (!is_refusal(error)) check(error, ("the kernel " + name).c_str());
    refused += (refused.empty() ? "" : ", ") + refusal(name, error);
  }
  throw LaunchRefused("anl_kernels: the device refuses to launch " + refused);
}

// ---- what Python calls ---------------------------------------------------------------------------------------------

std::string row_loss(const Program& program, int dtype, const Triple& shape, Address logits, const Triple& logits_strides,
                     Address grad, const Triple& grad_strides, Address target, int target_type, int64_t ignore_index,
                     Address weight, int reduction, Address loss, Address grad_coefs, const Where& where) {
  Call call = make_call(Op::LOSS, dtype, shape, logits, logits_strides);
  set_grad(call, grad, grad_strides);
  set_target(call, target, target_type, ignore_index);
  call.program = program;
  call.weight = reinterpret_cast<const void*>(weight);
  call.grad_coefs = reinterpret_cast<void*>(grad_coefs);
  require(loss, reduction == NONE ? num_rows(call) : 1, "the loss");
  if (reduction == NONE) call.row_loss = reinterpret_cast<void*>(loss);
  return run(call, Reduction(reduction), loss, where);
}

std::string row_stats(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address target,
                      int target_type, int64_t ignore_index, double min_prob, double gamma, unsigned needs, Address stats,
                      const Where& where) {
  Call call = make_call(Op::STATS, dtype, shape, logits, logits_strides);
  set_target(call, target, target_type, ignore_index);
  call.program = make_program(min_prob, gamma, needs);
  require(stats, num_rows(call), "the statistics");
  call.stats = reinterpret_cast<double*>(stats);
  return run(call, NONE, 0, where);
}

std::string row_grad(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address grad,
                     const Triple& grad_strides, Address target, int target_type, double min_prob, double gamma,
                     unsigned needs, Address grad_coefs, Address grad_output, int64_t grad_output_stride, Address log_q,
                     Address entropy_scale, const Where& where) {
  Call call = make_grad_call(dtype, shape, logits, logits_strides, grad, grad_strides, target, target_type, min_prob,
                             gamma, needs, grad_coefs, grad_output, grad_output_stride, log_q, entropy_scale);
  return run(call, NONE, 0, where);
}

std::string column_sums(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address grad_coefs,
                        Address sums, const Where& where) {
  Call call = make_call(Op::COLUMN_SUMS, dtype, shape, logits, logits_strides);
  require(grad_coefs, num_rows(call), "the coefficients");
  require(sums, call.num_classes, "the sums");
  call.grad_coefs = reinterpret_cast<void*>(grad_coefs);
  call.sums = reinterpret_cast<double*>(sums);
  return run(call, NONE, 0, where);
}

void scale(int dtype, const Triple& shape, Address grad, const Triple& strides, Address factor, const Where& where) {
  require(grad, shape[0] * shape[1] * shape[2], "the gradient");
  require(factor, 1, "the factor");
  Scaling s = {reinterpret_cast<void*>(grad), DType(dtype), {}, {}, reinterpret_cast<const void*>(factor)};
  for (int i = 0; i < 3; ++i) {
    s.size[i] = shape[i];
    s.strides[i] = strides[i];
  }
  if (shape[0] * shape[1] * shape[2] == 0) return;
  const OnDevice on(where.device);
  const cudaError_t error = launch_scale(s, limits_of(on.index()), where.stream);
  if (is_refusal(error)) throw LaunchRefused("anl_kernels: the device refuses to launch " + refusal("scale", error));
  check(error, "the kernel scale");
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

// Why kernels compiled for `archs` cannot run on that device (-1: the current one, or any at all), or "".
std::string why_not(int device, const std::string& archs) {
  int count = 0, driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "there is no NVIDIA driver here";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("there is no usable NVIDIA GPU here: ") + cudaGetErrorString(error);
  }
  if (device < 0) check(cudaGetDevice(&device), "finding the current device");
  if (archs.empty()) return "";
  const int arch = arch_of(device);
  std::istringstream list(archs);
  for (std::string one; std::getline(list, one, ';');)
    if (runs_on(one, arch)) return "";
  return "the kernels were compiled for sm " + archs + ", and the GPU is sm " + std::to_string(arch) +
         ": install with ANL_KERNELS_CUDA_ARCHS=" + std::to_string(arch);
}

py::dict info() {
  py::dict d;
  d["archs"] = ANL_CUDA_ARCHS;
  d["lean_kernels"] = HAS_LEAN_KERNELS;
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  d["runtime"] = runtime;
  d["driver"] = driver;  // the newest CUDA it can run; 0: there is none
  py::list devices;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  cudaGetLastError();
  for (int i = 0; i < count; ++i) devices.append(arch_of(i));
  d["devices"] = devices;
  return d;
}

// How a loss of this shape would run on a device: for tests and the table of kernels.
py::dict plan_for(int dtype, const Triple& shape, const Triple& strides, int device, unsigned protocols) {
  Call call = call_of_shape(Op::LOSS, dtype, shape, strides);
  fold_rows(call);
  const OnDevice on(device);
  Limits limits = limits_of(on.index());
  limits.protocols = protocols;
  const Plans plans = select(call, limits);
  const Plan& plan = plans.plan[0];
  py::list next;
  for (int i = 1; i < plans.count; ++i) next.append(name_of(plans.plan[i].kernel));
  py::dict d;
  d["kernel"] = name_of(plan.kernel);
  d["next"] = next;  // where the device refuses it
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
      .def(py::init([](const Terms& terms, double min_prob, double gamma, unsigned needs) {
        return make_program(terms, min_prob, gamma, needs);
      }))
      .def_readonly("needs", &Program::needs);
  py::class_<gpu::Where>(m, "Where", py::module_local())
      .def(py::init(&gpu::make_where), py::arg("device"), py::arg("stream"), py::arg("empty"),
           py::arg("protocols") = unsigned(gpu::ALL_PROTOCOLS));
  py::register_exception<gpu::LaunchRefused>(m, "LaunchRefused", PyExc_RuntimeError);
  m.attr("PROTOCOLS") = py::dict(py::arg("tickets") = unsigned(gpu::TICKETS), py::arg("split") = unsigned(gpu::SPLIT_ROWS),
                                 py::arg("cluster") = unsigned(gpu::CLUSTERS));
  m.def("row_loss", &gpu::row_loss);
  m.def("row_stats", &gpu::row_stats);
  m.def("row_grad", &gpu::row_grad);
  m.def("column_sums", &gpu::column_sums);
  m.def("scale", &gpu::scale);
  m.def("why_not", &gpu::why_not, py::arg("device"), py::arg("archs") = ANL_CUDA_ARCHS);
  m.def("info", &gpu::info);
  m.def("plan_for", &gpu::plan_for, py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("device"),
        py::arg("protocols") = unsigned(gpu::ALL_PROTOCOLS));
}
