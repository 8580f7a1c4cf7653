// Which kernel runs a call, and how: by its shapes, strides, dtype, the device's limits and the protocols it may use.
//
//   classes not adjacent               spatial
//   up to 1024 classes (float64: 512)  small: a row in a warp's registers
//   few long rows                      split: a row over many CTAs, through L2
//   a row of up to 48 KB               block: several CTAs on a multiprocessor, a row in each one's shared memory
//   longer, sm_90 and later            cluster: a row in the shared memory of up to 16 CTAs
//   up to half the shared memory       block
//   whatever is left                   split
//
// Rows that may be neither split nor clustered in one launch are a block's as long as they fit one.
#include <algorithm>

#include "kernels.h"

namespace anl {
namespace gpu {
namespace {

constexpr int64_t SMALL_THREADS = 512;      // of the one CTA that runs a small batch
constexpr int64_t LOSS_PARTS = 16 << 10;    // beyond, a CTA takes more rows
constexpr int64_t SHARED_BY_FOUR = 48 << 10;
constexpr int64_t STATIC_SHARED = 2 << 10;  // what rows_block.cu has besides the row
constexpr int64_t RESERVED_SHARED = 1 << 10;  // what CUDA keeps of a multiprocessor's for every CTA
constexpr int64_t PACK_BYTES = 16;

int64_t power_of_two(int64_t n) {
  int64_t x = 1;
  while (x < n) x *= 2;
  return x;
}

int pack_of(const Call& call) { return int(PACK_BYTES / size_of(call.dtype)); }

bool aligned(const void* p, const Strides& s, int64_t size) {
  return (reinterpret_cast<uintptr_t>(p) | uintptr_t(s.so * size) | uintptr_t(s.si * size)) % PACK_BYTES == 0;
}

// Whole warps, at most `most` threads and what the device allows.
int warps_of(int64_t threads, int64_t most, const Limits& limits) {
  const int64_t limit = std::min<int64_t>(most, limits.max_threads);
  return int(std::min(power_of_two(std::max<int64_t>(threads, 32)), limit / 32 * 32));
}

int64_t rows_of(const Call& call) { return call.outer * call.inner; }

int64_t staged_row_bytes(const Call& call) {
  return (call.num_classes * size_of(call.dtype) + 2 * PACK_BYTES - 2) / PACK_BYTES * PACK_BYTES;
}

void finish_plan(Plan& plan, const Call& call) {
  plan.cluster = 1;
  plan.packs = equally_aligned(call);
  plan.blocks = ceil_div(rows_of(call), plan.rows);
  plan.loss_parts = plan.blocks;
}

}  // namespace

bool equally_aligned(const Call& call) {
  const int64_t size = size_of(call.dtype);
  if (!call.grad) return true;
  const uintptr_t apart = reinterpret_cast<uintptr_t>(call.logits) - reinterpret_cast<uintptr_t>(call.grad);
  const Strides &l = call.logits_strides, &g = call.grad_strides;
  const Strides difference = {l.so - g.so, 0, l.si - g.si};
  return aligned(reinterpret_cast<const void*>(apart), difference, size);
}

int max_shift(const Call& call) {
  return aligned(call.logits, call.logits_strides, size_of(call.dtype)) ? 0 : pack_of(call) - 1;
}

// 1024 classes, float64 512, where a CTA has the 64K registers that every GPU gives it.
bool fits_small(const Call& call, const Limits& limits) {
  return call.num_classes <= limits.registers / (call.dtype == FLOAT64 ? 128 : 64);
}

// Lanes and elements: as many lanes a row as one CTA has for a small batch, all of a warp where rows are few, and else
// so many that whole sectors are read, but no more: all of them do a row's mathematics.
Plan plan_small(const Call& call, const Limits& limits) {
  Plan plan = {};
  plan.kernel = Kernel::SMALL;
  const int64_t N = rows_of(call), K = call.num_classes, most = call.dtype == FLOAT64 ? 16 : 32;
  const int pack = pack_of(call);
  const int64_t needed = K + max_shift(call);
  const bool packs = equally_aligned(call) && K >= 4 * pack && needed <= 32 * most;
  const int64_t room = packs ? needed : K;
  const int64_t fewest = power_of_two(ceil_div(room, most));
  const int64_t single = std::min<int64_t>(call.dtype == FLOAT64 ? 256 : SMALL_THREADS, limits.max_threads);
  const bool one_cta = N * fewest <= 2 * single;
  const auto lanes_for = [&](int64_t elements) { return power_of_two(ceil_div(room, elements)); };
  const int64_t wanted = one_cta ? single / N : N * fewest < int64_t(limits.num_sms) * 256 ? 32 : packs ? 4 : 2;
  int64_t elements = most;
  while (elements > most / 4 && lanes_for(elements / 2) <= std::min<int64_t>(32, std::max(wanted, lanes_for(elements))))
    elements /= 2;
  plan.elements = int(elements);
  plan.lanes = int(lanes_for(elements));
  if (one_cta) {
    plan.threads = warps_of(N * plan.lanes, single, limits);
    plan.rows = N;
  } else {
    plan.threads = warps_of(128, 128, limits);
    const int64_t groups = plan.threads / plan.lanes;
    plan.rows = groups * std::max<int64_t>(1, std::min<int64_t>(16, N / (groups * LOSS_PARTS)));
  }
  finish_plan(plan, call);
  plan.packs = packs;
  return plan;
}

bool fits_block(const Call& call, const Limits& limits) {
  return staged_row_bytes(call) + STATIC_SHARED <= limits.shared_bytes;
}

Plan plan_block(const Call& call, const Limits& limits) {
  Plan plan = {};
  plan.kernel = Kernel::BLOCK;
  plan.shared_bytes = staged_row_bytes(call);
  plan.threads = warps_of(plan.shared_bytes / PACK_BYTES / 4, 256, limits);
  plan.rows = std::max<int64_t>(1, std::min<int64_t>(8, rows_of(call) / LOSS_PARTS));
  finish_plan(plan, call);
  return plan;
}

// One unit is a group of lanes with up to `tile` classes of a row.
Plan plan_gradient(const Call& call, const Limits& limits) {
  Plan plan = {};
  plan.kernel = Kernel::GRADIENT;
  const int64_t N = rows_of(call), K = call.num_classes, pack = pack_of(call);
  plan.cluster = 1;
  if (call.log_q) {
    plan.threads = warps_of(K / 8, 512, limits);
    plan.blocks = N;
    plan.packs = equally_aligned(call);
    return plan;
  }
  plan.packs = equally_aligned(call) && K >= 4 * pack;
  plan.threads = warps_of(128, 128, limits);
  plan.lanes = int(std::min<int64_t>(32, power_of_two(ceil_div(K, plan.packs ? 4 * pack : 4))));
  plan.tile = std::min<int64_t>(32 * 4 * 8, power_of_two(K + pack - 1));
  plan.blocks = ceil_div(N * ceil_div(K + pack - 1, plan.tile) * plan.lanes, plan.threads);
  return plan;
}

namespace {

// Rows whose classes are adjacent, for LOSS and STATS.
Plan plan_rows(const Call& call, const Limits& limits) {
  if (fits_small(call, limits)) return plan_small(call, limits);
  const int64_t N = rows_of(call), bytes = staged_row_bytes(call);
  const bool few = N * ceil_div(bytes, SHARED_BY_FOUR) < limits.num_sms / 2;
  const bool long_row = bytes > std::min<int64_t>(SHARED_BY_FOUR, limits.shared_bytes / 4);
  if (!long_row && !(few && bytes > SHARED_BY_FOUR / 2)) return plan_block(call, limits);
  const bool may_split = limits.protocols & SPLIT_ROWS;
  if (few && may_split) return plan_split(call, limits);
  if (!few && fits_cluster(call, limits)) return plan_cluster(call, limits);
  const bool two_per_sm = 2 * (bytes + STATIC_SHARED + RESERVED_SHARED) <= limits.shared_bytes + RESERVED_SHARED;
  if (fits_block(call, limits) && (two_per_sm || !may_split)) return plan_block(call, limits);
  return plan_split(call, limits);
}

}  // namespace

Plans select(const Call& call, const Limits& limits) {
  Plans plans;
  if (call.op == Op::COLUMN_SUMS) {
    plans.add(plan_columns(call, limits));
    return plans;
  }
  const bool adjacent = classes_are_adjacent(call) && call.num_classes <= INT32_MAX / 2;
  if (adjacent && call.op == Op::GRAD) {
    plans.add(plan_gradient(call, limits));
  } else if (adjacent) {
    plans.add(plan_rows(call, limits));
    if (!plans.has(Kernel::BLOCK) && fits_block(call, limits)) plans.add(plan_block(call, limits));
    if (!plans.has(Kernel::SPLIT)) plans.add(plan_split(call, limits));
  }
  plans.add(plan_spatial(call, limits));
  return plans;
}

}  // namespace gpu
}  // namespace anl
