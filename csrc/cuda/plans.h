// What the kernels' plans have in common: host code.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace anl {
namespace gpu {

constexpr int64_t LOSS_PARTS = 4 << 10;       // beyond, a CTA takes more rows: the last one adds up so many
constexpr int64_t RESERVED_SHARED = 1 << 10;  // what CUDA keeps of a multiprocessor's for every CTA
constexpr int64_t PACK_BYTES = 16;

inline int64_t rows_of(const Call& call) { return call.outer * call.inner; }
inline int pack_of(const Call& call) { return int(PACK_BYTES / logit_bytes(call)); }

// The smallest that is not below n.
inline int64_t power_of_two(int64_t n) {
  int64_t x = 1;
  while (x < n) x *= 2;
  return x;
}

// Shared memory for a row.
inline int64_t row_bytes(const Call& call) {
  return ceil_div(call.num_classes * logit_bytes(call), PACK_BYTES) * PACK_BYTES;
}

// At most so many threads, in whole warps, as the device allows.
inline int most_threads(int most, const Limits& limits) { return std::min(most, limits.max_threads) / 32 * 32; }

// A power of two of whole warps for so many threads, or most_threads.
inline int threads_for(int64_t threads, int most, const Limits& limits) {
  return int(std::min<int64_t>(power_of_two(std::max<int64_t>(threads, 32)), most_threads(most, limits)));
}

// Whether every row of the logits begins at 16 aligned bytes.
inline bool rows_aligned(const void* data, const Strides& s, int64_t size) {
  return (reinterpret_cast<uintptr_t>(data) | uintptr_t(s.so * size) | uintptr_t(s.si * size)) % PACK_BYTES == 0;
}
inline bool rows_aligned(const Call& call) {
  return rows_aligned(call.logits, call.logits_strides, logit_bytes(call));
}

// Whether every row's gradient is aligned as its logits are.
inline bool equally_aligned(const Call& call) {
  if (!call.grad) return true;
  const uintptr_t apart = reinterpret_cast<uintptr_t>(call.logits) - reinterpret_cast<uintptr_t>(call.grad);
  const Strides &l = call.logits_strides, &g = call.grad_strides;
  const Strides difference = {l.so - g.so, 0, l.si - g.si};
  return rows_aligned(reinterpret_cast<const void*>(apart), difference, logit_bytes(call));
}

// A kernel whose CTAs have rows of their own.
inline Plan plan_of_rows(Kernel kernel, const Call& call, int threads, int64_t rows_per_cta) {
  Plan plan = {};
  plan.kernel = kernel;
  plan.threads = threads;
  plan.cluster = 1;
  plan.blocks = plan.loss_parts = ceil_div(rows_of(call), rows_per_cta);
  return plan;
}

}  // namespace gpu
}  // namespace anl
