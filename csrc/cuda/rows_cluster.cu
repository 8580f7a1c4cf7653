// Long rows across the shared memory of the CTAs of a cluster (sm_90): read once, swept on chip, the gradient written once.
//
// Every CTA keeps its part of a row in a ring of chunks, which bulk copies fill. The first sweep takes a chunk as soon as
// it is there; the gradient lets go of one after the other, and the next row's chunks arrive meanwhile. The CTAs tell one
// another what they have found by one message per sweep, which the receiver's barrier counts.
#include "chip_rows.cuh"
#include "clusters.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 384;  // of a multiprocessor: 168 registers each
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr int MAX_CLUSTER = 16;
constexpr int MAX_SLOTS = 32;
constexpr int64_t STATIC_SHARED = 7 << 10;
constexpr int CHUNK_PACKS = 8;    // per thread: a multiple of any tile's
constexpr int FEWEST_CHUNKS = 4;  // of such, in a ring; else there are shorter ones

// Which chunk is copied next; thread 0's.
template <class S>
struct Copier {
  int64_t row;
  const S* logits;  // of the CTA's part of the row
  int packs, next;  // of that part; how many of them are on their way
  int slot;
  unsigned round;   // how often the slots have been filled
};

// What the CTAs of a cluster send one another, to every one of them: by rank.
template <class Sums>
struct Gathered {
  struct alignas(16) Place : Sums {};
  static constexpr int WORDS = sizeof(Place) / 16;
  Place of_rank[MAX_CLUSTER];
  Barrier there;
  unsigned round;  // how often all have been there
};

template <class S, bool FULL>
struct Shared {
  RowMemory<S, FULL, MAX_WARPS> row;
  Barrier filled[MAX_SLOTS], emptied[MAX_SLOTS];
  Copier<S> copier;
  Gathered<AnchoredSums<double, FULL>> first_of[2];  // rows take turns
  Gathered<SecondSums<Scalar<double>, FULL>> second_of[2];
};

template <class S, bool FULL>
struct ClusterRows {
  using T = acc_t<S>;
  using Memory = Shared<S, FULL>;
  using Part = GlobalRowPart<S>;
  static constexpr int P = PACK<S>;

  const Params& p;
  Memory& shared;
  unsigned char* const ring;
  const int64_t first_pack;  // of the body: this CTA's
  const int64_t num_clusters;
  int slot = 0;              // where the row's first chunk is
  unsigned round = 0;        // 1 where that has been filled an even number of times
  int turn = 0;

  ANL_DEVICE int chunk() const { return p.plan.ring.chunk_packs; }
  ANL_DEVICE int slots() const { return p.plan.ring.slots; }

  ANL_DEVICE uint4* slot_data(int s) const { return reinterpret_cast<uint4*>(ring) + int64_t(s) * chunk(); }

