// The sweeps over one row whose classes lie side by side, a block of classes at a time.
//
// A block is a fixed number of classes, small enough for the first-level cache, with sums of its own about its own
// maximum. Blocks are merged in order, so a row gives the same bits whether one thread or many swept it.
// The first sweep may keep its exps (in the gradient's own memory, or in a scratch row that the cache holds): then the
// gradient of a block is little more than a multiply and an add. Elsewhere exp is computed anew.
#pragma once

#include "common.h"

namespace anl {
namespace ANL_ISA {
namespace {

constexpr int64_t BLOCK = 2048;

// For the entropy term: sums of exp(z_j - row max), and of the same times log_q_j - center.
struct Moments {
  double mass, moment;
};

// What the sweeps find in a block.
struct Block {
  double max, min;                    // of the logits; min is -inf if a class does not exist
  FirstSums<ScalarMath, true> first;  // about max, or about 0 where no class exists
  SecondSums<ScalarMath, true> second;
  Moments moments;
};

// Where the rows of a call are, and their blocks.
template <class S>
struct RowLayout {
  const Call& call;
  const int64_t K, num_blocks, num_rows;
  const bool split;  // blocks are spread over the threads

  RowLayout(const Call& c, bool spread)
      : call(c), K(c.num_classes), num_blocks(ceil_div(K, BLOCK)), num_rows(c.outer * c.inner), split(spread) {}

  const S* logits(int64_t r) const {
    return static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r);
  }
  S* grad(int64_t r) const { return static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r); }

  // f(block, first class, number of classes) for every block: over the threads, or here from the last to the first
  // (the cache holds what the sweep before touched last).
  template <class F>
  void each_block(bool backwards, const F& f) const {
    const auto range = [&](int64_t b0, int64_t b1) {
      for (int64_t i = b0; i < b1; ++i) {
        const int64_t b = backwards ? b1 - 1 - (i - b0) : i;
        f(b, b * BLOCK, int(min_of(BLOCK, K - b * BLOCK)));
      }
    };
    if (split)
      parallel_for(num_blocks, 8, range);
    else
      range(0, num_blocks);
  }

  void fill_grad(int64_t r, double value) const {
    if (!call.grad) return;
    S bits, *g = grad(r);
    store_one(&bits, typename Storage<S>::Acc(value));
    for (int64_t k = 0; k < K; ++k) g[k] = bits;
  }
};

// What the entropy term adds to the gradient is scale e_j (log_q_j - mean). The mean is rounded to center; what rounding
// left out is `lost`.
template <class T>
struct EntropySlope {
  const T* log_q;
  T center, lost, scale;
};

template <class S>
struct Sweep {
  using T = typename Storage<S>::Acc;
  using M = LaneMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  static constexpr int W = Traits<T>::width;

