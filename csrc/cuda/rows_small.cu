// Rows of few classes (K <= 1024; float64: 512): a batch of them in a CTA's shared memory, as they are stored.
//
// A group of lanes sweeps a row, and one thread has its scalar mathematics: thread i that of the batch's row i, so that a
// warp does those of 32 rows at once. Logits are read once and the gradient, which takes their place in shared memory, is
// written once, both by all threads and in 16 aligned bytes. A batch that one CTA holds is a single launch.
//
// Sums leave the target out: its place is taken by one other class, the displaced one, which stands at the row's end and is
// left out of the sweeps there. So no class has to be looked at for what it is.
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

template <class S>
constexpr int MAX_THREADS = sizeof(S) == 8 ? 256 : 512;

template <int N>
struct Units {
  static constexpr int value = N;
};

template <class S>
ANL_DEVICE int misaligned(const S* p) {  // by so many elements
  return int(reinterpret_cast<uintptr_t>(p) / sizeof(S) % PACK<S>);
}

// ---- to and from shared memory: by thread t of `threads` -----------------------------------------------------------------

// n elements to shared memory that is aligned as they are; asynchronous.
template <class S>
ANL_DEVICE void copy_in(S* to, const S* from, int n, int t, int threads) {
  constexpr int P = PACK<S>;
  const int head = min(n, (P - misaligned(from)) % P), packs = (n - head) / P;
#pragma unroll 4
  for (int q = t; q < packs; q += threads) copy_async16(to + head + q * P, from + head + q * P);
  for (int e = t; e < n - packs * P; e += threads) {
    const int k = e < head ? e : e + packs * P;
    to[k] = from[k];
  }
}

template <class S>
ANL_DEVICE void copy_out(S* to, const S* from, int n, int t, int threads) {
  constexpr int P = PACK<S>;
  const int head = min(n, (P - misaligned(to)) % P), packs = (n - head) / P;
  if (misaligned(to) == misaligned(from)) {
#pragma unroll 4
    for (int q = t; q < packs; q += threads) store16(to + head + q * P, load16(from + head + q * P));
  } else {
    for (int q = t; q < packs; q += threads) {
      acc_t<S> pack[P];
#pragma unroll
      for (int v = 0; v < P; ++v) pack[v] = widen(from[head + q * P + v]);
      store16(to + head + q * P, narrow_pack<S>(pack));
    }
  }
  for (int e = t; e < n - packs * P; e += threads) {
    const int k = e < head ? e : e + packs * P;
    to[k] = from[k];
  }
}

// ---- a row's classes, but for the displaced one ------------------------------------------------------------------------

template <class S, int BYTES>
struct alignas(BYTES) Unit {
  using T = acc_t<S>;
  static constexpr int P = BYTES / int(sizeof(S)), WORDS = BYTES / 4;
  uint32_t word[WORDS];

  ANL_DEVICE void widen(T (&x)[P]) const {
    uint32_t w[4] = {};
#pragma unroll
    for (int i = 0; i < WORDS; ++i) w[i] = word[i];
    T pack[PACK<S>];
    widen_pack<S>(make_uint4(w[0], w[1], w[2], w[3]), pack);
#pragma unroll
    for (int v = 0; v < P; ++v) x[v] = pack[v];
  }
  static ANL_DEVICE Unit narrow(const T (&x)[P]) {
    T pack[PACK<S>] = {};
#pragma unroll
    for (int v = 0; v < P; ++v) pack[v] = x[v];
    const uint4 bits = narrow_pack<S>(pack);
    const uint32_t w[4] = {bits.x, bits.y, bits.z, bits.w};
    Unit unit;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) unit.word[i] = w[i];
    return unit;
  }
};

// The largest and the smallest of a lane's classes: 16-bit numbers two at a time, else one. NaN is neither.
template <class S, bool PAIRS = sizeof(S) == 2>
struct Extremes {
  using T = acc_t<S>;
  T high = minus_inf<T>(), low = -minus_inf<T>();