  ANL_DEVICE Part part_of(int64_t r, int64_t y) const {
    const Call& call = p.call;
    const S* row = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r);
    S* grad = call.grad ? static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r) : nullptr;
    return Part(row, grad, call.num_classes, y, first_pack, p.plan.ring.packs_per_cta, first_pack == 0);
  }

  // ---- the ring ------------------------------------------------------------------------------------------------------

  // Thread 0: copies the next chunk into the next slot, when that is empty; nothing if there is none.
  ANL_DEVICE void copy_next() const {
    Copier<S>& c = shared.copier;
    while (c.next >= c.packs) {
      c.row += num_clusters;
      if (c.row >= p.num_rows) {
        c.row = p.num_rows;
        return;
      }
      const int64_t y = label_at(p.call, c.row);
      const Part part = part_of(c.row, y);
      c.logits = part.logits;
      c.packs = label_kind(p.call, y) == Label::LIVE ? part.packs : 0;
      c.next = 0;
    }
    if (c.round > 0) barrier_wait(&shared.emptied[c.slot], (c.round - 1) & 1);
    const int left = c.packs - c.next, packs = left < chunk() ? left : chunk();
    barrier_expect(&shared.filled[c.slot], unsigned(packs) * 16);
    bulk_copy(slot_data(c.slot), c.logits + int64_t(c.next) * P, unsigned(packs) * 16, &shared.filled[c.slot]);
    c.next += packs;
    if (++c.slot == slots()) {
      c.slot = 0;
      ++c.round;
    }
  }

  template <class Sums>
  static ANL_DEVICE void start(Gathered<Sums>& gathered) {
    barrier_init(&gathered.there, 1);
    gathered.round = 0;
  }
  ANL_DEVICE void start() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < slots(); ++s) {
        barrier_init(&shared.filled[s], 1);
        barrier_init(&shared.emptied[s], blockDim.x / WARP);
      }
      for (int t = 0; t < 2; ++t) {
        start(shared.first_of[t]);
        start(shared.second_of[t]);
      }
      shared.copier = {int64_t(blockIdx.x / unsigned(p.plan.cluster)) - num_clusters, nullptr, 0, 0, 0, 0};
    }
    cluster_sync();
    if (threadIdx.x == 0)
      for (int s = 0; s < slots(); ++s) copy_next();
  }

  // f(end, packs) for every chunk of the row, which is waited for: packs up to `end`. `last`: this is the last walk over
  // them; chunks that follow take their places.
  template <class F>
  ANL_DEVICE void each_chunk(const Part& part, bool last, const F& f) {
    int s = slot, ahead = slot * chunk();  // from a pack's place in the part to that in the ring
    unsigned parity = round;
    for (int begin = 0; begin < part.packs; begin += chunk()) {
      barrier_wait(&shared.filled[s], parity);
      f(min(begin + chunk(), part.packs), SharedPacks<S>{reinterpret_cast<const uint4*>(ring) + ahead});
      if (last) {
        __syncwarp();
        if (lane_index() == 0) barrier_expect(&shared.emptied[s], 0);
        if (threadIdx.x == 0 && begin > 0) copy_next();  // where the chunk before was: by now the other warps are done
      }
      if (++s == slots()) {
        s = 0;
        parity ^= 1;
        ahead -= slots() * chunk();
      }
    }
    if (!last) return;
    if (threadIdx.x == 0 && part.packs > 0) copy_next();
    slot = s;
    round = parity;
    turn ^= 1;
  }

  // Over the packs of a part (PlainWalk says what such has).
  struct Walk {
    ClusterRows& rows;
    const Part& part;
    const bool last;

    template <int U, class F>
    ANL_DEVICE void tiles(const F& f) const {
      constexpr int TILE = U * WARP;
      const int lane = int(lane_index()), step = int(blockDim.x) * U;
      const int whole = rows.chunk() < step ? 0 : part.packs / TILE * TILE;  // packs, where chunks are whole tiles
      int next = int(threadIdx.x) / WARP * TILE;  // the warp's; behind the whole ones, U times as far as it is
      rows.each_chunk(part, last, [&](int end, const SharedPacks<S>& packs) {
        for (; next < whole && next < end; next += step) f(Count<U>(), next + lane, true, packs);
        if (next < whole) return;
        for (int i; (i = whole + (next - whole) / U) < end; next += step) f(Count<1>(), i + lane, i + lane < end, packs);
      });
    }
    template <class F>
    ANL_DEVICE void chunks(const F& f) const {
      int begin = 0;
      rows.each_chunk(part, last, [&](int end, const SharedPacks<S>& packs) {
        f(begin, end, packs);
        begin = end;
      });
    }
  };
  ANL_DEVICE Walk walk(const Part& part, bool last) { return {*this, part, last}; }

  // ---- a row ---------------------------------------------------------------------------------------------------------

  // Warp 0: the cluster's sums, in every lane. own: this CTA's. What is sent of a row finds its place free, as the row
  // before the last had it: this CTA has the last row's sums of all others, which they sent when they had read that.
  template <class Sums>
  ANL_DEVICE Sums exchange(const Sums& own, Gathered<Sums>& gathered) const {
    using Place = typename Gathered<Sums>::Place;
    const unsigned ranks = unsigned(p.plan.cluster), lane = lane_index(), parity = gathered.round & 1;
    if (ranks == 1) return own;
    __syncwarp();
    if (lane == 0) {
      ++gathered.round;
      barrier_expect(&gathered.there, ranks * unsigned(sizeof(Place)));
    }
    if (lane < ranks) {
      const Place place = {own};
      uint4 words[Gathered<Sums>::WORDS] = {};
      memcpy(words, &place, sizeof(Sums));
      uint4* const to = reinterpret_cast<uint4*>(gathered.of_rank + cluster_rank());
#pragma unroll
      for (int i = 0; i < Gathered<Sums>::WORDS; ++i) cluster_send16(to + i, words[i], &gathered.there, lane);
    }
    barrier_wait(&gathered.there, parity);
    return merge_places<Sums>(gathered.of_rank, ranks);
  }

  template <class First>
  ANL_DEVICE First merge_first(const First& own) const {
    return exchange(own, shared.first_of[turn]);
  }
  template <class Second>
  ANL_DEVICE Second merge_second(const Second& own) const {
    return exchange(own, shared.second_of[turn]);
  }
};