  // Calls body(u, v, i) for whole vectors (u: which of four accumulators), and edge(v, i, n) for a vector that is
  // partial (n < W) or holds the target: the target's lane and those that are not there are -inf, which no sum counts.
  template <class Body, class Edge>
  static ANL_INLINE void for_vectors(const S* z, int n, int y, const Body& body, const Edge& edge) {
    const int full = n / W * W, y_start = y < 0 ? n : y / W * W;
    int i = 0;
    for (int stop = min_of(y_start, full);; stop = full) {
      for (; i + 4 * W <= stop; i += 4 * W) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) body(u, Storage<S>::load(z + i + u * W), i + u * W);
      }
      for (; i < stop; i += W) body(0, Storage<S>::load(z + i), i);
      if (i >= full) break;
      edge(without_lane(Storage<S>::load(z + i), y - i), i, W);
      i += W;
    }
    if (full < n) edge(without_lane(load_part(z + full, n - full, set1(T(-INF))), y - full), full, n - full);
  }

  static ANL_INLINE V without_lane(V v, int lane) {
    I lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i;
    return lanes == lane + I{} ? set1(T(-INF)) : v;
  }

  // Four accumulators into one number.
  static ANL_INLINE double total(V a, V b, V c, V d) { return lane_sum(a + b + (c + d)); }
  template <class Sums>
  static ANL_INLINE void totals(const Sums (&part)[4], double* out) {
#pragma GCC unroll 16
    for (int j = 0; j < Sums::SIZE; ++j) out[j] = total(part[0].of[j], part[1].of[j], part[2].of[j], part[3].of[j]);
  }

  static ANL_INLINE void extrema(const S* z, int n, T& high, T& low) {
    const V first = set1(load_one(z));
    V hi[4] = {first, first, first, first}, lo[4] = {first, first, first, first};
    const auto body = [&](int u, V v) __attribute__((always_inline)) {
      hi[u] = vmax(v, hi[u]);
      lo[u] = vmin(v, lo[u]);
    };
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) body(u, Storage<S>::load(z + i + u * W));
    }
    for (; i + W <= n; i += W) body(0, Storage<S>::load(z + i));
    if (i < n) body(0, load_part(z + i, n - i, first));
    high = fold_lanes<T>(vmax(vmax(hi[0], hi[1]), vmax(hi[2], hi[3])),
                         [](auto a, auto b) __attribute__((always_inline)) { return vmax(a, b); });
    low = fold_lanes<T>(vmin(vmin(lo[0], lo[1]), vmin(lo[2], lo[3])),
                        [](auto a, auto b) __attribute__((always_inline)) { return vmin(a, b); });
  }

  // MASKED: some classes do not exist. KEEP: the exps are stored.
  template <bool MASKED, bool KEEP, bool FULL>
  static ANL_INLINE void exp_sums(const S* z, int n, int y, T anchor, T* kept, FirstSums<ScalarMath, true>& out) {
    FirstSums<M, FULL> sums[4] = {};
    for_vectors(
        z, n, y,
        [&](int u, V v, int i) __attribute__((always_inline)) {
          // What follows in memory, the next block or row, arrives while this one is computed.
          __builtin_prefetch(z + n + i, 0, 2);
          const V x = v - anchor, e = M::class_exp(x);
          sums[u].template add<MASKED>(x, e);
          if (KEEP) Storage<T>::store(kept + i, e);
        },
        [&](V v, int i, int m) __attribute__((always_inline)) {
          const V x = v - anchor, e = M::class_exp(x);
          sums[0].template add<true>(x, e);
          if (KEEP) store_part(kept + i, m, e);
        });
    totals(sums, out.of);
    if (!FULL) out.of[SQUARES] = 0.0;
    if (!MASKED) out.of[COUNT] = n - (y >= 0);
  }

  // First sweep. y: the target's place in the block, or -1. kept: where the exps go, or null.
  template <bool FULL>
  static ANL_NOINLINE void first(const S* z, int n, int y, T* kept, Block& out) {
    T high, low;
    extrema(z, n, high, low);
    out.max = high;
    out.min = low;
    if (low == T(-INF)) {  // a NaN among classes that do not exist is no maximum, but shows in the gap
      exp_sums<true, false, FULL>(z, n, y, high == T(-INF) ? T(0) : high, kept, out.first);
    } else if (kept) {
      exp_sums<false, true, FULL>(z, n, y, high, kept, out.first);
    } else {
      exp_sums<false, false, FULL>(z, n, y, high, kept, out.first);
    }
  }

  // Second sweep of a block with classes on both sides of the clamp, or for the focal sums; y as in the first.
  template <bool MASS, bool FOCAL>
  static ANL_NOINLINE void second(const S* z, int n, int y, double row_max, const SecondSweep<ScalarMath>& row,
                                  double* out) {
    const auto sweep = row.as<M>();
    const T high = T(row_max);
    SecondSums<M, FOCAL> sums[4] = {};
    for_vectors(
        z, n, y,
        [&](int u, V v, int) __attribute__((always_inline)) { sweep.template add_as<MASS, FOCAL>(sums[u], v - high); },
        [&](V v, int, int) __attribute__((always_inline)) { sweep.template add_as<MASS, FOCAL>(sums[0], v - high); });
    totals(sums, out);
  }

  static ANL_NOINLINE void moments(const S* z, int n, const T* log_q, T center, double row_max, Moments& out) {
    const T high = T(row_max);
    V mass[4] = {}, moment[4] = {};
    for_vectors(
        z, n, -1,
        [&](int u, V v, int i) __attribute__((always_inline)) {
          const V e = M::class_exp(v - high);
          mass[u] += e;
          moment[u] += e * (Storage<T>::load(log_q + i) - center);
        },
        [&](V v, int i, int m) __attribute__((always_inline)) {
          const V e = M::class_exp(v - high);
          mass[0] += e;
          moment[0] += e * (load_part(log_q + i, m, V{}) - center);
        });
    out.mass = total(mass[0], mass[1], mass[2], mass[3]);
    out.moment = total(moment[0], moment[1], moment[2], moment[3]);
  }

  // The gradient of a block, the target's place included. KEPT: the exps are there, about the block's maximum. entropy:
  // for EXTRA_SLOPE.
  template <unsigned PARTS, bool KEPT>
  static ANL_NOINLINE void gradient(const S* z, S* g, int n, double row_max, const GradientRow<ScalarMath>& row,
                                    const T* kept, const EntropySlope<T>& entropy) {
    const auto lanes = row.as<M>();
    const T high = T(row_max);
    const auto value = [&](V v, V e, V log_q) __attribute__((always_inline)) {
      const V x = v - high;
      if (!KEPT && !(PARTS & FOCAL_OFFSET)) e = M::class_exp(x);
      return lanes.template at<PARTS>(x, e, ((log_q - entropy.center) - entropy.lost) * entropy.scale);
    };
    constexpr bool ENTROPY = PARTS & EXTRA_SLOPE;
    const int full = n / W * W, rest = n - full;
    for (int i = 0; i < full; i += W)
      Storage<S>::store(g + i, value(Storage<S>::load(z + i), KEPT ? Storage<T>::load(kept + i) : V{},
                                     ENTROPY ? Storage<T>::load(entropy.log_q + i) : V{}));
    if (rest)
      store_part(g + full, rest, value(load_part(z + full, rest, set1(T(-INF))),
                                       KEPT ? load_part(kept + full, rest, V{}) : V{},
                                       ENTROPY ? load_part(entropy.log_q + full, rest, V{}) : V{}));
  }

  // The loop for these parts: of all combinations those that a block can ask for.
  using GradientLoop = decltype(&gradient<FOCAL_PARTS, false>);
  static GradientLoop gradient_loop(unsigned parts, bool kept) {
    if constexpr (sizeof(T) < sizeof(double))
      if (!(parts & SQUARE_SLOPE)) return loop_of<0>(parts, kept);
    return loop_of<SQUARE_SLOPE>(parts, kept);
  }

 private:
  template <unsigned SQUARE>
  static GradientLoop loop_of(unsigned parts, bool kept) {
    constexpr unsigned MISSING = SQUARE | MISSING_CLASSES, ANY = MISSING | CLAMPED;
    switch (parts) {
      case SQUARE: return kept ? gradient<SQUARE, true> : gradient<SQUARE, false>;
      case SQUARE | CLAMPED: return gradient<SQUARE | CLAMPED, true>;
      case MISSING: return gradient<MISSING, false>;
      case ANY: return gradient<ANY, false>;
      case ANY | EXTRA_SLOPE: return gradient<ANY | EXTRA_SLOPE, false>;
      case FOCAL_PARTS: return gradient<FOCAL_PARTS, false>;
      default: return gradient<FOCAL_PARTS | EXTRA_SLOPE, false>;
    }
  }
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
