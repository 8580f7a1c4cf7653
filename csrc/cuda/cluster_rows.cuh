// A long row in the shared memory of the CTAs of a cluster (sm_90): what each of them does.
//
// Every warp keeps its share of a row in a ring of chunks of its own, which bulk copies fill: it takes a chunk as soon as
// that is there, and lets go of one after the other as it writes the gradient; the next rows' chunks arrive meanwhile. No
// other warp ever waits for that. The longest float rows are HELD: each warp has one more chunk in its threads' registers.
// The CTAs tell one another what they have found by one message per sweep, which the receiver's barrier counts.
#pragma once

#include "chip_rows.cuh"

namespace anl {
namespace gpu {
namespace cluster {

constexpr int MAX_THREADS = 384;  // of a multiprocessor: 168 registers each
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr int MAX_CLUSTER = 16;
constexpr int MAX_CHUNKS = 112;   // of all warps of a CTA
constexpr int64_t STATIC_SHARED = 5 << 10;
constexpr int FEWEST_CHUNKS = 4;  // of whole tiles, in a warp's ring; else there are shorter ones
constexpr unsigned AHEAD = 4;     // rows whose chunks may be on their way besides the row that is worked on

// A row, as all warps have to know it.
template <class S>
struct QueuedRow : PartPlace<S> {
  int64_t r, y;
  Label kind;
  int copied;  // packs that the CTA reads
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
  using T = acc_t<S>;
  static constexpr unsigned QUEUE = 2 * AHEAD;  // a row's place is taken again when all warps are done with that row
  RowMemory<S, FULL, MAX_WARPS> row;
  Barrier filled[MAX_CHUNKS];
  QueuedRow<S> queue[QUEUE];
  Gathered<AnchoredSums<T, FULL>> first_of[2];  // live rows take turns
  Gathered<SecondSums<Scalar<T>, FULL>> second_of[2];

  ANL_DEVICE QueuedRow<S>& queued(unsigned n) { return queue[n % QUEUE]; }
};

// What a warp copies next, of row n of the cluster's, into slot `slot` of its ring; lane 0's.
template <class S>
struct Copier {
  const S* from;
  int left;  // packs of the row from there on
  int slot, free;  // free: slots
  unsigned n;
};

template <class S, bool FULL, bool HELD>
struct ClusterRows {
  using Memory = Shared<S, FULL>;
  using Part = GlobalRowPart<S>;

  const Params& p;
  Memory& shared;
  const SharedPlace ring;  // the warp's
  Barrier* const filled;
  const int64_t cluster, num_clusters;
  const int rank, warp;
  const int across;        // packs from a warp's chunk of a part to its next
  const int next, around;  // from a pack's place in the part to that in the ring: what the next chunk adds, and a new round
  const unsigned count;  // of the cluster's rows
  Copier<S> copier;
  static constexpr int TILE = TILE_PACKS<S>;
  uint4 held[HELD ? TILE : 1];  // of the warp's first chunk of row n
  unsigned n = 0;        // the row that is worked on
  int slot = 0;          // where that begins
  unsigned round = 0;    // 1 where that slot has been filled an even number of times
  int turn = 0;          // of live rows

  ANL_DEVICE ClusterRows(const Params& params, Memory& memory, uint4* rings, int own_warp)
      : p(params), shared(memory), ring(rings + own_warp * slots() * chunk()), filled(memory.filled + kept(own_warp * slots())),
        cluster(blockIdx.x / unsigned(p.plan.cluster)), num_clusters(gridDim.x / unsigned(p.plan.cluster)),
        rank(int(blockIdx.x % unsigned(p.plan.cluster))), warp(own_warp),
        across(kept(int(blockDim.x) / WARP * chunk())), next(kept(chunk() - across)), around(kept(-slots() * chunk())),
        count(unsigned(ceil_div(p.num_rows - cluster, num_clusters))), copier{nullptr, 0, 0, slots(), ~0u} {}

  ANL_DEVICE int chunk() const { return p.plan.ring.chunk_packs; }
  ANL_DEVICE int slots() const { return p.plan.ring.slots; }

  // The first pack of a warp's that is in its ring, of a part of so many packs.
  ANL_DEVICE bool holds(int packs) const { return HELD && packs >= across; }
  ANL_DEVICE int first_in_ring(int packs) const { return warp * chunk() + (holds(packs) ? across : 0); }

  // ---- rows to come --------------------------------------------------------------------------------------------------

