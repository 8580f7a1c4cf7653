// A row in shared memory, as it is stored, at the misalignment it has in global memory.
//
// Whole packs of 16 bytes are copied asynchronously, the elements of a pack that the row covers in part one by one; around
// the row stands -inf, so that every sweep takes whole packs and no element outside the row is ever read.
#pragma once

#include "results.cuh"

namespace anl {
namespace gpu {

template <class S>
struct StagedRow {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;

  S* data;          // shared, 16-byte aligned: element i is data[shift + i]
  const S* source;  // global: element i is source[i]
  int n, shift, packs;

  ANL_DEVICE StagedRow(S* shared, const S* global, int count)
      : data(shared), source(global), n(count), shift(int(reinterpret_cast<uintptr_t>(global) / sizeof(S) % P)),
        packs((shift + count + P - 1) / P) {}

  ANL_DEVICE bool whole(int i) const { return i >= 0 && i + P <= n; }

  // All threads: starts the copy.
  ANL_DEVICE void load() const {
    for (int q = threadIdx.x; q < packs; q += blockDim.x) {
      const int i = q * P - shift;
      if (whole(i)) {
        copy_async16(data + q * P, source + i);
      } else {
#pragma unroll
        for (int v = 0; v < P; ++v)
          data[q * P + v] = unsigned(i + v) < unsigned(n) ? source[i + v] : narrow<S>(minus_inf<T>());
      }
    }
    copy_async_commit();
  }

  // All threads, before the barrier after which any of them may read: the copy is there, and the target's logit is -inf.
  ANL_DEVICE void wait_and_mask(int64_t y) const {
    copy_async_wait<0>();
    const int at = shift + int(y);
    if (at / P % int(blockDim.x) == int(threadIdx.x)) data[at] = narrow<S>(minus_inf<T>());
  }

  // f(element) for every element of the thread's packs.
  template <class F>
  ANL_DEVICE void each(const F& f) const {
    for (int q = threadIdx.x; q < packs; q += blockDim.x) {
      T x[P];
      widen_pack<S>(*reinterpret_cast<const uint4*>(data + q * P), x);
#pragma unroll
      for (int v = 0; v < P; ++v) f(x[v]);
    }
  }

  // All threads, after a barrier: f(element) to grad[i], and `target` to element y's place. The staged row is lost: a
  // barrier stands before the next one is loaded.
  template <class F>
  ANL_DEVICE void store(S* grad, int64_t y, T target, const F& f) const {
    const bool straight = int(reinterpret_cast<uintptr_t>(grad) / sizeof(S) % P) == shift;
    for (int q = threadIdx.x; q < packs; q += blockDim.x) {
      const int i = q * P - shift;
      T x[P];
      uint4* staged = reinterpret_cast<uint4*>(data + q * P);
      widen_pack<S>(*staged, x);
#pragma unroll
      for (int v = 0; v < P; ++v) x[v] = f(x[v]);
      if (y >= i && y < i + P) {
#pragma unroll
        for (int v = 0; v < P; ++v)
          if (i + v == y) x[v] = target;
      }
      if (!straight) {
        *staged = narrow_pack<S>(x);
      } else if (whole(i)) {
        store16(grad + i, narrow_pack<S>(x));
      } else {
#pragma unroll
        for (int v = 0; v < P; ++v)
          if (unsigned(i + v) < unsigned(n)) grad[i + v] = narrow<S>(x[v]);
      }
    }
    if (straight) return;
    __syncthreads();
    copy_out(grad);
  }

  // The row, as it stands, to memory that is aligned in another way.
  ANL_DEVICE void copy_out(S* grad) const {
    const int to = int(reinterpret_cast<uintptr_t>(grad) / sizeof(S) % P);
    for (int i = int(threadIdx.x) * P - to; i < n; i += int(blockDim.x) * P) {
      if (whole(i)) {
        T pack[P];
#pragma unroll
        for (int v = 0; v < P; ++v) pack[v] = widen(data[shift + i + v]);
        store16(grad + i, narrow_pack<S>(pack));
      } else {
#pragma unroll
        for (int v = 0; v < P; ++v)
          if (unsigned(i + v) < unsigned(n)) grad[i + v] = data[shift + i + v];
      }
    }
  }
};

// `value` to n elements, by all threads of the CTA: the gradient of a row that is not read.
template <class S>
ANL_DEVICE void fill(S* grad, int64_t n, acc_t<S> value) {
  const S element = narrow<S>(value);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) grad[i] = element;
}

}  // namespace gpu
}  // namespace anl
