// A device for tests, "emulated": its memory is the host's, but its tensors are not the CPU's to PyTorch, so what would
// fail on a GPU because a tensor is on the CPU fails here as well. Every operator copies to the CPU and back. Several
// devices share the memory; there is one stream, and nothing is asynchronous.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>

namespace {

using at::Tensor;

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex DEVICES = 5;  // as many as tests/cuda_on_host has models of
thread_local c10::DeviceIndex current = 0;

// ---- memory, counted as a caching allocator's would be

std::atomic<int64_t> held{0}, peak{0};

struct Block {
  void* memory;
  int64_t size;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= block->size;
  std::free(block->memory);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    c10::Device device(TYPE, current);
    if (size == 0) return {nullptr, nullptr, &release_nothing, device};
    void* memory = std::aligned_alloc(512, (size + 511) / 512 * 512);
    TORCH_CHECK(memory != nullptr, "emulated device: out of memory");
    const int64_t now = held += static_cast<int64_t>(size);
    for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {}
      return {memory, new Block{memory, static_cast<int64_t>(size)}, &release, device};
  }
  static void release_nothing(void*) {}
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

// ---- the current device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {TYPE, current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < DEVICES, "emulated device: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current : exchangeDevice(index);
  }
  c10::Device getDeviceFromPtr(void*) const override { return {TYPE, current}; }
};

const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// ---- operators

Tensor poisoned(Tensor made) {  // as the CPU's and CUDA's torch.empty do in deterministic mode
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory())
    at::native::fill_empty_deterministic_(made);
  return made;
}

c10::Device device_of(std::optional<c10::Device> device) {
  return device && device->has_index() ? *device : c10::Device(TYPE, current);
}

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<c10::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "emulated device: memory of a device cannot be pinned");
  c10::DeviceGuard guard(device_of(device));
  return poisoned(at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                            c10::dtype_or_default(dtype), format));
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_of(device));
  return poisoned(at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                                    c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype)));
}

// The same memory as a tensor of the CPU's.
Tensor on_cpu(const Tensor& x) {
  if (x.is_cpu()) return x;
  return at::from_blob(x.numel() ? x.data_ptr() : nullptr, x.sizes(), x.strides(), x.options().device(c10::kCPU));
}

// What makes the host wait for a GPU, and is an error while `anl_emulated_waiting_is_an_error`: copies from and to the
// CPU, and operators whose result's size or value the host must know. Not what an operator does by itself (depth).
std::atomic<bool> no_waiting{false};
thread_local int depth = 0;

struct Inside {
  Inside() { ++depth; }
  ~Inside() { --depth; }
};

bool waits(const std::string& name) {
  return name == "aten::_local_scalar_dense" || name == "aten::nonzero" || name == "aten::masked_select" || name == "aten::equal";
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  TORCH_CHECK(!no_waiting || depth || from.device().type() == to.device().type(),
              "emulated device: called a synchronizing operation, a copy from ", from.device(), " to ", to.device());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

Tensor& set_storage(Tensor& x, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::cpu::set_(x, storage, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_whole_storage(Tensor& x, at::Storage storage) {
  return at::cpu::set_(x, storage, 0, {static_cast<int64_t>(storage.nbytes() / x.element_size())}, {1});
}

const Tensor& resize(const Tensor& x, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor as_strided(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& x, c10::SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// ---- all others: on the CPU, if a GPU would take the same arguments

struct Arguments {
  const std::string& name;
  std::optional<c10::Device> device;
  bool has_cpu_tensor = false;

  void see(const Tensor& x) {
    if (!x.defined()) return;
    if (x.device().type() != TYPE) {
      has_cpu_tensor |= x.is_cpu() && x.dim() > 0;  // a number on the CPU is welcome everywhere
      return;
    }
    TORCH_CHECK(!device || *device == x.device(), name, ": expected all tensors to be on the same device, but found ", *device,
                " and ", x.device());
    device = x.device();
  }

  void see(const c10::IValue& value) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& x : value.toTensorVector()) see(x);
    if (value.isOptionalTensorList())
      for (const std::optional<Tensor>& x : value.toOptionalTensorVector())
        if (x) see(*x);
    if (value.isDevice() && value.toDevice().type() == TYPE && !device) device = value.toDevice();
    TORCH_CHECK(!value.isGenerator() || value.toGenerator().device().type() == TYPE, name,
                ": expected an 'emulated' device type for generator but found a 'cpu' one");
  }
};

// Operators that take indices on the CPU for a tensor elsewhere.
bool takes_cpu_tensors(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" || name == "aten::index_put";
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  Arguments arguments{name};
  for (const c10::IValue& value : torch::jit::last(stack, op.schema().arguments().size())) arguments.see(value);
  TORCH_CHECK(!(arguments.device && arguments.has_cpu_tensor) || takes_cpu_tensors(name), name,
              ": expected all tensors to be on the same device, but found at least two devices, emulated and cpu!");
  TORCH_CHECK(!no_waiting || depth || !waits(name), "emulated device: called a synchronizing operation, ", name);
  Inside inside;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
}

// ---- for device.py

extern "C" {
int anl_emulated_current() { return current; }
int anl_emulated_count() { return DEVICES; }
void anl_emulated_use(int index) { current = static_cast<c10::DeviceIndex>(index); }
int anl_emulated_waiting_is_an_error(bool error) { return no_waiting.exchange(error); }
void anl_emulated_reset_peak() { peak = held.load(); }
int64_t anl_emulated_held() { return held; }
int64_t anl_emulated_peak() { return peak; }
}
