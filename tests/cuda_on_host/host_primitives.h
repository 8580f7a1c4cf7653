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
template <class X>
X kept(X x) {
  return x;
}
inline float one_if_above(float x, float bound) { return x > bound ? 1.0f : 0.0f; }
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

// Likewise.
inline float rsqrt_approx(float x) {
  const float y = 1.0f / sqrtf(x);
  if (x < 0x1p-126f) return __builtin_inff();
  if (x == 1.0f || !(y > 0.0f)) return y;
  const int noise = int((__float_as_uint(x) * 2654435761u) >> 30);  // 0, 1, 2, 3
  return __uint_as_float(__float_as_uint(y) + unsigned(noise - 1 - (noise > 1)));
}

// Likewise; one in two results is off by one in the last place.
inline float reciprocal_approx(float x) {
  const float y = 1.0f / x;
  if (fabsf(x) < 0x1p-126f) return copysignf(__builtin_inff(), x);
  if (fabsf(y) < 0x1p-126f) return copysignf(0.0f, x);
  if (x == 1.0f || !(fabsf(y) < __builtin_inff())) return y;
  const int noise = int((__float_as_uint(x) * 2654435761u) >> 30);  // 0, 1, 2, 3
  return __uint_as_float(__float_as_uint(y) + unsigned(noise - 1 - (noise > 1)));
}

// Likewise, to 20 bits.
inline double reciprocal_approx(double x) {
  const double y = 1.0 / x;
  uint64_t bits;
  memcpy(&bits, &y, sizeof(y));
  bits &= ~uint64_t(0) << 32;
  double rounded;
  memcpy(&rounded, &bits, sizeof(rounded));
  return rounded;
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
  host::note_protocol();
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(p)).load(std::memory_order_acquire);
}
inline void add_release(unsigned* p, unsigned v) {
  host::note_protocol();
  std::atomic_ref<unsigned>(*p).fetch_add(v, std::memory_order_release);
}
inline unsigned add_acq_rel(unsigned* p, unsigned v) {
  host::note_protocol();
  return std::atomic_ref<unsigned>(*p).fetch_add(v, std::memory_order_acq_rel);
}
inline uint64_t load_acquire(const uint64_t* p) {
  host::note_protocol();
  return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(p)).load(std::memory_order_acquire);
}
inline void store_release(uint64_t* p, uint64_t v) {
  host::note_protocol();
  std::atomic_ref<uint64_t>(*p).store(v, std::memory_order_release);
}
inline uint64_t add_acq_rel(uint64_t* p, uint64_t v) {
  host::note_protocol();
  return std::atomic_ref<uint64_t>(*p).fetch_add(v, std::memory_order_acq_rel);
}
inline uint64_t load_alone(const uint64_t* p) {
  host::note_protocol();
  return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(p)).load(std::memory_order_relaxed);
}
inline uint64_t exchange_alone(uint64_t* p, uint64_t expected, uint64_t v) {
  host::note_protocol();
  std::atomic_ref<uint64_t>(*p).compare_exchange_strong(expected, v, std::memory_order_relaxed);
  return expected;
}
inline void wait_a_little() { host::yield(); }

inline void check_copy(const void* shared, const void* global, unsigned bytes, unsigned unit = 16) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (bits % unit) host::fail("an asynchronous copy whose addresses or size are no multiples of its unit");
}

template <int BYTES>
void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8);
  check_copy(shared, global, BYTES, BYTES);
  self().copies.open.push_back({shared, global, BYTES});
}

struct SharedPlace {
  const uint4* place;
  explicit SharedPlace(const void* p) : place(static_cast<const uint4*>(p)) {}
  SharedPlace operator+(int packs) const { return SharedPlace(place + packs); }
  uint4 load(int i) const { return place[i]; }
  const void* pointer() const { return place; }
  void* writable() const { return const_cast<uint4*>(place); }
};
template <Cache C = Cache::PLAIN>
void copy_async16(void* shared, const void* global) {
  check_copy(shared, global, 16);
  self().copies.open.push_back({shared, global, 16});
}
inline void copy_async_commit() { self().copies.commit(); }
template <int N>
void copy_async_wait() {
  self().copies.wait(N);
}

