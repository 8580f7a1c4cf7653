// Which kernel runs a call, and how: by its shapes, strides, dtype, the device's limits and the protocols it may use.
//
//   classes with gaps between them     spatial
//   few classes (some 1000s)           small: a batch of rows in shared memory
//   few long rows                      split: a row over many CTAs, through L2
//   a row of up to 48 KB               block: several CTAs on a multiprocessor, a row in each one's shared memory
//   longer, sm_90 and later            cluster: a row in the shared memory of up to 16 CTAs
//   up to half the shared memory       block
//   whatever is left                   split
//
// Rows that may be neither split nor clustered in one launch are a block's as long as they fit one.
#include <algorithm>

#include "plans.h"

namespace anl {
namespace gpu {
namespace {

constexpr int64_t SHARED_BY_FOUR = 48 << 10;

// Rows whose classes lie side by side, for LOSS and STATS.
Plan plan_rows(const Call& call, const Limits& limits) {
  if (fits_small(call, limits)) return plan_small(call, limits);
  const int64_t bytes = row_bytes(call);
  const bool few = rows_of(call) * ceil_div(bytes, SHARED_BY_FOUR) < limits.num_sms / 2;
  const bool long_row = bytes > std::min<int64_t>(SHARED_BY_FOUR, limits.shared_bytes / 4);
  if (!long_row && !(few && bytes > SHARED_BY_FOUR / 2)) return plan_block(call, limits);
  const bool may_split = limits.protocols & SPLIT_ROWS;
  if (few && may_split) return plan_split(call, limits);
  if (!few && fits_cluster(call, limits)) return plan_cluster(call, limits);
  if (fits_block(call, limits, may_split ? 2 : 1)) return plan_block(call, limits);
  return plan_split(call, limits);
}

}  // namespace

Plans select(const Call& call, const Limits& limits) {
  Plans plans;
  if (call.op == Op::COLUMN_SUMS) {
    plans.add(plan_column_sums(call, limits));
    return plans;
  }
  if (classes_are_adjacent(call) && call.num_classes <= INT32_MAX / 2) {
    if (call.op == Op::GRAD) {
      plans.add(plan_gradient(call, limits));
    } else {
      plans.add(plan_rows(call, limits));
      if (!plans.has(Kernel::BLOCK) && fits_block(call, limits)) plans.add(plan_block(call, limits));
      if (!plans.has(Kernel::SPLIT)) plans.add(plan_split(call, limits));
    }
  }
  plans.add(plan_spatial(call, limits));
  return plans;
}

}  // namespace gpu
}  // namespace anl