template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS, 1) rows_cluster_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(unsigned char, ring);
  using Memory = Shared<S, FULL>;
  static_assert(sizeof(Memory) + 1024 <= STATIC_SHARED, "finish_loss has some, too");
  ANL_STATIC_SHARED(Memory, shared);
  shared.row.start(loss_denominator<T>(p));
  const int64_t cluster = blockIdx.x / unsigned(p.plan.cluster), rank = blockIdx.x % unsigned(p.plan.cluster);
  ClusterRows<S, FULL> rows = {p, shared, ring, rank * p.plan.ring.packs_per_cta, gridDim.x / unsigned(p.plan.cluster)};
  rows.start();
  for (int64_t r = cluster; r < p.num_rows; r += rows.num_clusters) {
    const int64_t y = label_at(p.call, r);
    const Label kind = label_kind(p.call, y);
    if (kind == Label::LIVE) {
      const auto part = rows.part_of(r, y);
      const ChipRow live = {r, y, p.plan.ring.packs, rank == 0};
      run_chip_row<S, FULL>(p, live, part, rows, shared.row);
      continue;
    }
    if (threadIdx.x == 0 && rank == 0) shared.row.loss += double(write_unread_row<T>(p, r, kind));
    if (p.call.grad) rows.part_of(r, y).fill(unread_value<T>(kind), p.plan.ring.packs);
  }
  __syncthreads();  // thread 0 has brought its last row
  if (rank == 0) finish_loss<T>(p, cluster, shared.row.loss, shared.row.denominator);
}

template <class S, bool FULL>
cudaError_t launch_variant(Params& p, cudaStream_t stream) {
  const unsigned cluster = unsigned(p.plan.cluster);
  // Rows are dealt to the clusters beforehand, so no more of them than run at a time.
  int most = 0;
  if (const cudaError_t error = ANL_COUNT_CLUSTERS((rows_cluster_kernel<S, FULL>), p.plan.threads, cluster,
                                                   p.plan.shared_bytes, most))
    return error;
  if (most < p.plan.loss_parts) p.plan.loss_parts = most;
  return ANL_LAUNCH((rows_cluster_kernel<S, FULL>), unsigned(p.plan.loss_parts) * cluster, p.plan.threads, cluster,
                    p.plan.shared_bytes, stream, p);
}

// ---- the plan ---------------------------------------------------------------------------------------------------------

// How a CTA's shared memory is cut where a multiprocessor holds so many of them.
struct Ring {
  int threads, chunk_packs, slots;
  int64_t packs() const { return int64_t(slots) * chunk_packs; }
};

