// Rows of few classes (fits_small says how few): a batch of them in a CTA's shared memory, as they are stored.
//
// A group of lanes sweeps a row, and one thread has its scalar mathematics: thread i that of the batch's row i, so that a
// warp does those of 32 rows at once. Logits are read once and the gradient, which takes their place in shared memory, is
// written once, both in 16 aligned bytes. Where a thread sweeps its row alone, a batch has several rows of each thread's, so
// that enough bytes are on their way. A batch that one CTA holds is a single launch.
#include "plans.h"
#include "shared_rows.cuh"

namespace anl {
namespace gpu {
namespace {

template <class S>
constexpr int MAX_THREADS = sizeof(S) == 8 ? 256 : 512;

// A thread may have the registers that so many threads per CTA would leave it: 128 of 64K, float64 255.
template <class S>
constexpr int REGISTERS_FOR = sizeof(S) == 8 ? 256 : 512;

// Bytes of rows that a thread should have asked for, so that those of a multiprocessor's registers have 40 KB together.
template <class S>
constexpr int64_t ON_THEIR_WAY = (40 << 10) / REGISTERS_FOR<S>;

constexpr int64_t STATIC_BYTES = 1 << 10;  // of shared memory, at most, besides the plan's

// Of a multiprocessor: while some wait for their rows, others sweep.
constexpr int ENOUGH_WARPS = 10;

// Classes: a lane's words are then counted exactly.
constexpr int64_t MOST_OF_LANE = 2 * WordHeights<half_t>::MOST;

// What a row's thread and the lanes that sweep the row tell each other.
template <class T, bool FULL>
struct alignas(16) Record {
  int begin;  // of the row, as an element of the batch
  bool unread, plain;
  union {
    AnchoredSums<T, FULL> first_sums;
    SecondSums<Scalar<T>, FULL> second_sums;
  };
  union {
    RowSweep<T, FULL> sweep;
    RowGradient<T, FULL> gradient;
  };
};

// Rows of the call that are in shared memory together. A warp brings and takes away those that it sweeps.
template <class S>
struct Batch {
  using T = acc_t<S>;
  struct Target {
    int64_t label;
    Label kind;
    ANL_DEVICE bool live() const { return kind == Label::LIVE; }
  };
  const Params& p;
  S* staged;
  int64_t first;
  int rows, bits, rounds, K;

  // The row whose mathematics the thread has in its round j, and the one that it sweeps then, its group's.
  ANL_DEVICE int own(int j) const { return int(threadIdx.x) / WARP * WARP * rounds + j * WARP + int(lane_index()); }
  ANL_DEVICE int swept(int j) const { return own(j) >> bits; }
  ANL_DEVICE int lane() const { return int(threadIdx.x) & ((1 << bits) - 1); }

  ANL_DEVICE Target target(int i) const {
    const int64_t label = i < rows ? label_at(p.call, first + i) : p.call.ignore_index;
    return {label, label_kind(p.call, label)};
  }

  // Contiguous rows: the first one's offset, and where it stands.
  ANL_DEVICE int64_t at() const { return first * K; }
  ANL_DEVICE int shift() const { return misaligned(static_cast<const S*>(p.call.logits) + unsigned(at()) % PACK<S>); }

  ANL_DEVICE const S* logits(int i) const {
    return static_cast<const S*>(p.call.logits) + row_offset(p.call, p.call.logits_strides, first + i);
  }
  // Where row i stands.
  ANL_DEVICE int place(int i) const {
    return i * p.plan.small.pitch + (p.plan.small.contiguous ? shift() : misaligned(logits(i)));
  }

  // Contiguous rows: those of the warp.
  ANL_DEVICE void load_rows() const {
    const int i = warp_row() * K;
    const S* const from = static_cast<const S*>(p.call.logits) + at() + i;
    copy_in(staged + shift() + i, from, warp_rows() * K, int(lane_index()), WARP);
  }
  ANL_DEVICE void store_rows() const {
    const int i = warp_row() * K;
    copy_out(static_cast<S*>(p.call.grad) + at() + i, staged + shift() + i, warp_rows() * K, int(lane_index()), WARP);
  }

