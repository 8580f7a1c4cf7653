// What the kernels may ask of the machine: conversions, cached loads, asynchronous copies, clusters, atomics, launches.
//
// Kernels use these, CUDA's built-in indices, __syncthreads, __syncwarp, the __shfl/__ballot/__any/__all family and
// atomicAdd, and no PTX of their own. So the same sources compile for the host (-DANL_CUDA_ON_HOST), where
// tests/cuda_on_host has the other side of everything declared here.
#pragma once

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "launch.cuh"
#include "row_math.h"

#define ANL_DEVICE __device__ __forceinline__

namespace anl {
namespace gpu {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// What a cache is told of 16 bytes: nothing; that they are not needed again; that they are, soon.
enum class Cache { PLAIN, STREAM, KEEP };

#if !defined(ANL_CUDA_ON_HOST)

// ---- conversions: bits of float16 and bfloat16 ---------------------------------------------------------------------

ANL_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
ANL_DEVICE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
ANL_DEVICE uint32_t floats_to_half2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
ANL_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
ANL_DEVICE uint16_t float_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
ANL_DEVICE uint32_t floats_to_bfloat162(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
#define ANL_APPROX(name, instruction, T, r)       \
  ANL_DEVICE T name(T x) {                        \
    T y;                                          \
    asm(instruction " %0, %1;" : "=" r(y) : r(x));\
    return y;                                     \
  }
ANL_APPROX(exp2_approx, "ex2.approx.ftz.f32", float, "f")         // 2^x to 2^-22 of its value; 0 below 2^-126
ANL_APPROX(rsqrt_approx, "rsqrt.approx.ftz.f32", float, "f")      // 1 / sqrt(x) to 2^-22, of x from 2^-126 on
ANL_APPROX(reciprocal_approx, "rcp.approx.ftz.f32", float, "f")   // 1 / x to 2^-23; 0 above 2^126, infinite below 2^-126
ANL_APPROX(reciprocal_approx, "rcp.approx.ftz.f64", double, "d")  // to 2^-20; 0 is infinite
#undef ANL_APPROX
// 1 or 0.
ANL_DEVICE float one_if_above(float x, float bound) {
  float one;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(x), "f"(bound));
  return one;
}
// x, in a register of its own: not computed again wherever it is read.
template <class X>
ANL_DEVICE X kept(X x) {
  static_assert(sizeof(X) == 4, "one register");
  asm volatile("" : "+r"(x));
  return x;
}

// ---- 16 aligned bytes of global memory ------------------------------------------------------------------------------

template <Cache C>
ANL_DEVICE uint64_t l2_policy() {
  uint64_t policy;
  if constexpr (C == Cache::KEEP)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

template <Cache C = Cache::PLAIN>
ANL_DEVICE uint4 load16(const void* p) {
  const uint4* q = static_cast<const uint4*>(p);
  static_assert(C != Cache::KEEP, "copy_async16 has that");
  return C == Cache::PLAIN ? *q : __ldcs(q);
}

template <Cache C = Cache::PLAIN>
ANL_DEVICE void store16(void* p, uint4 v) {
  static_assert(C != Cache::KEEP, "what is written is not read again");
  if constexpr (C == Cache::PLAIN)
    *static_cast<uint4*>(p) = v;
  else
    __stcs(static_cast<uint4*>(p), v);
}

// ---- between CTAs of a launch: counters in global memory --------------------------------------------------------------

ANL_DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
  return v;
}
ANL_DEVICE void add_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
}
// The value before; what was written before it is seen by whoever reads the sum, and the other way round.
ANL_DEVICE unsigned add_acq_rel(unsigned* p, unsigned v) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
  return before;
}
// The same of 64 bits.
ANL_DEVICE uint64_t load_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
  return v;
}
ANL_DEVICE void store_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "l"(v) : "memory");
}
ANL_DEVICE uint64_t add_acq_rel(uint64_t* p, uint64_t v) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(p)), "l"(v)
               : "memory");
  return before;
}
// In no order with other memory.
ANL_DEVICE uint64_t load_alone(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
  return v;
}
// v in the place of `expected`, if that is there; what was there.
ANL_DEVICE uint64_t exchange_alone(uint64_t* p, uint64_t expected, uint64_t v) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(p)), "l"(expected), "l"(v)
               : "memory");
  return before;
}
ANL_DEVICE void wait_a_little() { __nanosleep(40); }  // inside every loop that waits for another CTA

// ---- between launches of a stream (sm_90): one that starts early, while the one ahead of it runs ------------------

// In the launch ahead: the next one may start as soon as all CTAs have come here, or ended.
ANL_DEVICE void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// In the one that starts early, by every thread: until the launch ahead has ended, whose results are seen from here on.
ANL_DEVICE void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- asynchronous copies of the calling thread into shared memory -----------------------------------------------------

ANL_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16-byte packs in shared memory, by an address of 32 bits: what is added to a pointer is added to both halves of it.
struct SharedPlace {
  uint32_t address;
  ANL_DEVICE explicit SharedPlace(const void* p) : SharedPlace(kept(shared_address(p)), 0) {}
  ANL_DEVICE SharedPlace operator+(int packs) const { return SharedPlace(address + packs * 16, 0); }
  ANL_DEVICE uint4 load(int i) const {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address + i * 16)
                 : "memory");
    return v;
  }
  ANL_DEVICE const void* pointer() const { return __cvta_shared_to_generic(address); }

 private:
  ANL_DEVICE SharedPlace(uint32_t of, int) : address(of) {}
};

