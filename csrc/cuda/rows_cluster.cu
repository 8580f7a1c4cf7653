// Long rows across the shared memory of the CTAs of a cluster (sm_90): read once, swept on chip, the gradient written once.
//
// Every CTA keeps its share of a row in a ring of chunks, which bulk copies fill. The first sweep takes a chunk as soon
// as it is there; the gradient lets go of one after the other, and the next row's chunks arrive meanwhile. The CTAs tell
// one another what they have found through distributed shared memory, one tuple and one cluster barrier a sweep.
#include "long_rows.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 512;
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr int MAX_CLUSTER = 16;
constexpr int MAX_SLOTS = 32;
constexpr int CHUNK_PACKS = TILE_PACKS<float>;  // of a thread in a chunk

// Of thread 0: which chunk is copied next.
template <class S>
struct Copier {
  int64_t row;
  const S* logits;  // of the CTA's share of the row
  int packs, next;  // of that share; those on their way
  int slot;
  unsigned round;   // how often the slots have been filled
};

template <class S>
struct Shared {
  using T = acc_t<S>;
  Barrier filled[MAX_SLOTS], emptied[MAX_SLOTS];
  Copier<S> copier;
  FirstSums<double> first[MAX_WARPS];
  SecondSums<double> second[MAX_WARPS];
  FirstSums<double> first_of[2][MAX_CLUSTER];    // by rank, written by that rank; rows take turns
  SecondSums<double> second_of[2][MAX_CLUSTER];
  SecondSweep<T> sweep;
  GradientRow<T> gradient;
  bool sweeps_again, all_exist;
};

template <class S, bool FOCAL>
struct ClusterRows {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;

  const Params& p;
  Shared<S>& shared;
  unsigned char* const ring;
  const int64_t first_pack;  // of the body: this CTA's
  int slot = 0;              // where the row's first chunk is
  unsigned round = 0;
  int turn = 0;

  ANL_DEVICE int chunk() const { return p.plan.elements; }  // in packs
  ANL_DEVICE int slots() const { return p.plan.lanes; }
  ANL_DEVICE int64_t share() const { return p.plan.tile; }
  ANL_DEVICE int64_t num_clusters() const { return gridDim.x / unsigned(p.plan.cluster); }

  ANL_DEVICE uint4* slot_data(int s) const { return reinterpret_cast<uint4*>(ring) + int64_t(s) * chunk(); }

