// The gradient from the rows' coefficients: logits read once (with the entropy term three times), gradient written once.
//
// What lies between two 16-byte boundaries of a row is read and written in packs, several at a time; the few classes before
// and after, its edges, one by one. A row whose gradient is aligned in another way than its logits has edges alone.
#include "entropy.cuh"
#include "long_rows.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 512, THREADS = 128;
constexpr int CTAS = 5;  // of THREADS that a multiprocessor should hold, for enough bytes to be under way

// Packs that a thread reads before it writes them.
template <class S>
constexpr int PACKS_AT_ONCE = sizeof(S) == 8 ? 2 : 4;

// A row and all that its gradient depends on, as the one thread that looks at its coefficients finds it.
template <class S, bool FULL>
struct OneRow {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;

  RowGradient<T, FULL> gradient;
  int64_t logits, grad;    // where it begins
  int head, packs, edges;  // classes before the first pack, packs, classes that are in none
  int y;                   // the target's class, or -1
  bool unread;             // every logit stands for 0

  ANL_DEVICE void set(const Params& p, int64_t r, const KnownRow<T, FULL>& known) {
    const Call& call = p.call;
    const int K = int(call.num_classes);
    gradient = known.gradient;
    logits = row_offset(call, call.logits_strides, r);
    grad = row_offset(call, call.grad_strides, r);
    head = int(-(reinterpret_cast<uintptr_t>(call.logits) / sizeof(S) + logits) % P);
    packs = p.plan.gradient.packs && head < K ? (K - head) / P : 0;
    if (packs == 0) head = K;
    edges = K - packs * P;
    y = int(known.label);
    unread = known.unread;
  }

  ANL_DEVICE const S* in(const Call& call) const { return static_cast<const S*>(call.logits) + logits; }
  ANL_DEVICE S* out(const Call& call) const { return static_cast<S*>(call.grad) + grad; }

  // The packs [begin, end) by `takers` threads of which this is number `taker`, U of each at a time: f(bits, i) puts the
  // gradient of the packs i, i + takers, ... in the place of their logits.
  template <int U, class F>
  ANL_DEVICE void write_packs(const Call& call, int begin, int end, int taker, int takers, const F& f) const {
    const S* from = in(call) + head + int64_t(begin + taker) * P;
    S* to = out(call) + head + int64_t(begin + taker) * P;
    const int64_t step = int64_t(takers) * P;
    for (int i = begin + taker; i - taker < end; i += U * takers) {  // the takers stay together
      uint4 bits[U] = {};
#pragma unroll
      for (int u = 0; u < U; ++u, from += step)
        if (i + u * takers < end && !unread) bits[u] = load16(from);
      if constexpr (FULL) {  // one by one: less to compile
#pragma unroll 1
        for (int j = i; j < end && j < i + U * takers; j += takers, to += step) {
          uint4 pack[1] = {bits[0]};
          f(pack, j);
          store16(to, pack[0]);
#pragma unroll
          for (int u = 1; u < U; ++u) bits[u - 1] = bits[u];  // as registers have no index
        }
      } else {
        f(bits, i);
#pragma unroll
        for (int u = 0; u < U; ++u, to += step)
          if (i + u * takers < end) store16(to, bits[u]);
      }
    }
  }

  // The edges [begin, end) likewise, U of a thread at a time: f(z, k) is the gradient of class k.
  template <int U, class F>
  ANL_DEVICE void write_edges(const Call& call, int begin, int end, int taker, int takers, const F& f) const {
    for (int i = begin + taker; i < end; i += U * takers) {
      int k[U];
      S z[U] = {};
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int e = i + u * takers;
        k[u] = e < end ? e < head ? e : e + packs * P : -1;
        if (k[u] >= 0 && !unread) z[u] = in(call)[k[u]];
      }
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (k[u] >= 0) out(call)[k[u]] = narrow<S>(f(widen(z[u]), k[u]));
    }
  }

  // After those packs and edges, the target's, by the thread that wrote there. takers: a power of two.
  ANL_DEVICE void write_target(const Call& call, int begin, int end, int begin_edge, int end_edge, int taker,
                               int takers) const {
    const int inside = y - head, i = inside < 0 ? y : inside < packs * P ? inside / P : y - packs * P;
    const bool in_pack = inside >= 0 && inside < packs * P;
    const int from = in_pack ? begin : begin_edge, to = in_pack ? end : end_edge;
    if (y >= 0 && i >= from && i < to && ((i - from) & (takers - 1)) == taker)
      out(call)[y] = narrow<S>(gradient.row.target);
  }
};

// The smallest of several packs' logits.
template <class S, int U>
ANL_DEVICE acc_t<S> lowest(const uint4 (&bits)[U]) {
  using T = acc_t<S>;
  if constexpr (sizeof(S) == 2) {
    uint32_t low = bits[0].x;
#pragma unroll
    for (const uint4& pack : bits)
      low = smaller2<S>(low, smaller2<S>(smaller2<S>(pack.x, pack.y), smaller2<S>(pack.z, pack.w)));
    return smaller(widen(S{uint16_t(low)}), widen(S{uint16_t(low >> 16)}));
  } else {
    T low = T(INF);
#pragma unroll
    for (const uint4& pack : bits) {
      T x[PACK<S>];
      widen_pack<S>(pack, x);
#pragma unroll
      for (const T v : x) low = smaller(low, v);
    }
    return low;
  }
}