  // One thread: what is to be known of row m.
  ANL_DEVICE void queue(unsigned m) const {
    if (m >= count) return;
    const Call& call = p.call;
    const int64_t r = cluster + m * num_clusters, y = label_at(call, r);
    const S* row = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r);
    S* grad = call.grad ? static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r) : nullptr;
    const int most = int(p.plan.ring.packs_per_cta);
    QueuedRow<S> queued;
    static_cast<PartPlace<S>&>(queued) = PartPlace<S>(row, grad, call.num_classes, y, rank * most, most);
    queued.r = r;
    queued.y = y;
    queued.kind = label_kind(call, y);
    queued.copied = queued.kind == Label::LIVE ? queued.packs : 0;
    shared.queued(m) = queued;
  }
  // The last warp, while warp 0 does the row's mathematics: the label takes its time.
  ANL_DEVICE void queue_next() const {
    if (threadIdx.x == blockDim.x - WARP) queue(n + AHEAD);
  }

  // ---- the ring ------------------------------------------------------------------------------------------------------

  // Lane 0: copies into all slots that are free, as far as rows are known.
  ANL_DEVICE void copy_next() {
    if (lane_index() > 0) return;
    Copier<S>& c = copier;
    while (c.free > 0) {
      if (c.left <= 0) {
        if (c.n == n + AHEAD - 1 || c.n + 1 >= count) return;
        const QueuedRow<S>& row = shared.queued(++c.n);
        const int first = first_in_ring(row.copied);
        c.left = row.copied - first;
        c.from = row.logits + int64_t(first) * PACK<S>;
        continue;
      }
      const unsigned bytes = unsigned(min(c.left, chunk())) * 16;
      barrier_expect(filled + c.slot, bytes);
      bulk_copy(ring + c.slot * chunk(), c.from, bytes, filled + c.slot);
      c.left -= across;
      c.from += int64_t(across) * PACK<S>;
      if (++c.slot == slots()) c.slot = 0;
      --c.free;
    }
  }

  template <class Sums>
  static ANL_DEVICE void start(Gathered<Sums>& gathered) {
    barrier_init(&gathered.there, 1);
    gathered.round = 0;
  }
  ANL_DEVICE void start() {
    if (lane_index() == 0)
      for (int s = 0; s < slots(); ++s) barrier_init(filled + s, 1);
    if (threadIdx.x == 0) {
      for (int t = 0; t < 2; ++t) {
        start(shared.first_of[t]);
        start(shared.second_of[t]);
      }
    }
    if (threadIdx.x < AHEAD) queue(threadIdx.x);
    cluster_sync();
    copy_next();
    hold(0);
  }

  // Reads what is held of row m.
  ANL_DEVICE void hold(unsigned m) {
    if (!HELD || m >= count) return;
    const QueuedRow<S>& row = shared.queued(m);
    if (!holds(row.copied)) return;
    const S* const from = row.logits + (warp * chunk() + lane_index()) * PACK<S>;
#pragma unroll
    for (int u = 0; u < TILE; ++u) held[u] = load16<Cache::STREAM>(from + u * WARP * PACK<S>);
  }

  // The chunks of the warp's share, one after the other.
  struct Cursor {
    ClusterRows& rows;
    const Pass pass;
    int begin, slot;  // of the part's packs
    unsigned round;
    SharedPacks<S> packs;  // pack i of the part is packs.load(i), if it is of this chunk

    ANL_DEVICE Cursor(ClusterRows& r, Pass which, int count)
        : rows(r), pass(which), begin(r.first_in_ring(count)), slot(r.slot), round(r.round),
          packs{r.ring + (slot * r.chunk() - begin)} {}
    // The first pass waits for a chunk.
    ANL_DEVICE void arrive() const {
      if (pass == Pass::FIRST) barrier_wait(rows.filled + slot, round);
    }
    // The last pass lets go of it.
    ANL_DEVICE void leave() {
      if (pass == Pass::LAST) {
        __syncwarp();
        ++rows.copier.free;
        rows.copy_next();
      }
      begin += rows.across;
      packs.data = packs.data + rows.next;
      if (++slot < rows.slots()) return;
      slot = 0;
      round ^= 1;
      packs.data = packs.data + rows.around;
    }
    ANL_DEVICE void finish() const {
      if (pass != Pass::LAST) return;
      rows.slot = slot;
      rows.round = round;
    }
  };

  // Over the packs of a part (PlainWalk says what such has).
  struct Walk {
    ClusterRows& rows;
    const int count;
    const Pass pass;