// Whatever has no machine code below sm_90: csrc/cuda/primitives.cuh traps there.
inline void needs_sm90() {
  host::note_protocol();
  if (self().cta->launch->code < 90) host::fail("an instruction of sm_90 in code that was compiled for less: it traps");
}

inline void let_next_launch_start() {}
inline void wait_for_previous_launch() {
  const host::Launch& launch = *self().cta->launch;
  if (launch.starts_early && launch.code < 90) host::fail("a launch starts early in code without waits");
  self().has_waited = true;
}

// ---- mbarriers: one word, as on a device, and no lock: they order what a device's order and no more ---------------------

struct Barrier {
  uint64_t word;
};

struct Phase {
  int64_t bytes;      // of bulk copies, still to come; below 0: they came before they were expected
  unsigned pending;   // arrivals, still to come
  unsigned arrivals;  // of every phase
  unsigned number;    // of phases before this one
};
constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // that a barrier counts
constexpr unsigned MOST_ARRIVALS = (1 << 11) - 1;
constexpr uint64_t MADE = 1;  // in the upper two bits; fresh shared memory is full of ones

inline uint64_t pack(const Phase& x) {
  return MADE << 62 | uint64_t(x.number & 0xffff) << 46 | uint64_t(x.arrivals) << 34 | uint64_t(x.pending) << 22 |
         uint64_t(x.bytes + MOST_BYTES);
}
inline Phase unpack(uint64_t word) {
  if (word >> 62 != MADE) host::fail("a barrier that was not initialised");
  return {int64_t(word & 0x3fffff) - MOST_BYTES, unsigned(word >> 22) & 0xfff, unsigned(word >> 34) & 0xfff,
          unsigned(word >> 46) & 0xffff};
}

// f(phase), and the next phase if that is complete. What the thread has done before is seen by whoever waits.
template <class F>
void change(Barrier* barrier, const F& f, std::memory_order order = std::memory_order_release) {
  std::atomic_ref<uint64_t> word(barrier->word);
  uint64_t before = word.load(std::memory_order_relaxed);
  Phase x;
  do {
    x = unpack(before);
    f(x);
    if (x.bytes > MOST_BYTES || x.bytes < -MOST_BYTES) host::fail("more bytes than a barrier counts");
    if (!x.pending && x.bytes < 0) host::fail("a barrier was told to expect fewer bytes than were copied");
    if (!x.pending && !x.bytes) x = {0, x.arrivals, x.arrivals, x.number + 1};
  } while (!word.compare_exchange_weak(before, pack(x), order, std::memory_order_relaxed));
}

inline void barrier_init(Barrier* barrier, unsigned arrivals) {
  needs_sm90();
  if (!arrivals || arrivals > MOST_ARRIVALS) host::fail("a barrier for no such number of arrivals");
  barrier->word = pack({0, arrivals, arrivals, 0});
}
inline void arrive(Barrier* barrier, unsigned bytes, std::memory_order order) {
  needs_sm90();
  const auto expect = [bytes](Phase& x) {
    if (!x.pending--) host::fail("more arrivals at a barrier than it was made for");
    x.bytes += bytes;
  };
  change(barrier, expect, order);
}
inline void barrier_expect(Barrier* barrier, unsigned bytes) { arrive(barrier, bytes, std::memory_order_release); }