  ANL_DEVICE Share<S> share_of(int64_t r, int64_t y) const {
    const Call& call = p.call;
    const S* row = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r);
    S* grad = call.grad ? static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r) : nullptr;
    return Share<S>(row, grad, call.num_classes, y, first_pack, share(), first_pack == 0);
  }

  // ---- the ring ------------------------------------------------------------------------------------------------------

  // Thread 0: copies the next chunk into the next slot, when that is empty; nothing if there is none.
  ANL_DEVICE void copy_next() const {
    Copier<S>& c = shared.copier;
    while (c.next >= c.packs) {
      c.row += num_clusters();
      if (c.row >= p.num_rows) {
        c.row = p.num_rows;
        return;
      }
      const int64_t y = label_at(p.call, c.row);
      const Share<S> share = share_of(c.row, y);
      c.logits = share.logits;
      c.packs = label_kind(p.call, y) == Label::LIVE ? share.packs : 0;
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

  ANL_DEVICE void start() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < slots(); ++s) {
        barrier_init(&shared.filled[s], 1);
        barrier_init(&shared.emptied[s], blockDim.x / WARP);
      }
      shared.copier = {int64_t(blockIdx.x / unsigned(p.plan.cluster)) - num_clusters(), nullptr, 0, 0, 0, 0};
    }
    cluster_sync();
    if (threadIdx.x == 0)
      for (int s = 0; s < slots(); ++s) copy_next();
  }

  // f(begin, end, load) for every chunk of the row, which is waited for. `last`: this is the last sweep over them, and
  // chunks that follow take their places.
  template <class F>
  ANL_DEVICE void each_chunk(const Share<S>& share, bool last, const F& f) const {
    int s = slot;
    unsigned turns = round;
    for (int begin = 0; begin < share.packs; begin += chunk()) {
      const int end = begin + chunk() < share.packs ? begin + chunk() : share.packs;
      barrier_wait(&shared.filled[s], turns & 1);
      const uint4* data = slot_data(s) - begin;
      f(begin, end, data);
      if (last) {
        __syncwarp();
        if (lane_index() == 0) barrier_expect(&shared.emptied[s], 0);
        if (threadIdx.x == 0 && begin > 0) copy_next();  // where the chunk before was: by now the other warps are done
      }
      if (++s == slots()) {
        s = 0;
        ++turns;
      }
    }
    if (last && threadIdx.x == 0 && share.packs > 0) copy_next();
  }

  ANL_DEVICE void leave(const Share<S>& share) {
    slot += (share.packs + chunk() - 1) / chunk();
    if (slot >= slots()) {
      slot -= slots();
      ++round;
    }
    turn ^= 1;
  }

  // ---- a row ---------------------------------------------------------------------------------------------------------

  // The cluster's sums, in every lane of warp 0 of every CTA; `own` are this CTA's.
  template <class Sums>
  ANL_DEVICE Sums exchange(const Sums& own, Sums* of_rank) const {
    const unsigned ranks = unsigned(p.plan.cluster);
    if (ranks == 1) return own;
    if (threadIdx.x < ranks) *cluster_map(of_rank + cluster_rank(), threadIdx.x) = own;
    cluster_sync();
    return warp_merge(lane_index() < ranks ? of_rank[lane_index()] : Sums::none());
  }

  ANL_DEVICE FirstSums<double> first_sums(const Share<S>& share, T edge) const {
    FirstSums<T> sums = FirstSums<T>::none();
    each_chunk(share, false, [&](int begin, int end, const uint4* data) {
      share.first_sweep(sums, begin, end, [&](int i) { return data[i]; });
    });
    add_edge(sums, edge);
    return exchange(block_merge(sums, shared.first), shared.first_of[turn]);
  }

  ANL_DEVICE SecondSums<double> second_sums(const Share<S>& share, T edge) const {
    SecondSums<T> sums = SecondSums<T>::none();
    const SecondSweep<T> sweep = shared.sweep;
    each_chunk(share, false, [&](int begin, int end, const uint4* data) {
      share.template second_sweep<FOCAL>(sums, sweep, begin, end, [&](int i) { return data[i]; });
    });
    sweep.template add<FOCAL>(sums, edge);
    return exchange(block_merge(sums, shared.second), shared.second_of[turn]);
  }

  ANL_DEVICE void write_gradient(const Share<S>& share, T edge) const {
    const GradientRow<T> gradient = shared.gradient;
    const bool all_exist = shared.all_exist;
    each_chunk(share, true, [&](int begin, int end, const uint4* data) {
      if (!share.grad) return;
      if (p.plan.packs) {
        share.template write_gradient<FOCAL, Cache::STREAM>(gradient, all_exist, begin, end,
                                                            [&](int i) { return data[i]; });
      } else {
        const S* elements = reinterpret_cast<const S*>(data);
        share.template write_elements<FOCAL>(gradient, begin, end, [&](int j) { return elements[j]; });
      }
    });
    share.template write_edge<FOCAL>(gradient, edge);
  }

  // The row's loss, in warp 0, which does the row's mathematics.
  ANL_DEVICE T run(int64_t r, int64_t y, double denominator) {
    const Share<S> share = share_of(r, y);
    const Program& program = p.call.program;
    const bool first_warp = threadIdx.x < WARP, writes = threadIdx.x == 0 && first_pack == 0;
    const T edge = share.edge_logit();
    const T z_y = first_warp ? widen(static_cast<const S*>(p.call.logits)[row_offset(p.call, p.call.logits_strides, r) + y])
                             : T(0);
    const FirstSums<double> sums = first_sums(share, edge);
    Row<T> row;
    if (first_warp) {
      row.begin(program, sums, z_y);
      if (threadIdx.x == 0) {
        shared.sweep = row.sweep(program);
        shared.sweeps_again = row.second;
        shared.all_exist = sums.count == double(p.call.num_classes - 1);
      }
    }
    if (program.needs) {
      __syncthreads();
      if (shared.sweeps_again) {
        const SecondSums<double> again = second_sums(share, edge);
        if (first_warp) row.take(again, FOCAL);
      }
    }
    T loss = T(0);
    if (first_warp) {
      if (p.call.op == Op::STATS) {
        if (writes) write_statistics(p, r, row);
      } else {
        GradientRow<T> gradient;
        loss = finish_row<T, FOCAL>(p, r, row, row_weight<T>(p.call, y, Label::LIVE), denominator, writes, gradient);
        if (threadIdx.x == 0) shared.gradient = gradient;
      }
    }
    __syncthreads();
    write_gradient(share, edge);
    leave(share);
    return loss;
  }
};

template <class S, bool FOCAL>
__global__ void __launch_bounds__(MAX_THREADS) rows_cluster_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(unsigned char, ring);
  ANL_STATIC_SHARED(Shared<S>, shared);
  const double denominator = loss_denominator<T>(p);
  const int64_t cluster = blockIdx.x / unsigned(p.plan.cluster), rank = blockIdx.x % unsigned(p.plan.cluster);
  ClusterRows<S, FOCAL> rows = {p, shared, ring, rank * p.plan.tile};
  rows.start();
  double total = 0.0;
  for (int64_t r = cluster; r < p.num_rows; r += rows.num_clusters()) {
    const int64_t y = label_at(p.call, r);
    const Label kind = label_kind(p.call, y);
    if (kind == Label::LIVE) {
      total += double(rows.run(r, y, denominator));
      continue;
    }
    if (threadIdx.x == 0 && rank == 0) total += double(write_unread_row<T>(p, r, kind));
    if (p.call.grad) rows.share_of(r, y).fill(unread_value<T>(kind), p.plan.packs);
  }
  if (rank == 0) finish_loss<T>(p, cluster, total, denominator);
}