// The gradient of several packs' logits in their place; `together`: the lanes that do so. Most often all classes are
// above the clamp, or they exist and the clamp changes what is added alone.
template <class S, unsigned PARTS, bool FULL, int U>
ANL_DEVICE void differentiate(const RowGradient<acc_t<S>, FULL>& gradient, unsigned together, uint4 (&bits)[U]) {
  const auto each = [&](auto parts, const RowGradient<acc_t<S>, FULL>& row) {
#pragma unroll
    for (uint4& pack : bits) {
      acc_t<S> x[PACK<S>];
      // Or the compiler widens every pack ahead of all branches, and spills.
      if constexpr (sizeof(S) == 2) pack = {kept(pack.x), kept(pack.y), kept(pack.z), kept(pack.w)};
      widen_pack<S>(pack, x);
      constexpr unsigned ASKED = decltype(parts)::value;
      // Not replace(): it would spill a register on sm_100.
      each_of<bool(ASKED & FOCAL_OFFSET)>(x, [&](auto& v) { v = row.template at<ASKED>(v); });
      pack = narrow_pack<S>(x);
    }
  };
  if constexpr (PARTS == LEAN_PARTS) {
    const acc_t<S> low = lowest<S>(bits);
    if (__all_sync(together, gradient.all_above(low))) return each(Parts<0>(), gradient.all_above());
    if (__all_sync(together, low > minus_inf<acc_t<S>>()) && gradient.row.slope == gradient.row.slope_above)
      return each(Parts<CLAMPED_OFFSET>(), gradient);
  }
  each(Parts<PARTS>(), gradient);
}

// A warp takes a part of several rows, one at a time, or some of its lanes each.
template <class S, bool FULL, bool WARP_PER_ROW>
__global__ void __launch_bounds__(THREADS, sizeof(S) == 8 ? 4 : CTAS)
    rows_gradient_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  using Row = OneRow<S, FULL>;
  // Short rows are two to a lane: most of what is read are their coefficients.
  constexpr bool TWO = !WARP_PER_ROW && sizeof(S) < 8;
  ANL_STATIC_SHARED(Row[THREADS], rows);
  ANL_STATIC_SHARED(GivenRow<T>[TWO ? THREADS : 1], waiting);
  const GradientPlan& plan = p.plan.gradient;
  const int lane = int(lane_index()), lanes = WARP_PER_ROW ? WARP : plan.lanes, taker = lane % lanes;
  const unsigned unit = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, group = unit / unsigned(plan.parts_per_row);
  const int64_t first = int64_t(group) * plan.rows_per_warp, left = p.num_rows - first;
  if (left <= 0) return;
  const int count = left < plan.rows_per_warp ? int(left) : plan.rows_per_warp;
  const int part = int(unit - group * unsigned(plan.parts_per_row)) * plan.classes_per_part;
  const int end_class = part + plan.classes_per_part, begin = part / PACK<S>, end_pack = end_class / PACK<S>;
  const unsigned together = (ALL_LANES >> (WARP - lanes)) << (lane - taker);
  Row* own = rows + (threadIdx.x - lane);
  GivenRow<T> given;
  if (lane < count) given = GivenRow<T>(p, first + lane);
  if constexpr (TWO) {
    if (WARP + lane < count) waiting[threadIdx.x] = GivenRow<T>(p, first + WARP + lane);
  }
  for (int begin_row = 0;;) {
    const int rows_now = count - begin_row < WARP ? count - begin_row : WARP;
    if (lane < rows_now) own[lane].set(p, first + begin_row + lane, KnownRow<T, FULL>(p.call, given));
    __syncwarp();
    for (int j = lane / lanes; j < rows_now; j += WARP_PER_ROW ? 1 : plan.rows_at_once) {
      const Row row = own[j];
      const int end = end_pack < row.packs ? end_pack : row.packs;
      const int end_edge = end_class < row.edges ? end_class : row.edges;
      by_parts<FULL>(p.call.program, [&](auto parts) {
        constexpr unsigned PARTS = decltype(parts)::value;
        const auto in_place = [&](auto& bits, int) { differentiate<S, PARTS>(row.gradient, together, bits); };
        row.template write_packs<PACKS_AT_ONCE<S>>(p.call, begin, end, taker, lanes, in_place);
        row.template write_edges<FULL ? 1 : 2>(p.call, part, end_edge, taker, lanes,
                                               [&](T z, int) { return row.gradient.template at<PARTS>(z); });
      });
      __syncwarp(together);  // keeps the target's store behind the other there, in the compiler as well
      row.write_target(p.call, begin, end, part, end_edge, taker, lanes);
    }
    begin_row += WARP;
    if (!TWO || begin_row >= count) return;
    given = waiting[threadIdx.x];
    __syncwarp();
  }
}