// Late copies are made by whoever next looks whether the phase is complete, when nothing else is missing.
inline void make_late_copies(Barrier* barrier, const Phase& phase) {
  const auto found = self().cta->late_copies.find(barrier);
  if (found == self().cta->late_copies.end() || phase.pending) return;
  int64_t bytes = 0;
  for (const Copy& copy : found->second) bytes += copy.bytes;
  if (bytes < phase.bytes) return;
  for (const Copy& copy : found->second) copy.run();
  self().cta->late_copies.erase(found);
  change(barrier, [bytes](Phase& x) { x.bytes -= bytes; });
}
inline void bulk_copy(SharedPlace place, const void* global, unsigned bytes, Barrier* barrier) {
  needs_sm90();
  void* const shared = place.writable();
  check_copy(shared, global, bytes);
  if (bytes > MOST_BYTES) host::fail("a bulk copy of more bytes than a barrier counts");
  const Copy copy = {shared, global, bytes};
  if (host::COPIES_ARE_LATE) {
    self().cta->late_copies[barrier].push_back(copy);
    return;
  }
  copy.run();
  change(barrier, [bytes](Phase& x) { x.bytes -= bytes; });
}
inline Phase phase_of(Barrier* barrier, std::memory_order order) {
  return unpack(std::atomic_ref<uint64_t>(barrier->word).load(order));
}
inline bool passed(Barrier* barrier, unsigned parity, std::memory_order order) {
  const Phase phase = phase_of(barrier, order);
  if (!host::COPIES_ARE_LATE || (phase.number & 1) != parity) return (phase.number & 1) != parity;
  make_late_copies(barrier, phase);
  return (phase_of(barrier, order).number & 1) != parity;
}
inline void wait(Barrier* barrier, unsigned parity, std::memory_order order) {
  needs_sm90();
  while (!passed(barrier, parity, order)) host::yield();
  self().fruitless = 0;
}
inline void barrier_wait(Barrier* barrier, unsigned parity) { wait(barrier, parity, std::memory_order_acquire); }

// What mutate_barriers.py puts in place of a stronger one.
inline void barrier_wait_relaxed(Barrier* barrier, unsigned parity) { wait(barrier, parity, std::memory_order_relaxed); }
inline void barrier_expect_relaxed(Barrier* barrier, unsigned bytes) { arrive(barrier, bytes, std::memory_order_relaxed); }
template <class X>
X load_relaxed(const X* p) {
  return std::atomic_ref<X>(*const_cast<X*>(p)).load(std::memory_order_relaxed);
}
inline void store_relaxed(uint64_t* p, uint64_t v) {
  std::atomic_ref<uint64_t>(*p).store(v, std::memory_order_relaxed);
}
template <class X>
X add_relaxed(X* p, std::type_identity_t<X> v) {
  return std::atomic_ref<X>(*p).fetch_add(v, std::memory_order_relaxed);
}
template <class X>
X add_release_alone(X* p, std::type_identity_t<X> v) {
  return std::atomic_ref<X>(*p).fetch_add(v, std::memory_order_release);
}
template <class X>
X add_acquire_alone(X* p, std::type_identity_t<X> v) {
  return std::atomic_ref<X>(*p).fetch_add(v, std::memory_order_acquire);
}

inline unsigned cluster_rank() {
  needs_sm90();
  return self().cta->rank;
}
inline void cluster_arrive() {
  needs_sm90();
  host::cluster_arrive();
}
inline void cluster_wait() {
  needs_sm90();
  host::cluster_wait();
}
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <class T>
T* cluster_map(T* shared, unsigned rank) {
  const host::Cta& own = *self().cta;
  if (rank >= own.launch->cluster) host::fail("a rank that is not in the cluster");
  return static_cast<T*>(own.cluster->ctas[rank]->same_place(own, shared));
}
inline void cluster_send16(void* place, uint4 v, Barrier* barrier, unsigned rank) {
  needs_sm90();
  if (reinterpret_cast<uintptr_t>(place) % 16) host::fail("16 bytes to an address that is not aligned");
  *cluster_map(static_cast<uint4*>(place), rank) = v;
  change(cluster_map(barrier, rank), [](Phase& x) { x.bytes -= 16; });
}

#define ANL_SHARED(type, name) type* const name = reinterpret_cast<type*>(::anl::host::self().cta->shared.data)
#define ANL_STATIC_SHARED(type, name)                                                                         \
  using name##_shared_type = type;                                                                            \
  static const char name##_site = 0;                                                                          \
  name##_shared_type& name = *static_cast<name##_shared_type*>(                                              \
      ::anl::host::static_shared(&name##_site, sizeof(name##_shared_type), alignof(name##_shared_type)))

}  // namespace gpu
}  // namespace anl
