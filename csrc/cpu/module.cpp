// anl_kernels._cpu: pybind11 over raw pointers. Knows nothing of PyTorch but, at run time, its thread pool.
#include <dlfcn.h>
#include <math.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "kernels.h"

namespace py = pybind11;

namespace anl {

#define ANL_DECLARE(isa)                \
  namespace isa {                       \
  double rows_entry(const Call& call);  \
  double spatial_entry(const Call& call); \
  }                                     \
  static const KernelTable table_##isa = {#isa, isa::rows_entry, isa::spatial_entry};

ANL_DECLARE(baseline)
#if defined(ANL_HAVE_AVX2)
ANL_DECLARE(avx2)
#endif
#if defined(ANL_HAVE_AVX512)
ANL_DECLARE(avx512)
#endif

namespace {

// ---- instruction sets ----------------------------------------------------------------------------------------------

// Those compiled in that this processor can run, best first.
std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(ANL_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    tables.push_back(&table_avx512);
#endif
#if defined(ANL_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    tables.push_back(&table_avx2);
#endif
  tables.push_back(&table_baseline);
  return tables;
}

std::atomic<const KernelTable*> active_table{&table_baseline};

void set_isa(const std::string& name) {
  std::string known;
  for (const KernelTable* table : runnable_tables()) {
    if (name == table->name) {
      active_table = table;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + table->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here; choose one of: " + known);
}

// ---- PyTorch's thread pool -----------------------------------------------------------------------------------------

using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, RangeFunction, void*);
using TorchGetNumThreads = int32_t (*)(uint32_t*);

struct TorchThreads {
  TorchParallelFor parallel_for;
  TorchGetNumThreads get_num_threads;
};

// Found in the libtorch_cpu that this process has loaded, if it has; looked for again until it has.
const TorchThreads* torch_threads() {
  static TorchThreads threads;
  static std::atomic<bool> found{false};
  if (found.load(std::memory_order_acquire)) return &threads;
#if defined(__APPLE__)
  void* library = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
#else
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
#endif
  if (!library) return nullptr;
  auto parallel = reinterpret_cast<TorchParallelFor>(dlsym(library, "torch_parallel_for"));
  auto count = reinterpret_cast<TorchGetNumThreads>(dlsym(library, "torch_get_num_threads"));
  if (!parallel || !count) return nullptr;
  threads = {parallel, count};
  found.store(true, std::memory_order_release);
  return &threads;
}

// A loop over PyTorch's threads. Its C function takes no exceptions: they wait here until all threads are through.
struct Region {
  RangeFunction f;
  void* context;
  std::atomic<bool> begun{false}, failed{false};
  std::exception_ptr failure;  // the first
};

void run_range(int64_t begin, int64_t end, void* pointer) {
  Region& region = *static_cast<Region*>(pointer);
  region.begun.store(true, std::memory_order_relaxed);
  if (region.failed.load(std::memory_order_relaxed)) return;
  try {
    region.f(begin, end, region.context);
  } catch (...) {
    if (!region.failed.exchange(true)) region.failure = std::current_exception();
  }
}

// pybind11 makes MemoryError of it.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(int64_t bytes) {
    snprintf(message_, sizeof(message_),
             "anl_kernels: no memory for %lld bytes of working space: free some memory, pass fewer rows at a time, or set "
             "fewer threads (torch.set_num_threads), each of which has its own",
             static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return message_; }

 private:
  char message_[256];
};

}  // namespace

void throw_no_memory(int64_t bytes) { throw NoMemory(bytes); }

int num_threads() {
  const TorchThreads* torch = torch_threads();
  uint32_t n = 1;
  return torch && torch->get_num_threads(&n) == 0 ? int(n) : 1;
}

void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context) {
  if (n <= 0) return;
  const TorchThreads* torch = n > grain ? torch_threads() : nullptr;
  if (!torch) return f(0, n, context);
  Region region{f, context};
  const bool refused = torch->parallel_for(0, n, grain, run_range, &region) != 0;
  if (region.failure) std::rethrow_exception(region.failure);
  if (!refused) return;
  // Rows that are done cannot be done again: the gradient may lie where their logits were.
  if (region.begun) throw std::runtime_error("anl_kernels: PyTorch's threads failed in the middle of a call");
  f(0, n, context);
}