  ANL_DEVICE void add(T z) {
    high = z > high ? z : high;
    low = z < low ? z : low;
  }
  template <int BYTES>
  ANL_DEVICE void add(const Unit<S, BYTES>& unit) {
    T x[Unit<S, BYTES>::P];
    unit.widen(x);
    for (const T z : x) add(z);
  }
  ANL_DEVICE Extremes whole() const { return *this; }
};
template <class S>
struct Extremes<S, true> {
  Extremes<S, false> rest;
  uint32_t high = Unit<S, 4>::narrow({rest.high, rest.high}).word[0], low = Unit<S, 4>::narrow({rest.low, rest.low}).word[0];

  ANL_DEVICE void add(float z) { rest.add(z); }
  template <int BYTES>
  ANL_DEVICE void add(const Unit<S, BYTES>& unit) {
#pragma unroll
    for (const uint32_t word : unit.word) {
      high = larger2<S>(high, word);
      low = smaller2<S>(low, word);
    }
  }
  ANL_DEVICE Extremes<S, false> whole() const {
    Extremes<S, false> all = rest;
#pragma unroll
    for (int shift = 0; shift < 32; shift += 16) {
      all.high = fmaxf(all.high, widen(S{uint16_t(high >> shift)}));
      all.low = fminf(all.low, widen(S{uint16_t(low >> shift)}));
    }
    return all;
  }
};

// What a lane has of each row: of `rounds` in which every lane of its group has a whole unit, and of one in which it has
// `left` classes.
template <class S, int BYTES>
struct Share {
  using T = acc_t<S>;
  using U = Unit<S, BYTES>;
  static constexpr int P = U::P, TILE = P > 8 ? 1 : 8 / P;

  int lane, lanes, rounds, left;

  ANL_DEVICE Share(int group, int classes) : lane(int(threadIdx.x) % group), lanes(group), rounds(classes / (group * P)) {
    left = min(P, max(0, classes - (rounds * lanes + lane) * P));
  }

  // f(Units<N>(), its first unit) for the whole rounds, g(unit) for the last.
  template <class F, class G>
  ANL_DEVICE void each(U* row, const F& f, const G& g) const {
    U* unit = row + lane;
    int n = rounds;
    for (; n >= TILE; n -= TILE, unit += TILE * lanes) f(Units<TILE>(), unit);
    for (; n > 0; --n, unit += lanes) f(Units<1>(), unit);
    if (left > 0) g(unit);
  }

  template <int N>
  ANL_DEVICE void load(const U* unit, T (&x)[N * P]) const {
    U units[N];
#pragma unroll
    for (int u = 0; u < N; ++u) units[u] = unit[u * lanes];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      T pack[P];
      units[u].widen(pack);
#pragma unroll
      for (int v = 0; v < P; ++v) x[u * P + v] = pack[v];
    }
  }

  // f(class) for those of the last round. One by one: a neighbour may be writing to what is left of the unit.
  template <class F>
  ANL_DEVICE void each_left(const U* unit, const F& f) const {
    const S* classes = reinterpret_cast<const S*>(unit);
#pragma unroll
    for (int v = 0; v < P; ++v)
      if (v < left) f(widen(classes[v]));
  }

  // By all lanes of the warp, each for its group's row.
  template <bool FULL>
  ANL_DEVICE AnchoredSums<T, FULL> first_sums(U* row) const {
    Extremes<S> found;
    each(row, [&](auto n, const U* unit) {
      U units[decltype(n)::value];
#pragma unroll
      for (int u = 0; u < decltype(n)::value; ++u) units[u] = unit[u * lanes];
#pragma unroll
      for (const U& one : units) found.add(one);
    }, [&](const U* unit) { each_left(unit, [&](T z) { found.add(z); }); });
    Extremes<S, false> extremes = found.whole();
    for (int offset = 1; offset < lanes; offset *= 2) {
      extremes.add(shuffle_xor(extremes.high, offset));
      extremes.add(shuffle_xor(extremes.low, offset));
    }
    auto s = none<AnchoredSums<T, FULL>>();
    s.max = extremes.high;
    const T anchor = s.anchor();
    each(row, [&](auto n, const U* unit) {
      T x[decltype(n)::value * P];
      load<decltype(n)::value>(unit, x);
      s.add_all(x, extremes.low, anchor);
    }, [&](const U* unit) { each_left(unit, [&](T z) { s.add(z, anchor); }); });
    for (int offset = 1; offset < lanes; offset *= 2) {  // of two lanes' numbers, both have the same sum
      AnchoredSums<T, FULL> other = s;
      other.min = shuffle_xor(s.min, offset);
      other.sums = shuffle_xor(s.sums, offset);
      s.add(other);
    }
    return s;
  }

  template <bool FULL>
  ANL_DEVICE SecondSums<Scalar<T>, FULL> second_sums(const RowSweep<T>& sweep, U* row) const {
    auto s = none<SecondSums<Scalar<T>, FULL>>();
    sweep.run(s, [&](const auto& add) {
      each(row, [&](auto n, const U* unit) {
        T x[decltype(n)::value * P];
        load<decltype(n)::value>(unit, x);
#pragma unroll
        for (const T z : x) add(z);
      }, [&](const U* unit) { each_left(unit, add); });
    });
    for (int offset = 1; offset < lanes; offset *= 2) s.add(shuffle_xor(s, offset));
    return s;
  }

  template <unsigned PARTS>
  ANL_DEVICE void write(const RowGradient<T>& gradient, U* row) const {
    each(row, [&](auto n, U* unit) {
      constexpr int N = decltype(n)::value;
      T x[N * P];
      load<N>(unit, x);
#pragma unroll
      for (T& z : x) z = gradient.template at<PARTS>(z);
#pragma unroll
      for (int u = 0; u < N; ++u) {
        T pack[P];
#pragma unroll
        for (int v = 0; v < P; ++v) pack[v] = x[u * P + v];
        unit[u * lanes] = U::narrow(pack);
      }
    }, [&](U* unit) {
      S* classes = reinterpret_cast<S*>(unit);
      each_left(unit, [&](T z) { *classes++ = narrow<S>(gradient.template at<PARTS>(z)); });
    });
  }
};

