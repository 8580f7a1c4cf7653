// The host's side of csrc/cuda/primitives.cuh, name by name; included there.
#pragma once

namespace anl {
namespace gpu {

using host::Copy;
using host::self;

inline float half_to_float(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_half(float x) { return std::bit_cast<uint16_t>(_Float16(x)); }
inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t floats_to_half2(float low, float high) { return uint32_t(float_to_half(high)) << 16 | float_to_half(low); }
inline uint32_t floats_to_bfloat162(float low, float high) {
  return uint32_t(float_to_bfloat16(high)) << 16 | float_to_bfloat16(low);
}

// No better than the device's: half of the results are off by one in the last place, and nothing is below 2^-126.
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  if (y < 0x1p-126f) return 0.0f;
  if (y == 1.0f || !(y < __builtin_inff())) return y;
  const int noise = int((__float_as_uint(x) * 2654435761u) >> 30);  // 0, 1, 2, 3
  return __uint_as_float(__float_as_uint(y) + unsigned(noise - 1 - (noise > 1)));
}

template <Cache C = Cache::PLAIN>
uint4 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) host::fail("a load of 16 bytes from an address that is not aligned");
  return *static_cast<const uint4*>(p);
}
template <Cache C = Cache::PLAIN>
void store16(void* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) host::fail("a store of 16 bytes to an address that is not aligned");
  *static_cast<uint4*>(p) = v;
}

inline unsigned load_acquire(const unsigned* p) {
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(p)).load(std::memory_order_acquire);
}
inline void add_release(unsigned* p, unsigned v) { std::atomic_ref<unsigned>(*p).fetch_add(v, std::memory_order_release); }
inline unsigned add_acq_rel(unsigned* p, unsigned v) {
  return std::atomic_ref<unsigned>(*p).fetch_add(v, std::memory_order_acq_rel);
}
inline void threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void wait_a_little() { host::yield(); }

inline void check_copy(const void* shared, const void* global, unsigned bytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (bits % 16) host::fail("an asynchronous copy whose addresses or size are no multiples of 16");
}

inline void copy_async16(void* shared, const void* global) {
  check_copy(shared, global, 16);
  self().copies.open.push_back({shared, global, 16});
}
inline void copy_async_commit() { self().copies.commit(); }
template <int N>
void copy_async_wait() {
  self().copies.wait(N);
}

// Copies are made by whoever next looks whether the phase is complete.
struct Barrier {
  unsigned arrivals, arrived, phase;
  uint64_t expected;
  std::vector<Copy>* copies;
};

inline void barrier_init(Barrier* barrier, unsigned arrivals) { *barrier = {arrivals, 0, 0, 0, nullptr}; }
inline void barrier_turn(Barrier* barrier) {
  uint64_t bytes = 0;
  if (barrier->copies)
    for (const Copy& copy : *barrier->copies) bytes += copy.bytes;
  if (barrier->arrived < barrier->arrivals || bytes < barrier->expected) return;
  if (bytes > barrier->expected) host::fail("a barrier was told to expect fewer bytes than were copied");
  if (barrier->copies)
    for (const Copy& copy : *barrier->copies) copy.run();
  delete barrier->copies;
  *barrier = {barrier->arrivals, 0, barrier->phase + 1, 0, nullptr};
}
inline void barrier_expect(Barrier* barrier, unsigned bytes) {
  const std::lock_guard lock(self().cta->mutex);
  barrier->expected += bytes;
  if (++barrier->arrived > barrier->arrivals) host::fail("more arrivals at a barrier than it was made for");
  if (!barrier->expected) barrier_turn(barrier);
}
inline void bulk_copy(void* shared, const void* global, unsigned bytes, Barrier* barrier) {
  check_copy(shared, global, bytes);
  const std::lock_guard lock(self().cta->mutex);
  if (!barrier->copies) barrier->copies = new std::vector<Copy>;
  barrier->copies->push_back({shared, global, bytes});
}
inline bool barrier_passed(Barrier* barrier, unsigned parity) {
  const std::lock_guard lock(self().cta->mutex);
  if ((barrier->phase & 1) == parity) barrier_turn(barrier);
  return (barrier->phase & 1) != parity;
}
inline void barrier_wait(Barrier* barrier, unsigned parity) {
  while (!barrier_passed(barrier, parity)) host::yield();
}
inline void bulk_store_fence() {}
inline void bulk_store(void* global, const void* shared, unsigned bytes) {
  check_copy(shared, global, bytes);
  self().stores.open.push_back({global, shared, bytes});
}
inline void bulk_store_commit() { self().stores.commit(); }
template <int N>
void bulk_store_wait() {
  self().stores.wait(N);
}

inline unsigned cluster_rank() { return self().cta->rank; }
inline unsigned cluster_size() { return self().cta->launch->cluster; }
inline void cluster_arrive() { host::cluster_arrive(); }
inline void cluster_wait() { host::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <class T>
T* cluster_map(T* shared, unsigned rank) {
  const host::Cta& own = *self().cta;
  if (rank >= own.launch->cluster) host::fail("cluster_map of a rank that is not in the cluster");
  return static_cast<T*>(own.cluster->ctas[rank]->same_place(own, shared));
}

#define ANL_SHARED(type, name) type* const name = reinterpret_cast<type*>(::anl::host::self().cta->shared.data)
#define ANL_STATIC_SHARED(type, name)                                                                         \
  using name##_shared_type = type;                                                                            \
  static const char name##_site = 0;                                                                          \
  name##_shared_type& name = *static_cast<name##_shared_type*>(                                              \
      ::anl::host::static_shared(&name##_site, sizeof(name##_shared_type), alignof(name##_shared_type)))

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, cudaStream_t,
                   const A&... arguments) {
  const auto body = [&] { kernel(arguments...); };
  using Body = decltype(body);
  const host::Launch launch = {grid,
                               block,
                               cluster,
                               shared_bytes,
                               [](void* context) { (*static_cast<Body*>(context))(); },
                               const_cast<void*>(static_cast<const void*>(&body))};
  return host::launch(launch);
}
#define ANL_MAX_CLUSTERS(kernel, threads, cluster, shared_bytes) \
  ::anl::host::max_clusters(threads, cluster, shared_bytes)
#define ANL_LAUNCH(kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::anl::gpu::launch(kernel, grid, block, cluster, shared_bytes, stream, __VA_ARGS__)

}  // namespace gpu
}  // namespace anl