namespace {

// ---- launch --------------------------------------------------------------------------------------------------------

// Rows whose classes lie side by side go to the rows traversal, unless they are so short that a vector holds more rows
// than classes to good purpose.
constexpr int64_t FEW_CLASSES = 32;

double launch(Call& call) {
  fold_rows(call);
  if (call.outer * call.inner == 0) return 0.0;
  const KernelTable* table = active_table;
  return (classes_are_adjacent(call) && call.num_classes > FEW_CLASSES ? table->rows : table->spatial)(call);
}

// A fresh large allocation costs more in page faults than the kernel in arithmetic; huge pages take most of them away.
void ask_for_huge_pages(const Call& call, bool fresh) {
#if defined(__linux__)
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  if (!fresh || !call.grad) return;
  const int64_t size = logit_bytes(call);
  const Strides& s = call.grad_strides;
  const int64_t last = (call.outer - 1) * s.so + (call.num_classes - 1) * s.sk + (call.inner - 1) * s.si;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(call.grad) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(call.grad) + (last + 1) * size) / HUGE_PAGE * HUGE_PAGE;
  if (end > begin + HUGE_PAGE) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// ---- labels --------------------------------------------------------------------------------------------------------

struct LabelCheck {
  int64_t first_bad = -1;
  double weight = 0.0;  // of the rows that count
};

template <class Label>
LabelCheck check_labels_of(const Call& call) {
  const Label* labels = static_cast<const Label*>(call.target);
  const int64_t n = call.outer * call.inner, K = call.num_classes;
  LabelCheck result;
  int64_t valid = 0, bad = 0;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t y = labels[r];
    const bool counts = y != call.ignore_index;
    valid += counts;
    bad += counts && (y < 0 || y >= K);
  }
  // Another thread may write labels meanwhile: none is found twice, or indexes anything, without being looked at again.
  for (int64_t r = 0; bad && r < n && result.first_bad < 0; ++r) {
    const int64_t y = label_at(call, r);
    if (y != call.ignore_index && !is_class(call, y)) result.first_bad = r;
  }
  if (bad || !call.weight) {
    result.weight = double(valid);
    return result;
  }
  for (int64_t r = 0; r < n && result.first_bad < 0; ++r) {
    const int64_t y = label_at(call, r);
    if (y == call.ignore_index) continue;
    if (is_class(call, y))
      result.weight += real_at(call, call.weight, y);
    else
      result.first_bad = r;
  }
  return result;
}

LabelCheck check_labels(const Call& call) {
  switch (call.target_type) {
    case INT64: return check_labels_of<int64_t>(call);
    case INT32: return check_labels_of<int32_t>(call);
    case INT16: return check_labels_of<int16_t>(call);
    default: return check_labels_of<uint8_t>(call);
  }
}

// ---- what Python calls ---------------------------------------------------------------------------------------------

int64_t row_loss(const Program& program, int dtype, const Triple& shape, Address logits, const Triple& logits_strides,
                 Address grad, const Triple& grad_strides, Address target, int target_type, int64_t ignore_index,
                 Address weight, int reduction, Address loss, Address grad_coefs, bool fresh) {
  Call call = make_call(Op::LOSS, dtype, shape, logits, logits_strides);
  set_grad(call, grad, grad_strides);
  set_target(call, target, target_type, ignore_index);
  call.program = program;
  call.weight = reinterpret_cast<const void*>(weight);
  call.grad_coefs = reinterpret_cast<void*>(grad_coefs);
  require(loss, reduction == NONE ? num_rows(call) : 1, "the loss");
  const LabelCheck labels = check_labels(call);
  if (labels.first_bad >= 0) return labels.first_bad;
  const double denominator = reduction == MEAN ? labels.weight : 1.0;
  call.loss_scale = 1.0 / denominator;
  if (reduction == NONE) call.row_loss = reinterpret_cast<void*>(loss);
  ask_for_huge_pages(call, fresh);
  const double total = launch(call);
  if (reduction != NONE) set_real(call, reinterpret_cast<void*>(loss), 0, total / denominator);
  return -1;
}