  // Row i, by its group, from or to where it stands. Zeros stand for rows that are not to be read.
  ANL_DEVICE void load_row(int i, int stands, bool unread) const {
    if (i >= rows) return;
    if (!unread)
      copy_in(staged + stands, logits(i), K, lane(), 1 << bits);
    else
      for (int k = lane(); k < K; k += 1 << bits) staged[stands + k] = narrow<S>(T(0));
  }
  ANL_DEVICE void store_row(int i, int stands) const {
    if (i >= rows) return;
    S* const to = static_cast<S*>(p.call.grad) + row_offset(p.call, p.call.grad_strides, first + i);
    const S* const from = staged + stands;
    if (misaligned(to) == misaligned(from))
      copy_out(to, from, K, lane(), 1 << bits);
    else
      gather_out(to, from, K, lane(), 1 << bits);
  }

 private:
  ANL_DEVICE int warp_row() const { return int(threadIdx.x / WARP) * per_warp(); }
  ANL_DEVICE int warp_rows() const { return max(0, min(rows - warp_row(), per_warp())); }
  ANL_DEVICE int per_warp() const { return (WARP >> bits) * rounds; }
};

template <class S, int BYTES, bool FULL>
__global__ void __launch_bounds__((REGISTERS_FOR<S>), 1) rows_small_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  const Call& call = p.call;
  const int K = int(call.num_classes), bits = p.plan.small.lane_bits, rounds = p.plan.small.rounds, t = int(threadIdx.x);
  const int rows = int(blockDim.x) >> bits, g = t >> bits;  // thread t has the mathematics of row t, and sweeps row g
  const bool spread = bits > 0;                             // else these are one row, and as many as there are rounds
  ANL_SHARED(unsigned char, memory);
  ANL_STATIC_SHARED(unsigned[WARP], votes);
  auto* records = reinterpret_cast<Record<T, FULL>*>(memory);
  S* const staged = reinterpret_cast<S*>(memory + (spread ? rows * sizeof(Record<T, FULL>) : 0));
  const auto sync = [&] { spread ? __syncthreads() : __syncwarp(); };
  ANL_STATIC_SHARED(double[2], mean);  // the loss's denominator, and 1 / that: registers are few
  const double denominator = loss_denominator<T>(p);
  if (t == 0) {
    mean[0] = denominator;
    mean[1] = inverse(denominator);
  }
  __syncthreads();
  double total = 0.0;
  const int64_t begin = blockIdx.x * p.plan.small.rows_per_cta;
  const int count = int(min(p.num_rows - begin, p.plan.small.rows_per_cta));
#pragma unroll 1
  for (int i = 0; i < count; i += rows * rounds) {
    const Batch<S> batch = {p, staged, begin + i, min(rows * rounds, count - i), bits, rounds, K};
    typename Batch<S>::Target target;
    unsigned unread = 0;  // bit j: the row that the thread sweeps in round j is not to be read
#pragma unroll 1
    for (int j = 0; j < rounds; ++j) {
      target = batch.target(batch.own(j));
      unread |= unsigned(!target.live() && batch.own(j) < batch.rows) << j;
    }
    int swept;  // where the row stands that the thread sweeps
    if (spread) {
      if (t < rows) {
        records[t].begin = batch.place(t);
        records[t].unread = unread;
      }
      __syncthreads();
      swept = records[g].begin;
      unread = records[g].unread;
    }
    __syncwarp();  // the rows before these are done with
    if (p.plan.small.contiguous && __all_sync(ALL_LANES, !unread)) {
      batch.load_rows();
    } else {
#pragma unroll 1
      for (int j = 0; j < rounds; ++j) {
        const int row = batch.swept(j);
        batch.load_row(row, spread ? swept : batch.place(row), unread >> j & 1);
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
    sync();

#pragma unroll 1
    for (int j = 0; j < rounds; ++j) {
      if (rounds > 1) target = batch.target(batch.own(j));
      const Label kind = target.kind;
      const bool live = target.live(), exists = batch.own(j) < batch.rows;
      const int64_t r = batch.first + batch.own(j);
      const int y = live ? int(target.label) : 0;
      const int own = batch.place(batch.own(j));  // of rows that do not exist as well: no other warp writes there
      if (!spread) swept = own;
      // A row that begins within a unit begins with its displaced class, any other ends with it.
      const auto inside = [](int at) { return at * sizeof(S) % BYTES != 0; };
      S* const at_y = staged + own + y;
      S* const displaced = staged + own + (inside(own) ? 0 : K - 1);
      T z_y = T(0);
      if (live) {
        z_y = widen(*at_y);
        *at_y = *displaced;
      }
      sync();
      const Share<S, BYTES, FULL> share(staged, swept + inside(swept), K - 1, bits);
      auto first_sums = share.first_sums();
      if (spread) {
        if (share.lane() == 0) records[g].first_sums = first_sums;
        __syncthreads();
        if (exists) first_sums = records[t].first_sums;
      }

      Row<T> row;
      row.second = false;
      if (live) row.set_first_sums(call.program, first_sums, z_y);
      if (needs_second(call.program) && (spread ? block_any(row.second, votes) : __any_sync(ALL_LANES, row.second))) {
        RowSweep<T, FULL> sweep = row.template sweep<FULL>(call.program);
        if (spread) {
          if (t < rows) records[t].sweep = sweep;
          __syncthreads();
          sweep = records[g].sweep;
        }
        auto second_sums = share.second_sums(sweep);
        if (spread) {
          if (share.lane() == 0) records[g].second_sums = second_sums;
          __syncthreads();
          if (exists) second_sums = records[t].second_sums;
        }
        if (row.second) row.set_second_sums(call.program, second_sums);
      }
      RowGradient<T, FULL> gradient;
      if (exists) total += double(finish_any_row<T, FULL>(p, r, y, kind, row, mean[1], true, gradient));
      if (!call.grad) continue;

      const T at_target = gradient.row.target;
      bool plain = !live;  // whether all classes are there and above the clamp
      if (live && first_sums.sums.of[COUNT] == T(K - 1) && gradient.all_above(first_sums.min)) {
        gradient.row = gradient.row.all_above();
        plain = true;
      }
      if (spread) {
        if (exists) records[t].gradient = gradient;
        if (t < rows) records[t].plain = plain;
        __syncthreads();
        gradient = records[g].gradient;
        plain = records[g].plain;
      }
      const auto write = [&](auto parts) {
        if (batch.swept(j) < batch.rows) share.template write<decltype(parts)::value>(gradient);
      };
      if (!FULL && __all_sync(ALL_LANES, plain || batch.swept(j) >= batch.rows))
        write(Parts<0>());
      else
        by_parts<FULL>(call.program, write);
      sync();
      if (exists) *displaced = live ? *at_y : narrow<S>(at_target);
      if (live) *at_y = narrow<S>(at_target);
      sync();
    }
    if (!call.grad) continue;
    if (p.plan.small.contiguous_grad) {
      batch.store_rows();
    } else {
#pragma unroll 1
      for (int j = 0; j < rounds; ++j) {
        const int row = batch.swept(j);
        batch.store_row(row, spread ? swept : batch.place(row));
      }
    }
  }
  if (!p.loss) return;
  ANL_STATIC_SHARED(double[WARP], losses);
  finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), losses), mean[0]);
}

template <class S, int BYTES, bool FULL>
cudaError_t launch_units(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_small_kernel<S, BYTES, FULL>), grid, block, NO_CLUSTER, p.plan.shared_bytes, stream, p);
}

