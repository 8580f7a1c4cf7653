// The sweeps over one row whose classes lie side by side, a block of classes at a time.
//
// A block is a fixed number of classes, small enough for the first-level cache, with statistics of its own relative to
// its own maximum. Blocks are merged in order, so a row gives the same bits whether one thread or many swept it.
// The first sweep may keep its exps (in the gradient's own memory, or in a scratch row that the cache holds): then the
// gradient of a block is little more than a multiply and an add. Elsewhere exp is computed anew.
#pragma once

#include "common.h"

namespace anl {
namespace ANL_ISA {
namespace {

constexpr int64_t BLOCK = 2048;

struct Block {
  double max, min;    // of the logits; min is -inf if a class does not exist
  double tail;        // sum over j != y of exp(z_j - max)
  double gap;         // sum over j != y of max - z_j, for the classes that exist
  double count;       // how many of those exist
  double above_sum, below_mass, above_count, focal_sum, focal_weight, focal_above_sum, focal_above_weight;
  double mass, dot;   // sums of exp(z_j - row max), and of the same times log_q_j - center
};

// What a row's later sweeps know from its first.
struct RowState {
  double max, min, tail, gap, count;
  double log_sum, inv_sum;
  double a, b, a_above, c, bw, cw, target;  // the gradient's coefficients
};

template <class S>
struct Sweep {
  using T = typename Storage<S>::Acc;
  using V = typename Traits<T>::V;
  using I = typename Traits<T>::I;
  static constexpr int W = Traits<T>::width;

  // Calls body(u, v, i) for whole vectors (u: which of four accumulators) and edge(v, i, n, keep) where a vector is
  // partial (n < W, filled with -inf) or holds the target (keep: every lane but the target's).
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
      edge(Storage<S>::load(z + i), i, W, lane_index() != (y - i) + I{});
      i += W;
    }
    if (full < n)
      edge(load_part(z + full, n - full, set1(T(-INF))), full, n - full, lane_index() != (y < 0 ? -1 : y - full) + I{});
  }

  static ANL_INLINE I lane_index() {
    I lanes;
    for (int i = 0; i < W; ++i) lanes[i] = i;
    return lanes;
  }