template <class S, bool FOCAL>
cudaError_t launch_variant(Params& p, cudaStream_t stream) {
  const unsigned cluster = unsigned(p.plan.cluster);
  // Rows are dealt to the clusters beforehand, so no more of them than run at a time.
  int most = 0;
  if (const cudaError_t error = ANL_COUNT_CLUSTERS((rows_cluster_kernel<S, FOCAL>), p.plan.threads, cluster,
                                                   p.plan.shared_bytes, most))
    return error;
  if (most < p.plan.loss_parts) p.plan.loss_parts = most;
  return ANL_LAUNCH((rows_cluster_kernel<S, FOCAL>), unsigned(p.plan.loss_parts) * cluster, p.plan.threads, cluster,
                    p.plan.shared_bytes, stream, p);
}

// ---- the plan ---------------------------------------------------------------------------------------------------------

// How a CTA's memory is cut where so many of them share a multiprocessor.
struct Ring {
  int threads, chunk, slots;  // chunk: in packs
};

Ring ring_of(const Limits& limits, int ctas) {
  const int64_t fixed = limits.shared_bytes < 64 << 10 ? limits.shared_bytes / 4 : 6 << 10;  // of static shared memory
  const int64_t packs = ((limits.shared_bytes + 1024) / ctas - 1024 - fixed) / 16;
  const int most = MAX_THREADS / ctas < limits.max_threads ? MAX_THREADS / ctas : limits.max_threads / WARP * WARP;
  Ring best = {most, most, 0};
  for (int threads = most; threads > 0 && threads * 4 >= most * 3; threads -= WARP) {  // those that leave least over
    const int chunk = packs >= threads * CHUNK_PACKS * 2 ? threads * CHUNK_PACKS : threads;
    const int slots = int(packs / chunk < MAX_SLOTS ? packs / chunk : MAX_SLOTS);
    if (slots * chunk > best.slots * best.chunk) best = {threads, chunk, slots};
  }
  return best;
}

int64_t ring_packs(const Ring& ring) { return int64_t(ring.slots) * ring.chunk; }

}  // namespace

// Two CTAs a multiprocessor, so that one computes while the other waits for its cluster, in clusters as small as leave a
// CTA half a share of the next row besides its own; one CTA where a row is too long for that.
Plan plan_cluster(const Call& call, const Limits& limits) {
  const int64_t num_rows = call.outer * call.inner, packs = call.num_classes * size_of(call.dtype) / 16;
  Plan plan = {};
  plan.kernel = Kernel::SPLIT;
  const int widest = limits.max_cluster < MAX_CLUSTER ? limits.max_cluster : MAX_CLUSTER;
  for (int ctas = 2; ctas >= 1 && plan.kernel == Kernel::SPLIT; --ctas) {
    const Ring ring = ring_of(limits, ctas);
    const int64_t room = ring_packs(ring);
    int cluster = 1;
    while (cluster < widest && (ceil_div(packs, cluster) * 3 > room * 2 || num_rows * cluster < limits.num_sms)) cluster *= 2;
    const int64_t share = ceil_div(packs, cluster);
    if (ring.slots < 2 || ceil_div(share, ring.chunk) > ring.slots) continue;
    const int64_t clusters = int64_t(limits.num_sms) * ctas / cluster;
    plan.kernel = Kernel::CLUSTER;
    plan.threads = ring.threads;
    plan.cluster = cluster;
    plan.loss_parts = clusters < 1 ? 1 : clusters < num_rows ? clusters : num_rows;
    plan.blocks = plan.loss_parts * cluster;
    plan.rows = ceil_div(num_rows, plan.loss_parts);
    plan.tile = share;
    plan.elements = ring.chunk;
    plan.lanes = ring.slots;
    plan.packs = equally_aligned(call);
    plan.shared_bytes = ring_packs(ring) * 16;
  }
  return plan;
}

bool fits_cluster(const Call& call, const Limits& limits) {
  return limits.protocols & CLUSTERS && limits.max_cluster > 1 && call.dtype != FLOAT64 &&
         plan_cluster(call, limits).kernel == Kernel::CLUSTER;
}

cudaError_t widest_rows_cluster(const Limits& limits, int& cluster) {
  const int threads = MAX_THREADS < limits.max_threads ? MAX_THREADS : limits.max_threads / WARP * WARP;
  const Ring ring = ring_of(limits, 1);
  return widest_cluster(reinterpret_cast<const void*>(rows_cluster_kernel<float, false>), threads,
                        size_t(ring_packs(ring) * 16), cluster);
}

cudaError_t launch_cluster(Params& p, cudaStream_t stream) {
  return by_variant(p.call, [&](auto s, auto focal) {
    using S = typename decltype(s)::type;
    if constexpr (sizeof(S) == 8)
      return cudaErrorInvalidValue;
    else
      return launch_variant<S, decltype(focal)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