int64_t record_bytes(const Call& call, int lanes) {
  if (lanes == 1) return 0;
  if (call.dtype == FLOAT64) return sizeof(Record<double, true>);
  return takes_full(call) ? sizeof(Record<float, true>) : sizeof(Record<float, false>);
}

bool contiguous_rows(const Call& call, const Strides& s) {
  return (call.inner == 1 || s.si == call.num_classes) &&
         (call.outer == 1 || s.so == call.inner * call.num_classes);
}

}  // namespace

// 4096 classes where a CTA has the 64K registers that every GPU gives it: the mathematics of longer rows is little beside
// their sweeps. 8192 of half precision, but 1024 in a full kernel, as other kernels then sweep over words of two; 512 of
// float64.
bool fits_small(const Call& call, const Limits& limits) {
  const int size = int(logit_bytes(call)), half = takes_full(call) ? 64 : 8;
  return call.num_classes <= limits.registers / (size == 8 ? 128 : size == 4 ? 16 : half);
}

// As many rows at a time as there are threads, and fewer, with more lanes each, where shared memory has no room for so many
// or where the rows would be in few CTAs.
Plan plan_small(const Call& call, const Limits& limits) {
  const bool wide = call.dtype == FLOAT64;
  const int64_t N = rows_of(call), K = call.num_classes, size = logit_bytes(call), pack = pack_of(call);
  const int64_t most = wide ? 16 : 32;  // classes of a lane in a batch that is a single CTA
  const bool aligned = rows_aligned(call), all_packs = aligned && K % pack == 0 && K > pack;
  const bool much = K > limits.registers / 128;  // beside the edges, which are taken class by class
  const bool in_packs = !takes_full(call) && (all_packs || much);
  SmallPlan small = {};
  small.unit_bytes = in_packs ? int(PACK_BYTES) : int(std::max<int64_t>(size, 4));
  const auto lanes_for = [&](int64_t elements) { return std::min<int64_t>(32, power_of_two(ceil_div(K, elements))); };
  const int64_t single = std::min(wide ? MAX_THREADS<double> : MAX_THREADS<float>, limits.max_threads);
  const bool one_cta = N * power_of_two(ceil_div(K, most)) <= 2 * single;
  const int64_t slot_packs = ceil_div(K * size + (aligned ? 0 : PACK_BYTES - size), PACK_BYTES) | 1;
  const int64_t room = limits.shared_bytes * (one_cta ? 3 : 4) / 4;
  int64_t lanes = one_cta ? std::clamp<int64_t>(single / power_of_two(N), 1, lanes_for(8)) : 1;
  int64_t threads = one_cta ? threads_for(N * lanes, int(single), limits) : threads_for(128, 128, limits);
  // Rows of 32 bytes or a multiple meet in the same banks of shared memory, unless eight lanes read packs of each.
  const auto apart = [&] { return K * size % (2 * PACK_BYTES) || (in_packs && lanes >= 8); };
  const auto contiguous = [&] { return contiguous_rows(call, call.logits_strides) && apart(); };
  const auto bytes = [&](int64_t t) {
    const int64_t row_bytes = contiguous() ? K * size : slot_packs * PACK_BYTES;
    return ceil_div(t / lanes * (row_bytes + record_bytes(call, int(lanes))), PACK_BYTES) * PACK_BYTES + 2 * PACK_BYTES;
  };
  const auto warps = [&](int64_t t) {  // that a multiprocessor's shared memory has room for, in CTAs of t threads
    return (limits.shared_bytes + RESERVED_SHARED) / (bytes(t) + STATIC_BYTES + RESERVED_SHARED) * t / 32;
  };
  const auto few = [&](int64_t t) { return !one_cta && warps(t) < ENOUGH_WARPS; };
  const auto halved = [&](int64_t t) {
    while (t > 32 && (bytes(t) > room || (few(t) && warps(t / 2) > warps(t)))) t /= 2;
    return t;
  };
  const auto crowded = [&] { return one_cta ? bytes(threads) > room : few(halved(threads)); };
  while (lanes < 32 && (crowded() || K > MOST_OF_LANE * lanes)) lanes *= 2;
  while (!one_cta && lanes < lanes_for(4) && ceil_div(N, threads / lanes) < 2 * limits.num_sms) lanes *= 2;
  threads = halved(threads);
  const int64_t rows = threads / lanes;
  while (1 << small.lane_bits < lanes) ++small.lane_bits;
  small.contiguous = contiguous();
  small.contiguous_grad = small.contiguous && call.grad && contiguous_rows(call, call.grad_strides) && equally_aligned(call);
  small.pitch = int(small.contiguous ? K : slot_packs * pack);
  const int64_t parts = std::min<int64_t>(LOSS_PARTS, limits.num_sms * 16);
  const int64_t batches = one_cta ? 1 : std::max<int64_t>(1, N / (rows * parts));
  const int64_t wanted = wide ? ON_THEIR_WAY<double> : ON_THEIR_WAY<float>;
  small.rounds = 1;
  while (lanes == 1 && small.rounds * K * size < wanted && 2 * small.rounds <= batches &&
         8 * small.rounds * bytes(threads) <= limits.shared_bytes)
    small.rounds *= 2;
  small.rows_per_cta = one_cta ? N : batches / small.rounds * small.rounds * rows;
  Plan plan = plan_of_rows(Kernel::SMALL, call, int(threads), small.rows_per_cta);
  plan.shared_bytes = small.rounds * bytes(threads);
  plan.small = small;
  return plan;
}

cudaError_t launch_small(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    using S = typename decltype(s)::type;
    constexpr bool FULL = decltype(full)::value;
    if constexpr (!FULL)
      if (p.plan.small.unit_bytes == PACK_BYTES) return launch_units<S, PACK_BYTES, FULL>(p, stream);
    return launch_units<S, sizeof(S) == 8 ? 8 : 4, FULL>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