// What a row's thread and the lanes that sweep the row tell each other.
template <class T, bool FULL>
struct alignas(16) Record {
  int begin;  // of the row, as an element of the batch
  bool live, second, plain;
  union {
    AnchoredSums<T, FULL> first_sums;
    SecondSums<Scalar<T>, FULL> second_sums;
  };
  union {
    RowSweep<T> sweep;
    RowGradient<T> gradient;
  };
};

// The rows of a CTA that are in shared memory together: thread t has row t, the group g of lanes sweeps row g.
template <class S>
struct Batch {
  using T = acc_t<S>;
  const Params& p;
  int64_t first;
  int rows, t, g, lane;

  ANL_DEVICE const S* logits(int i) const {
    return static_cast<const S*>(p.call.logits) + row_offset(p.call, p.call.logits_strides, first + i);
  }
  ANL_DEVICE S* grad(int i) const {
    return static_cast<S*>(p.call.grad) + row_offset(p.call, p.call.grad_strides, first + i);
  }
  // Where row i stands in shared memory.
  ANL_DEVICE int place(int i) const {
    return i * p.plan.small.pitch + misaligned(logits(p.plan.small.contiguous ? 0 : i));
  }

  // swept: the place of row g; live: whether it is to be read. Zeros stand for rows that are not.
  ANL_DEVICE void load(S* staged, int swept, bool live, bool all_live) const {
    const int K = int(p.call.num_classes), lanes = p.plan.small.lanes;
    if (p.plan.small.contiguous && all_live) {
      copy_in(staged + misaligned(logits(0)), logits(0), rows * K, t, int(blockDim.x));
    } else if (live) {
      copy_in(staged + swept, logits(g), K, lane, lanes);
    } else if (g < rows) {
      for (int k = lane; k < K; k += lanes) staged[swept + k] = narrow<S>(T(0));
    }
    copy_async_commit();
    copy_async_wait<0>();
  }
  ANL_DEVICE void store(const S* staged, int swept) const {
    const int K = int(p.call.num_classes), lanes = p.plan.small.lanes;
    if (p.plan.small.contiguous_grad)
      copy_out(grad(0), staged + misaligned(logits(0)), rows * K, t, int(blockDim.x));
    else if (g < rows)
      copy_out(grad(g), staged + swept, K, lane, lanes);
  }
};