    template <int U, class F>
    ANL_DEVICE void tiles(const F& f) const {
      constexpr int WHOLE = TILE_PACKS<S> * WARP;
      const int lane = int(lane_index());
      Cursor at(rows, pass, count);
      if (U > 1 && rows.chunk() == WHOLE) {
        for (; at.begin + WHOLE <= count; at.leave()) {
          at.arrive();
#pragma unroll 1
          for (int i = 0; i < WHOLE; i += U * WARP) f(Count<U>(), at.begin + i + lane, true, at.packs);
        }
      }
      for (; at.begin < count; at.leave()) {
        at.arrive();
        const int end = min(at.begin + rows.chunk(), count);
#pragma unroll 1
        for (int i = at.begin; i < end; i += WARP) f(Count<1>(), i + lane, i + lane < end, at.packs);
      }
      at.finish();
      if constexpr (HELD) {
        if (!rows.holds(count)) return;
        const int begin = rows.warp * WHOLE + lane;
        static_assert(U == TILE, "all that is held");
        f(Count<U>(), begin, true, HeldPacks<U>{rows.held});
      }
    }
    template <class F>
    ANL_DEVICE void chunks(const F& f) const {
      Cursor at(rows, pass, count);
      for (; at.begin < count; at.leave()) {
        at.arrive();
        f(at.begin, min(at.begin + rows.chunk(), count), at.packs);
      }
      at.finish();
      const int begin = rows.warp * rows.chunk();  // single elements of what is held are read once more
      if (rows.holds(count)) f(begin, begin + rows.chunk(), GlobalPacks<S>{rows.shared.queued(rows.n).logits});
    }
  };
  ANL_DEVICE Walk walk(const Part& part, Pass pass) { return {*this, part.packs, pass}; }

  // ---- a row ---------------------------------------------------------------------------------------------------------

  // Warp 0: the cluster's sums, in every lane. own: this CTA's. What is sent of a row finds its place free, as the row
  // before the last had it: this CTA has the last row's sums of all others, which they sent when they had read that.
  template <class Wide, class Sums>
  ANL_DEVICE Wide exchange(const Sums& own, Gathered<Sums>& gathered) const {
    using Place = typename Gathered<Sums>::Place;
    const unsigned ranks = unsigned(p.plan.cluster), lane = lane_index(), parity = gathered.round & 1;
    if (ranks == 1) return convert<Wide>(own);
    __syncwarp();
    if (lane == 0) {
      ++gathered.round;
      barrier_expect(&gathered.there, ranks * unsigned(sizeof(Place)));
    }
    if (lane < ranks) {
      const Place place = {own};
      uint4 words[Gathered<Sums>::WORDS] = {};
      memcpy(words, &place, sizeof(Sums));
      uint4* const to = reinterpret_cast<uint4*>(gathered.of_rank + rank);
#pragma unroll
      for (int i = 0; i < Gathered<Sums>::WORDS; ++i) cluster_send16(to + i, words[i], &gathered.there, lane);
    }
    barrier_wait(&gathered.there, parity);
    return merge_places<Wide>(gathered.of_rank, ranks);
  }

  template <class Wide, class Sums>
  ANL_DEVICE Wide merge(const Sums& own, Sums* by_warp, Gathered<Sums>& gathered) const {
    const Sums of_cta = block_merge<Sums>(own, by_warp);
    return threadIdx.x < WARP ? exchange<Wide>(of_cta, gathered) : none<Wide>();
  }
  template <class Wide, class Sums>
  ANL_DEVICE Wide merge_first(const Sums& own, Sums* by_warp) const {
    const Wide all = merge<Wide>(own, by_warp, shared.first_of[turn]);
    queue_next();
    return all;
  }
  template <class Wide, class Sums>
  ANL_DEVICE Wide merge_second(const Sums& own, Sums* by_warp) const {
    return merge<Wide>(own, by_warp, shared.second_of[turn]);
  }

  ANL_DEVICE void run_row(const QueuedRow<S>& row) {
    const Part part(row, p.call.num_classes, rank == 0);
    if (row.kind == Label::LIVE) {
      const ChipRow live = {row.r, row.y, p.plan.ring.packs, rank == 0};
      run_chip_row<S, FULL>(p, live, part, *this, shared.row);
      turn ^= 1;
    } else {
      if (threadIdx.x == 0 && rank == 0) shared.row.loss += double(write_unread_row<acc_t<S>>(p, row.r, row.kind));
      if (p.call.grad) part.fill(unread_value<acc_t<S>>(row.kind), p.plan.ring.packs);
      queue_next();
      __syncthreads();
    }
    copy_next();  // of rows that have become known, should slots have been free all the time
    hold(n + 1);
  }
};

}  // namespace cluster
}  // namespace gpu
}  // namespace anl