// The whole row's sums, by the CTA; a few dozen classes per thread in T, then on in double.
template <class S>
ANL_DEVICE EntropySums<double> entropy_sums(const Params& p, const S* logits, const EntropyRow<acc_t<S>>& entropy,
                                            EntropySums<double>* shared) {
  using T = acc_t<S>;
  constexpr int RUN = 64;
  const T* log_q = static_cast<const T*>(p.call.log_q);
  const int K = int(p.call.num_classes), step = int(blockDim.x);
  EntropySums<double> sums = {0.0, 0.0};
  for (int begin = int(threadIdx.x); begin < K; begin += step * RUN) {
    const int end = K - begin > step * RUN ? begin + step * RUN : K;
    EntropySums<T> part = {T(0), T(0)};
    for (int k = begin; k < end; k += step) entropy.add(part, widen(logits[k]), log_q[k]);
    sums = MergeEntropy<double>()(sums, {double(part.mass), double(part.moment)});
  }
  return block_reduce(sums, MergeEntropy<double>(), shared);
}

// A CTA takes a row.
template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS, 1) rows_gradient_entropy_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  constexpr int P = PACK<S>;
  ANL_STATIC_SHARED(EntropySums<double>[2 * WARP], shared);
  const int64_t r = blockIdx.x;
  const KnownRow<T, FULL> known(p.call, GivenRow<T>(p, r));
  OneRow<S, FULL> row;
  row.set(p, r, known);
  const T* log_q = static_cast<const T*>(p.call.log_q);
  auto entropy = EntropyRow<T>::begin(row.gradient.max, known.inv_sum, *static_cast<const T*>(p.call.entropy_scale));
  if (!row.unread) {
    entropy.set_center(entropy_sums(p, row.in(p.call), entropy, shared));
    entropy.set_lost(entropy_sums(p, row.in(p.call), entropy, shared + WARP));
  }
  __syncthreads();  // in place, the gradient overwrites what other threads' sums read
  const int taker = int(threadIdx.x), takers = int(blockDim.x);
  by_parts<FULL>(p.call.program, [&](auto parts) {
    const auto value = [&](T z, int k) {
      const T own = k == row.y ? row.gradient.row.target : row.gradient.template at<decltype(parts)::value>(z);
      return row.unread ? own : own + entropy.at(z, log_q[k]);
    };
    row.template write_packs<1>(p.call, 0, row.packs, taker, takers, [&](auto& bits, int i) {
      if (i >= row.packs) return;
      T x[P];
      widen_pack<S>(bits[0], x);
#pragma unroll
      for (int v = 0; v < P; ++v) x[v] = value(x[v], row.head + i * P + v);
      bits[0] = narrow_pack<S>(x);
    });
    row.template write_edges<1>(p.call, 0, row.edges, taker, takers, value);
  });
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  if (p.call.log_q)
    return ANL_LAUNCH((rows_gradient_entropy_kernel<S, FULL>), grid, block, NO_CLUSTER, 0, stream, p);
  if (p.plan.gradient.lanes == WARP)
    return ANL_LAUNCH((rows_gradient_kernel<S, FULL, true>), grid, block, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((rows_gradient_kernel<S, FULL, false>), grid, block, NO_CLUSTER, 0, stream, p);
}

}  // namespace

Plan plan_gradient(const Call& call, const Limits& limits) {
  constexpr int64_t LEAST = 1 << 10, MOST = 16 << 10;  // classes that a warp takes
  const int64_t N = rows_of(call), K = call.num_classes, pack = pack_of(call);
  GradientPlan gradient = {};
  gradient.packs = equally_aligned(call) && (call.log_q || K >= 4 * pack);
  gradient.lanes = int(std::min<int64_t>(WARP, power_of_two(ceil_div(K, gradient.packs ? 4 * pack : 4))));
  const int64_t at_once = int64_t(limits.num_sms) * CTAS * THREADS / WARP;  // warps
  const int64_t classes = std::max(LEAST, std::min(MOST, power_of_two(ceil_div(N * K, at_once))));
  gradient.classes_per_part = int(std::min(classes, power_of_two(K)));
  gradient.parts_per_row = int(ceil_div(K, gradient.classes_per_part));
  gradient.rows_at_once = WARP / gradient.lanes;
  const int64_t most = pack == 2 || gradient.lanes == WARP ? WARP : 2 * WARP;
  gradient.rows_per_warp = int(std::min<int64_t>(most, std::max<int64_t>(classes / K, gradient.rows_at_once)));
  Plan plan = {};
  plan.kernel = Kernel::GRADIENT;
  plan.cluster = 1;
  plan.threads = call.log_q ? threads_for(K / 8, MAX_THREADS, limits) : threads_for(THREADS, THREADS, limits);
  const int64_t warps = ceil_div(N, gradient.rows_per_warp) * gradient.parts_per_row;
  plan.blocks = call.log_q ? N : ceil_div(warps * WARP, plan.threads);
  plan.gradient = gradient;
  return plan;
}

cudaError_t launch_gradient(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
