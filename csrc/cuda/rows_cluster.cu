// Long rows across the shared memory of the CTAs of a cluster (sm_90): read once, swept on chip, the gradient written once.
#include "cluster_rows.cuh"
#include "clusters.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

using namespace cluster;

template <class S, bool FULL, bool HELD>
__global__ void __launch_bounds__(MAX_THREADS, 1) rows_cluster_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(uint4, ring);
  using Memory = Shared<S, FULL>;
  static_assert(sizeof(Memory) + 1024 <= STATIC_SHARED, "finish_loss has some, too");
  ANL_STATIC_SHARED(Memory, shared);
  shared.row.start(loss_denominator<T>(p));
  const int warp = __shfl_sync(ALL_LANES, int(threadIdx.x / WARP), 0);  // which the compiler then knows to be all lanes'
  ClusterRows<S, FULL, HELD> rows(p, shared, ring, warp);
  rows.start();
  for (; rows.n < rows.count; ++rows.n) rows.run_row(shared.queued(rows.n));
  __syncthreads();  // thread 0 has brought its last row
  if (rows.rank == 0) finish_loss<T>(p, rows.cluster, shared.row.loss, shared.row.denominator);
}

template <bool FULL, int SIZE>
constexpr bool HAS_HELD = !FULL && SIZE == 4;

template <class S, bool FULL, bool HELD>
cudaError_t launch_variant(Params& p, cudaStream_t stream) {
  const unsigned cluster = unsigned(p.plan.cluster);
  // Rows are dealt to the clusters beforehand, so no more of them than run at a time.
  int most = 0;
  if (const cudaError_t error = ANL_COUNT_CLUSTERS((rows_cluster_kernel<S, FULL, HELD>), p.plan.threads, cluster,
                                                   p.plan.shared_bytes, most))
    return error;
  if (most < p.plan.loss_parts) p.plan.loss_parts = most;
  return ANL_LAUNCH((rows_cluster_kernel<S, FULL, HELD>), unsigned(p.plan.loss_parts) * cluster, p.plan.threads, cluster,
                    p.plan.shared_bytes, stream, p);
}

// ---- the plan ---------------------------------------------------------------------------------------------------------

// How a row is spread, where a multiprocessor holds so many CTAs.
struct Spread {
  int ctas, threads, chunk_packs;
  int slots;  // of every warp's ring
  bool held;
  int cluster;

  int64_t warps() const { return threads / WARP; }
  int64_t ring_packs() const { return warps() * slots * chunk_packs; }
  // Whether there is room for a row of so many packs.
  bool has_room(int64_t row_packs) const {
    return slots >= 2 && ceil_div(ceil_div(row_packs, cluster), chunk_packs) <= warps() * (slots + held);
  }
};

int64_t ring_bytes(const Limits& limits, int ctas) {
  const int64_t fixed = limits.shared_bytes < 64 << 10 ? limits.shared_bytes / 4 : STATIC_SHARED;
  return (limits.shared_bytes + RESERVED_SHARED) / ctas - RESERVED_SHARED - fixed;
}

// The smallest cluster that holds a third of the next row besides a row, and leaves no multiprocessor idle; the widest if
// none does.
int cluster_for(int64_t row_packs, int64_t ring_packs, int64_t num_rows, const Limits& limits) {
  const int widest = limits.max_cluster < MAX_CLUSTER ? limits.max_cluster : MAX_CLUSTER;
  int cluster = 1;
  while (cluster < widest && (ceil_div(row_packs, cluster) * 4 > ring_packs * 3 || num_rows * cluster < limits.num_sms))
    cluster *= 2;
  return cluster;
}

int64_t body_packs(const Call& call) { return call.num_classes * logit_bytes(call) / PACK_BYTES; }

Spread spread_over(const Call& call, const Limits& limits, int ctas, bool held) {
  const int64_t packs = ring_bytes(limits, ctas) / PACK_BYTES;
  const int most = most_threads(MAX_THREADS / ctas, limits);
  const int fewest = ctas == 1 ? most * 3 / 4 : most;  // alone, to hold the longest rows; together, to finish them soonest
  const int tile = logit_bytes(call) == 2 ? TILE_PACKS<half_t> : TILE_PACKS<float>;  // packs per thread
  const int per_thread = packs >= fewest * tile * FEWEST_CHUNKS ? tile : 1;
  Spread best = {ctas, most, per_thread * WARP, 0, held && per_thread == tile, 1};
  for (int threads = most; threads > 0 && threads >= fewest; threads -= WARP) {  // those that leave least over, the fewest
    const int64_t slots = std::min<int64_t>(packs / (threads * per_thread), MAX_CHUNKS / (threads / WARP));
    Spread spread = best;
    spread.threads = threads;
    spread.slots = int(slots);
    if (spread.ring_packs() >= best.ring_packs()) best = spread;
  }
  best.cluster = cluster_for(body_packs(call), best.ring_packs(), rows_of(call), limits);
  return best;
}

// A multiprocessor holds two CTAs, so that one computes while the other waits for its cluster; one where a row is too long
// for that. Whether any cluster has room for a row.
bool spread_row(const Call& call, const Limits& limits, Spread& spread) {
  const bool may_hold = call.dtype == FLOAT32 && !takes_full(call);
  for (const auto& [ctas, held] : {std::pair(2, false), std::pair(1, false), std::pair(1, may_hold)}) {
    spread = spread_over(call, limits, ctas, held);
    if (spread.has_room(body_packs(call))) return true;
  }
  return false;
}

}  // namespace

// Only for rows that fit a cluster.
Plan plan_cluster(const Call& call, const Limits& limits) {
  Spread spread;
  spread_row(call, limits, spread);
  const int cluster = spread.cluster;
  Plan plan = {};
  plan.kernel = Kernel::CLUSTER;
  plan.threads = spread.threads;
  plan.cluster = cluster;
  plan.loss_parts = std::min(std::max<int64_t>(1, int64_t(limits.num_sms) * spread.ctas / cluster), rows_of(call));
  plan.blocks = plan.loss_parts * cluster;
  plan.shared_bytes = spread.ring_packs() * PACK_BYTES;
  // Whole chunks for all CTAs but the last, where that gives it little less.
  const int64_t chunk = spread.chunk_packs;
  int64_t part = ceil_div(body_packs(call), cluster);
  if (part > 8 * chunk) part = ceil_div(part, chunk) * chunk;
  plan.ring = {part, spread.chunk_packs, spread.slots, spread.held, equally_aligned(call)};
  return plan;
}

bool fits_cluster(const Call& call, const Limits& limits) {
  Spread spread;
  return limits.protocols & CLUSTERS && limits.max_cluster > 1 && call.dtype != FLOAT64 && spread_row(call, limits, spread);
}

cudaError_t widest_rows_cluster(const Limits& limits, int& cluster) {
  return widest_cluster(reinterpret_cast<const void*>(rows_cluster_kernel<float, !HAS_LEAN_KERNELS, false>),
                        most_threads(MAX_THREADS, limits), size_t(ring_bytes(limits, 1)), cluster);
}

cudaError_t launch_cluster(Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    using S = typename decltype(s)::type;
    constexpr bool FULL = decltype(full)::value;
    if constexpr (sizeof(S) == 8) return cudaErrorInvalidValue;
    if constexpr (HAS_HELD<FULL, sizeof(S)>)
      if (p.plan.ring.held) return launch_variant<S, FULL, true>(p, stream);
    if constexpr (sizeof(S) < 8) return launch_variant<S, FULL, false>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
