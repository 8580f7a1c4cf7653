// Sums over the rows of what the classes of each have, where a row's classes lie side by side.
#pragma once

#include "common.h"

namespace anl {
namespace ANL_ISA {
namespace {

// sum over rows of p_ij: a thread owns a range of classes (and, where these are few, one of a fixed number of row
// chunks); within it rows are added in order.
template <class S>
void column_sums(const Call& call) {
  using T = typename Storage<S>::Acc;
  constexpr int W = Traits<T>::width;
  constexpr int64_t CLASSES = 2048;             // that a task's sums hold at most
  constexpr int64_t TASK_ELEMENTS = 32 << 10;  // a thread gets at least about as many logits
  const int64_t K = call.num_classes, N = call.outer * call.inner, num_blocks = ceil_div(K, CLASSES);
  const int64_t chunks = max_of<int64_t>(1, min_of<int64_t>(min_of<int64_t>(16, 64 / num_blocks), ceil_div(N, 64)));
  const int64_t rows = ceil_div(N, chunks);
  Scratch<double> partial(chunks * K);
  parallel_for(chunks * num_blocks, max_of<int64_t>(1, TASK_ELEMENTS / (rows * min_of(K, CLASSES) + 1)),
               [&](int64_t begin, int64_t end) {
    T sums[CLASSES + W];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / num_blocks, k0 = task % num_blocks * CLASSES, n = min_of(CLASSES, K - k0);
      double* out = partial.data + chunk * K + k0;
      for (int64_t k = 0; k < n; ++k) out[k] = 0.0;
      const int64_t stop = min_of(N, (chunk + 1) * rows);
      for (int64_t r0 = chunk * rows; r0 < stop; r0 += 32) {  // a few rows in T, then on in double
        memset(sums, 0, sizeof(sums));
        for (int64_t r = r0; r < min_of(stop, r0 + 32); ++r) {
          const T* coefs = static_cast<const T*>(call.grad_coefs) + r;
          const T high = coefs[COEF_MAX * N], inv_sum = coefs[COEF_INV_SUM * N];
          if (inv_sum == T(0)) continue;
          const S* z = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r) + k0;
          for (int64_t k = 0; k < n; k += W) {
            const auto v = n - k >= W ? Storage<S>::load(z + k) : load_part(z + k, int(n - k), set1(T(-INF)));
            Storage<T>::store(sums + k, Storage<T>::load(sums + k) + vexp<T>(v - high) * inv_sum);
          }
        }
        for (int64_t k = 0; k < n; ++k) out[k] += double(sums[k]);
      }
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial.data[chunk * K + k];
    call.sums[k] = total;
  }
}

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