template <class S, int BYTES, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) rows_small_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  using U = Unit<S, BYTES>;
  const Call& call = p.call;
  const int K = int(call.num_classes), t = int(threadIdx.x), lanes = p.plan.small.lanes;
  const int rows = int(blockDim.x) / lanes, g = t / lanes;
  const bool spread = lanes > 1;  // else thread t sweeps row t itself
  ANL_SHARED(unsigned char, memory);
  ANL_STATIC_SHARED(unsigned[2 * WARP], votes);
  auto* records = reinterpret_cast<Record<T, FULL>*>(memory);
  S* const staged = reinterpret_cast<S*>(memory + (spread ? rows * sizeof(Record<T, true>) : 0));
  const Share<S, BYTES> share(lanes, K - 1);
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  const int64_t begin = blockIdx.x * p.plan.small.rows_per_cta, end = min(p.num_rows, begin + p.plan.small.rows_per_cta);
  for (int64_t first = begin; first < end; first += rows) {
    const Batch<S> batch = {p, first, int(min(int64_t(rows), end - first)), t, g, share.lane};
    const bool exists = t < batch.rows, sweeps = g < batch.rows;
    const int64_t r = first + t, y = exists ? label_at(call, r) : call.ignore_index;
    const Label kind = label_kind(call, y);
    const bool live = kind == Label::LIVE;
    const int place = exists ? batch.place(t) : 0;
    if (spread && t < rows) {
      records[t].begin = place;
      records[t].live = live;
    }
    const bool all_live = !block_any(exists && !live, votes);
    const int swept = spread ? records[g].begin : place;
    batch.load(staged, swept, spread ? records[g].live : live, all_live);
    __syncthreads();

    // A row that begins within a unit begins with its displaced class, any other ends with it.
    const auto odd = [](int at) { return int(at * sizeof(S) % BYTES / sizeof(S)); };
    S* const row_y = staged + place + (live ? int(y) : 0);
    S* const displaced = staged + place + (odd(place) ? 0 : K - 1);
    T z_y = T(0);
    if (live) {
      z_y = widen(*row_y);
      *row_y = *displaced;
    }
    if (spread) __syncthreads();
    U* const units = reinterpret_cast<U*>(staged + swept + odd(swept));
    auto first_sums = share.template first_sums<FULL>(units);
    if (spread) {
      if (share.lane == 0) records[g].first_sums = first_sums;
      __syncthreads();
      if (exists) first_sums = records[t].first_sums;
    }

    Row<T> row;
    row.second = false;
    if (live) row.set_first_sums(call.program, first_sums, z_y);
    if (needs_second(call.program) && (spread ? block_any(row.second, votes + WARP) : __any_sync(ALL_LANES, row.second))) {
      RowSweep<T> sweep = row.sweep(call.program);
      if (spread) {
        if (t < rows) records[t].sweep = sweep;
        __syncthreads();
        sweep = records[g].sweep;
      }
      auto second_sums = share.template second_sums<FULL>(sweep, units);
      if (spread) {
        if (share.lane == 0) records[g].second_sums = second_sums;
        __syncthreads();
        if (exists) second_sums = records[t].second_sums;
      }
      if (row.second) row.set_second_sums(call.program, second_sums);
    }
    RowGradient<T> gradient;
    bool plain = !live;  // whether all classes are alike: there, and above the clamp
    if (exists) total += double(finish_any_row<T, FULL>(p, r, y, kind, row, denominator, true, gradient));
    if (!call.grad) continue;

    const T target = gradient.row.target;
    if (live && first_sums.sums.of[COUNT] == T(K - 1) && first_sums.min - row.max > gradient.row.threshold) {
      gradient.row = gradient.row.all_above();
      plain = true;
    }
    if (spread) {
      if (exists) {
        records[t].gradient = gradient;
        records[t].plain = plain;
      }
      __syncthreads();
      gradient = records[g].gradient;
      plain = records[g].plain;
    }
    const auto write = [&](auto parts) {
      if (sweeps) share.template write<decltype(parts)::value>(gradient, units);
    };
    if (!FULL && __all_sync(ALL_LANES, plain || !sweeps))
      write(Parts<0>());
    else
      by_parts<FULL>(call.program, write);
    if (spread) __syncthreads();
    if (exists) *displaced = live ? *row_y : narrow<S>(target);
    if (live) *row_y = narrow<S>(target);
    __syncthreads();
    batch.store(staged, swept);
  }
  if (!p.loss) return;
  ANL_STATIC_SHARED(double[WARP], losses);
  finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), losses), denominator);
}