Ring ring_of(const Limits& limits, int ctas) {
  const int64_t fixed = limits.shared_bytes < 64 << 10 ? limits.shared_bytes / 4 : STATIC_SHARED;
  const int64_t bytes = (limits.shared_bytes + RESERVED_SHARED) / ctas - RESERVED_SHARED - fixed;
  const int64_t packs = bytes / PACK_BYTES;
  const int most = most_threads(MAX_THREADS / ctas, limits);
  const int fewest = ctas == 1 ? most * 3 / 4 : most;  // alone, to hold the longest rows; together, to finish them soonest
  const int chunk = packs >= fewest * CHUNK_PACKS * FEWEST_CHUNKS ? CHUNK_PACKS : 1;  // packs per thread
  Ring best = {most, most, 0};
  for (int threads = most; threads > 0 && threads >= fewest; threads -= WARP) {  // those that leave least over, the fewest
    const Ring ring = {threads, threads * chunk, int(std::min<int64_t>(packs / (threads * chunk), MAX_SLOTS))};
    if (ring.packs() >= best.packs()) best = ring;
  }
  return best;
}

// The smallest cluster that holds half of the next row besides a row, and leaves no multiprocessor idle; the widest if
// none does; 0 if that does not hold a row.
int cluster_for(const Ring& ring, int64_t row_packs, int64_t num_rows, const Limits& limits) {
  const int widest = limits.max_cluster < MAX_CLUSTER ? limits.max_cluster : MAX_CLUSTER;
  int cluster = 1;
  while (cluster < widest && (ceil_div(row_packs, cluster) * 3 > ring.packs() * 2 || num_rows * cluster < limits.num_sms))
    cluster *= 2;
  const int64_t chunks = ceil_div(ceil_div(row_packs, cluster), ring.chunk_packs);
  return ring.slots < 2 || chunks > ring.slots ? 0 : cluster;
}

int64_t body_packs(const Call& call) { return call.num_classes * logit_bytes(call) / PACK_BYTES; }

// How many CTAs a multiprocessor is to hold: two, so that one computes while the other waits for its cluster; one where a
// row is too long for that; 0 where it is too long for any cluster.
int ctas_for(const Call& call, const Limits& limits) {
  for (int ctas = 2; ctas >= 1; --ctas)
    if (cluster_for(ring_of(limits, ctas), body_packs(call), rows_of(call), limits)) return ctas;
  return 0;
}

}  // namespace

// Only for rows that fit a cluster.
Plan plan_cluster(const Call& call, const Limits& limits) {
  const int64_t num_rows = rows_of(call), packs = body_packs(call);
  const int ctas = ctas_for(call, limits);
  const Ring ring = ring_of(limits, ctas);
  const int cluster = cluster_for(ring, packs, num_rows, limits);
  Plan plan = {};
  plan.kernel = Kernel::CLUSTER;
  plan.threads = ring.threads;
  plan.cluster = cluster;
  plan.loss_parts = std::min(std::max<int64_t>(1, int64_t(limits.num_sms) * ctas / cluster), num_rows);
  plan.blocks = plan.loss_parts * cluster;
  plan.shared_bytes = ring.packs() * PACK_BYTES;
  // Whole tiles for all CTAs but the last, where that gives it little less.
  constexpr int64_t TILE = TILE_PACKS<float> * WARP;
  int64_t part = ceil_div(packs, cluster);
  if (part > 8 * TILE && ceil_div(part, TILE) * TILE <= ring.packs()) part = ceil_div(part, TILE) * TILE;
  plan.ring = {part, ring.chunk_packs, ring.slots, equally_aligned(call)};
  return plan;
}

bool fits_cluster(const Call& call, const Limits& limits) {
  return limits.protocols & CLUSTERS && limits.max_cluster > 1 && call.dtype != FLOAT64 && ctas_for(call, limits);
}

cudaError_t widest_rows_cluster(const Limits& limits, int& cluster) {
  const size_t bytes = size_t(ring_of(limits, 1).packs() * PACK_BYTES);
  return widest_cluster(reinterpret_cast<const void*>(rows_cluster_kernel<float, false>),
                        most_threads(MAX_THREADS, limits), bytes, cluster);
}

cudaError_t launch_cluster(Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    using S = typename decltype(s)::type;
    if constexpr (sizeof(S) == 8)
      return cudaErrorInvalidValue;
    else
      return launch_variant<S, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