int64_t row_stats(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address target,
                  int target_type, int64_t ignore_index, double min_prob, double gamma, unsigned needs, Address stats) {
  Call call = make_call(Op::STATS, dtype, shape, logits, logits_strides);
  set_target(call, target, target_type, ignore_index);
  call.program = make_program(min_prob, gamma, needs);
  require(stats, num_rows(call), "the statistics");
  call.stats = reinterpret_cast<double*>(stats);
  const LabelCheck labels = check_labels(call);
  if (labels.first_bad >= 0) return labels.first_bad;
  launch(call);
  return -1;
}

void slice_stats(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address target,
                 int64_t ignore_index, double min_prob, double gamma, unsigned needs, Address lse, Address stats) {
  Call call = make_call(Op::SLICE_STATS, dtype, shape, logits, logits_strides);
  set_target(call, target, INT64, ignore_index);
  call.program = make_program(min_prob, gamma, needs);
  call.lse = reinterpret_cast<const double*>(lse);
  require(stats, num_rows(call), "the statistics");
  call.stats = reinterpret_cast<double*>(stats);
  launch(call);
}

void row_grad(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address grad,
              const Triple& grad_strides, Address target, int target_type, double min_prob, double gamma,
              unsigned needs, Address grad_coefs, Address grad_output, int64_t grad_output_stride, Address log_q,
              Address entropy_scale, bool fresh) {
  Call call = make_grad_call(dtype, shape, logits, logits_strides, grad, grad_strides, target, target_type, min_prob,
                             gamma, needs, grad_coefs, grad_output, grad_output_stride, log_q, entropy_scale);
  ask_for_huge_pages(call, fresh);
  launch(call);
}

void column_sums(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address grad_coefs,
                 Address sums) {
  Call call = make_call(Op::COLUMN_SUMS, dtype, shape, logits, logits_strides);
  require(grad_coefs, num_rows(call), "the coefficients");
  require(sums, call.num_classes, "the sums");
  call.grad_coefs = reinterpret_cast<void*>(grad_coefs);
  call.sums = reinterpret_cast<double*>(sums);
  for (int64_t k = 0; k < call.num_classes; ++k) call.sums[k] = 0.0;
  launch(call);
}

py::dict info() {
  py::list isas;
  for (const KernelTable* table : runnable_tables()) isas.append(table->name);
  py::dict d;
  d["isa"] = active_table.load()->name;
  d["isas"] = isas;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["threads"] = torch_threads() ? "torch_parallel_for" : "single";
  d["num_threads"] = num_threads();
  return d;
}

}  // namespace
}  // namespace anl

PYBIND11_MODULE(_cpu, m) {
  using namespace anl;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Fused robust losses on the CPU, over raw pointers.";
  py::class_<Program>(m, "Program", py::module_local())
      .def(py::init([](const Terms& terms, double min_prob, double gamma, unsigned needs) {
        return make_program(terms, min_prob, gamma, needs);
      }))
      .def_readonly("needs", &Program::needs);
  m.def("row_loss", &row_loss, Unlocked());
  m.def("row_stats", &row_stats, Unlocked());
  m.def("slice_stats", &slice_stats, Unlocked());
  m.def("row_grad", &row_grad, Unlocked());
  m.def("column_sums", &column_sums, Unlocked());
  m.def("info", &info);
  m.def("set_isa", &set_isa);
  active_table = runnable_tables().front();
  if (const char* name = getenv("ANL_KERNELS_CPU_ISA")) set_isa(name);
}