template <class S, int BYTES, bool FULL>
cudaError_t launch_units(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_small_kernel<S, BYTES, FULL>), grid, block, NO_CLUSTER, p.plan.shared_bytes, stream, p);
}

int64_t record_bytes(const Call& call, int lanes) {
  if (lanes == 1) return 0;
  return call.dtype == FLOAT64 ? sizeof(Record<double, true>) : sizeof(Record<float, true>);
}

bool contiguous_rows(const Call& call, const Strides& s) {
  return (call.inner == 1 || s.si == call.num_classes) &&
         (call.outer == 1 || s.so == call.inner * call.num_classes);
}

}  // namespace

// 1024 classes, float64 512, where a CTA has the 64K registers that every GPU gives it.
bool fits_small(const Call& call, const Limits& limits) {
  return call.num_classes <= limits.registers / (call.dtype == FLOAT64 ? 128 : 64);
}

// As many rows at a time as there are threads, and fewer, with more lanes each, where shared memory has no room for so many
// or where the rows would be in few CTAs.
Plan plan_small(const Call& call, const Limits& limits) {
  const bool wide = call.dtype == FLOAT64;
  const int64_t N = rows_of(call), K = call.num_classes, size = logit_bytes(call), pack = pack_of(call);
  const int64_t most = wide ? 16 : 32;  // classes of a lane in a batch that is a single CTA
  const bool aligned = rows_aligned(call), in_packs = aligned && !wide && K >= 2 * pack;
  SmallPlan small = {};
  small.unit_bytes = in_packs ? int(PACK_BYTES) : int(std::max<int64_t>(size, 4));
  const auto lanes_for = [&](int64_t elements) { return std::min<int64_t>(32, power_of_two(ceil_div(K, elements))); };
  const int64_t single = std::min(wide ? MAX_THREADS<double> : MAX_THREADS<float>, limits.max_threads);
  const bool one_cta = N * lanes_for(most) <= 2 * single;
  const int64_t slot_packs = ceil_div(K * size + (aligned ? 0 : PACK_BYTES - size), PACK_BYTES) | 1;
  const int64_t row_bytes = slot_packs * PACK_BYTES;
  int64_t lanes = one_cta ? std::clamp<int64_t>(single / power_of_two(N), 1, lanes_for(8)) : 1;
  int64_t threads = one_cta ? threads_for(N * lanes, int(single), limits) : threads_for(128, 128, limits);
  const auto bytes = [&] { return threads / lanes * (row_bytes + record_bytes(call, int(lanes))) + 2 * PACK_BYTES; };
  const int64_t room = one_cta ? limits.shared_bytes * 3 / 4 : std::min<int64_t>(limits.shared_bytes / 2, 40 << 10);
  while (lanes < 32 && bytes() > room) lanes *= 2;
  while (!one_cta && lanes < lanes_for(4) && ceil_div(N, threads / lanes) < 2 * limits.num_sms) lanes *= 2;
  while (threads > 32 && bytes() > room) threads /= 2;
  const int64_t rows = threads / lanes;
  small.lanes = int(lanes);
  // Rows of packs whose number is even meet in the same banks of shared memory, unless eight lanes read each.
  small.contiguous = contiguous_rows(call, call.logits_strides) && (!in_packs || lanes >= 8 || K * size / PACK_BYTES % 2);
  small.contiguous_grad = small.contiguous && call.grad && contiguous_rows(call, call.grad_strides) && equally_aligned(call);
  small.pitch = int(small.contiguous ? K : slot_packs * pack);
  small.rows_per_cta = one_cta ? N : rows * std::max<int64_t>(1, N / (rows * limits.num_sms * 16));
  Plan plan = plan_of_rows(Kernel::SMALL, call, int(threads), small.rows_per_cta);
  plan.shared_bytes = bytes();
  plan.small = small;
  return plan;
}

cudaError_t launch_small(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    using S = typename decltype(s)::type;
    constexpr bool FULL = decltype(full)::value;
    if constexpr (sizeof(S) < 8)
      if (p.plan.small.unit_bytes == 4) return launch_units<S, 4, FULL>(p, stream);
    return launch_units<S, sizeof(S) == 8 ? 8 : 16, FULL>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