  static ANL_INLINE void extrema(const S* z, int n, T& high, T& low) {
    const V first = set1(load_one(z));
    V hi[4] = {first, first, first, first}, lo[4] = {first, first, first, first};
    const auto body = [&](int u, V v, int) __attribute__((always_inline)) {
      hi[u] = vmax(v, hi[u]);
      lo[u] = vmin(v, lo[u]);
    };
    int i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) body(u, Storage<S>::load(z + i + u * W), 0);
    }
    for (; i + W <= n; i += W) body(0, Storage<S>::load(z + i), 0);
    if (i < n) body(0, load_part(z + i, n - i, first), 0);
    high = fold_lanes<T>(vmax(vmax(hi[0], hi[1]), vmax(hi[2], hi[3])),
                         [](auto a, auto b) __attribute__((always_inline)) { return vmax(a, b); });
    low = fold_lanes<T>(vmin(vmin(lo[0], lo[1]), vmin(lo[2], lo[3])),
                        [](auto a, auto b) __attribute__((always_inline)) { return vmin(a, b); });
  }

  template <bool MASKED, bool KEEP>
  static ANL_INLINE void exp_sums(const S* z, int n, int y, T high, T* kept, Block& out) {
    V tail[4] = {}, gap[4] = {};
    I missing = {};
    for_vectors(
        z, n, y,
        [&](int u, V v, int i) __attribute__((always_inline)) {
          // What follows in memory, the next block or row, arrives while this one is computed.
          __builtin_prefetch(z + n + i, 0, 2);
          const V x = v - high, e = vexp<T>(x);
          tail[u] += e;
          if (KEEP) Storage<T>::store(kept + i, e);
          if (MASKED) {
            gap[u] -= v == T(-INF) ? V{} : x;
            missing -= v == T(-INF);
          } else {
            gap[u] -= x;
          }
        },
        [&](V v, int i, int m, I keep) __attribute__((always_inline)) {
          const V x = v - high, e = vexp<T>(x);
          tail[0] += keep ? e : V{};
          if (KEEP) store_part(kept + i, m, e);
          const auto counts = keep & (v != T(-INF));
          gap[0] -= counts ? x : V{};
          if (MASKED) missing -= ~counts;
        });
    out.tail = lane_sum(tail[0] + tail[1] + (tail[2] + tail[3]));
    out.gap = lane_sum(gap[0] + gap[1] + (gap[2] + gap[3]));
    const int padding = (W - n % W) % W;
    out.count = MASKED ? n + padding - lane_sum(missing) : double(n - (y >= 0));
  }

  // First sweep. y: the target's place in the block, or -1. kept: where the exps go, or null.
  static void first(const S* z, int n, int y, T* kept, Block& out) {
    T high, low;
    extrema(z, n, high, low);
    out.max = high;
    out.min = low;
    if (low == T(-INF)) {  // a NaN among classes that do not exist is no maximum, but shows in the gap
      exp_sums<true, false>(z, n, y, high == T(-INF) ? T(0) : high, kept, out);
    } else if (kept) {
      exp_sums<false, true>(z, n, y, high, kept, out);
    } else {
      exp_sums<false, false>(z, n, y, high, kept, out);
    }
  }

  // Second sweep of a block with classes on both sides of the clamp, or for the focal sums; y as in the first.
  template <bool MASS, bool FOCAL>
  static void second(const S* z, int n, int y, const RowState& row, const Program& prog, Block& out) {
    const T high = T(row.max), log_sum = T(row.log_sum), inv_sum = T(row.inv_sum);
    const T floor = T(prog.log_floor_neg - row.log_sum), focal_floor = T(prog.focal_floor);
    V sum[4] = {}, rest[4] = {}, focal[4] = {}, weight[4] = {}, focal_above[4] = {}, weight_above[4] = {};
    I count = {};
    const auto step = [&](int u, V v, I keep) __attribute__((always_inline)) {
      const V x = v - high;
      const auto above = x > -floor;
      sum[u] += (above & keep) ? x + floor : V{};
      count -= above & keep;
      if (MASS && !FOCAL) rest[u] += (~above & keep) ? vexp<T>(x) * inv_sum : V{};
      if (FOCAL) {
        const V l = x - log_sum;
        V others;
        const V p = vexp_and_rest<T>(l, others);
        const V w = focal_weight<LaneMath<T>>(others, prog.gamma);
        if (MASS) rest[u] += (~above & keep) ? p : V{};
        const V wl = w * l;
        const auto counts = keep & (v != T(-INF));
        focal[u] -= counts ? wl : V{};
        weight[u] += counts ? w : V{};
        focal_above[u] += (above & keep) ? wl + focal_floor : V{};
        weight_above[u] += (above & keep) ? w : V{};
      }
    };
    for_vectors(
        z, n, y, [&](int u, V v, int) __attribute__((always_inline)) { step(u, v, ~I{}); },
        [&](V v, int, int, I keep) __attribute__((always_inline)) { step(0, v, keep); });
    const auto total = [](const V* v) { return lane_sum(v[0] + v[1] + (v[2] + v[3])); };
    out.above_sum = total(sum);
    out.above_count = lane_sum(count);
    out.below_mass = total(rest);
    out.focal_sum = total(focal);
    out.focal_weight = total(weight);
    out.focal_above_sum = total(focal_above);
    out.focal_above_weight = total(weight_above);
  }

  // For the entropy term: the mass of a block, and its moment of log_q about a center.
  static void dot(const S* z, int n, const T* log_q, T center, double row_max, Block& out) {
    const T high = T(row_max);
    V mass[4] = {}, moment[4] = {};
    for_vectors(
        z, n, -1,
        [&](int u, V v, int i) __attribute__((always_inline)) {
          const V e = vexp<T>(v - high);
          mass[u] += e;
          moment[u] += e * (Storage<T>::load(log_q + i) - center);
        },
        [&](V v, int i, int m, I) __attribute__((always_inline)) {
          const V e = vexp<T>(v - high);
          mass[0] += e;
          moment[0] += e * (load_part(log_q + i, m, V{}) - center);
        });
    out.mass = lane_sum(mass[0] + mass[1] + (mass[2] + mass[3]));
    out.dot = lane_sum(moment[0] + moment[1] + (moment[2] + moment[3]));
  }

  // The gradient of a block. ABOVE: it has classes on both sides of the clamp. MASKED: classes that do not exist get 0.
  // KEPT: exp(z_j - row max) is kept_scale kept_j. ENTROPY: adds scale p_j (log_q_j - mean).
  template <bool ABOVE, bool FOCAL, bool MASKED, bool KEPT, bool ENTROPY>
  static void gradient(const S* z, S* g, int n, const RowState& row, const Program& prog, const T* kept,
                       double kept_scale, const T* log_q, double entropy_scale, double entropy_mean) {
    const T high = T(row.max), log_sum = T(row.log_sum), thr = T(row.log_sum - prog.log_floor_neg);
    // log_q_j - mean in two steps: the mean is rounded, and what rounding it left out follows.
    const T center = T(entropy_mean), lost = T(entropy_mean - double(center));
    // The slopes multiply p_j, exp(z_j - max), or what was kept of it.
    const double norm = FOCAL ? 1.0 : KEPT ? row.inv_sum * kept_scale : row.inv_sum;
    const T a = T(row.a * norm), a_above = T(row.a_above * norm);
    const T q_scale = T(entropy_scale * norm);
    const T b = T(row.b), c = T(row.c), bw = T(row.bw), cw = T(row.cw);
    const auto value = [&](V v, V e, V u) __attribute__((always_inline)) {
      const V x = v - high;
      V slope = set1(a), offset = set1(b);
      const auto above = x > thr;
      if (ABOVE) {
        slope = above ? set1(a_above) : slope;
        offset = above ? offset + c : offset;
      }
      if (ENTROPY) slope += ((u - center) - lost) * q_scale;
      V p;
      if (FOCAL) {
        V others;
        p = vexp_and_rest<T>(x - log_sum, others);
        offset += (above ? set1(bw + cw) : set1(bw)) * focal_weight<LaneMath<T>>(others, prog.gamma);
      } else {
        p = KEPT ? e : vexp<T>(x);
      }
      const V y = p * slope + offset;
      return MASKED ? (v == T(-INF) ? V{} : y) : y;
    };
    const int full = n / W * W, rest = n - full;
    for (int i = 0; i < full; i += W)
      Storage<S>::store(g + i, value(Storage<S>::load(z + i), KEPT ? Storage<T>::load(kept + i) : V{},
                                     ENTROPY ? Storage<T>::load(log_q + i) : V{}));
    if (rest)
      store_part(g + full, rest, value(load_part(z + full, rest, set1(T(-INF))),
                                       KEPT ? load_part(kept + full, rest, V{}) : V{},
                                       ENTROPY ? load_part(log_q + full, rest, V{}) : V{}));
  }
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