// 4 or 8 aligned bytes. What a thread has copied it sees after copy_async_wait, others after a barrier then.
template <int BYTES>
ANL_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "n"(BYTES)
               : "memory");
}
// 16 aligned bytes, past L1.
template <Cache C = Cache::PLAIN>
ANL_DEVICE void copy_async16(void* shared, const void* global) {
  const uint32_t to = shared_address(shared);
  const auto from = __cvta_generic_to_global(global);
  if constexpr (C == Cache::PLAIN)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(l2_policy<C>())
                 : "memory");
}
ANL_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the thread's groups are under way.
template <int N>
ANL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- bulk copies (sm_90): 16-byte aligned, a multiple of 16 bytes, issued by one thread -------------------------------

using Barrier = uint64_t;  // in shared memory, 8-byte aligned

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ANL_SM90(...) __trap()
#else
#define ANL_SM90(...) asm volatile(__VA_ARGS__)
#endif

// `arrivals` threads complete a phase, each by barrier_expect (bytes of bulk copies to wait for besides).
ANL_DEVICE void barrier_init(Barrier* barrier, unsigned arrivals) {
  ANL_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  ANL_SM90("fence.mbarrier_init.release.cluster;" ::: "memory");
}
ANL_DEVICE void barrier_expect(Barrier* barrier, unsigned bytes) {
  ANL_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
           : "memory");
}
// Until the phase of this parity (0 for the first, 1 for the second, 0, ...) is complete.
ANL_DEVICE void barrier_wait(Barrier* barrier, unsigned parity) {
  unsigned done = 0;
  do
    ANL_SM90(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  while (!done);
}
ANL_DEVICE void bulk_copy(SharedPlace shared, const void* global, unsigned bytes, Barrier* barrier) {
  ANL_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
               shared.address),
           "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
           : "memory");
}

// ---- clusters (sm_90): CTAs that see each other's shared memory -------------------------------------------------------

ANL_DEVICE unsigned cluster_rank() {
  unsigned x = 0;
  ANL_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
// All threads of the cluster; shared memory written before cluster_arrive is seen after cluster_wait.
ANL_DEVICE void cluster_arrive() { ANL_SM90("barrier.cluster.arrive.release;" ::: "memory"); }
ANL_DEVICE void cluster_wait() { ANL_SM90("barrier.cluster.wait.acquire;" ::: "memory"); }
ANL_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The same variable of the CTA of that rank, for instructions that name shared memory of a cluster.
ANL_DEVICE uint32_t cluster_address(const void* shared, unsigned rank) {
  uint32_t x = 0;
  ANL_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(shared_address(shared)), "r"(rank));
  return x;
}
// 16 bytes into the same place of the CTA of that rank, whose barrier counts them as those of a bulk copy.
ANL_DEVICE void cluster_send16(void* place, uint4 v, Barrier* barrier, unsigned rank) {
  ANL_SM90("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
               cluster_address(place, rank)),
           "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(cluster_address(barrier, rank))
           : "memory");
}

#undef ANL_SM90

// ---- shared memory ----------------------------------------------------------------------------------------------------

// The CTA's dynamic shared memory, 128-byte aligned, as `type* name`; and a variable in static shared memory.
#define ANL_SHARED(type, name)                                                  \
  extern __shared__ __align__(128) unsigned char anl_dynamic_shared_memory[];   \
  type* const name = reinterpret_cast<type*>(anl_dynamic_shared_memory)
#define ANL_STATIC_SHARED(type, name)  \
  using name##_shared_type = type;     \
  __shared__ name##_shared_type name

#else
}  // namespace gpu
}  // namespace anl
#include "host_primitives.h"
namespace anl {
namespace gpu {
#endif

// ---- elements: how classes are stored, and the arithmetic type --------------------------------------------------------

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class S>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class S>
using acc_t = typename Arithmetic<S>::type;

ANL_DEVICE float widen(float x) { return x; }
ANL_DEVICE double widen(double x) { return x; }
ANL_DEVICE float widen(half_t x) { return half_to_float(x.bits); }
ANL_DEVICE float widen(bfloat16_t x) { return bfloat16_to_float(x.bits); }

template <class S>
ANL_DEVICE S narrow(acc_t<S> x) {
  return x;
}
template <>
ANL_DEVICE half_t narrow<half_t>(float x) {
  return {float_to_half(x)};
}
template <>
ANL_DEVICE bfloat16_t narrow<bfloat16_t>(float x) {
  return {float_to_bfloat16(x)};
}

// Two numbers of 16 bits in a word.
template <class S>
ANL_DEVICE uint32_t narrow2(float low, float high) {
  return std::is_same_v<S, half_t> ? floats_to_half2(low, high) : floats_to_bfloat162(low, high);
}

// 16 bytes of elements.
template <class S>
constexpr int PACK = 16 / int(sizeof(S));

template <class S>
ANL_DEVICE void widen_pack(uint4 bits, acc_t<S> (&x)[PACK<S>]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < PACK<S>; ++i) {
    if constexpr (sizeof(S) == 8)
      x[i] = __longlong_as_double((long long)(uint64_t(words[2 * i + 1]) << 32 | words[2 * i]));
    else if constexpr (sizeof(S) == 4)
      x[i] = __uint_as_float(words[i]);
    else
      x[i] = widen(S{uint16_t(words[i / 2] >> (i % 2 * 16))});
  }
}

template <class S>
ANL_DEVICE uint4 narrow_pack(const acc_t<S> (&x)[PACK<S>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 8)
      words[i] = uint32_t(uint64_t(__double_as_longlong(x[i / 2])) >> (i % 2 * 32));
    else if constexpr (sizeof(S) == 4)
      words[i] = __float_as_uint(x[i]);
    else
      words[i] = narrow2<S>(x[2 * i], x[2 * i + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace gpu
}  // namespace anl
