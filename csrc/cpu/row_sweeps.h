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
  double z_y;                         // the target's logit, in the block that has it
  FirstSums<ScalarMath, true> first;  // about max, or about 0 where no class exists
  SecondSums<ScalarMath, true> second;
  Moments moments;
};

// What the entropy term adds to the gradient is scale e_j (log_q_j - mean). The mean is rounded to center; what
// rounding left out is `lost`.
struct EntropySlope {
  const void* log_q;
  double center, lost, scale;
};
constexpr EntropySlope NO_ENTROPY = {};

// The loops over a block's classes, for one type of stored logits: all that depends on this type. z and g point to
// stored logits, kept and log_q to numbers of the arithmetic type; a single number is a double.
struct Loops {
  void (*first)(const void* z, int n, int y, void* kept, Block& out);
  void (*second)(const void* z, int n, int y, double row_max, const SecondSweep<ScalarMath>& row, double* out);
  void (*moments)(const void* z, int n, const void* log_q, double center, double row_max, Moments& out);
  using Gradient = void (*)(const void* z, void* g, int n, int y, double row_max,
                            const GradientRow<ScalarMath>& row, const void* kept, const EntropySlope& entropy);
  Gradient gradient[2][2][2];  // [kept][CLAMPED][MISSING_CLASSES]; null where no block asks for it
  Gradient entropy_gradient;
  double (*load)(const void* z);
  void (*fill)(void* g, int64_t n, double value);
};

template <class S>
class Sweep {
  using T = typename Storage<S>::Acc;
  using M = LaneMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  static constexpr int W = Traits<T>::width;

 public:
  // Those for what the loss of this call needs.
  static Loops loops(const Call& call) {
    Loops loops = {};
    by_first_sums<T>(call, [&](auto full) { loops.first = first<full.value>; });
    by_second_sums(call.program, [&](auto mass, auto focal) { loops.second = second<mass.value, focal.value>; });
    loops.moments = moments;
    loops.load = load;
    loops.fill = fill;
    if (needs_focal(call.program)) {
      loops.gradient[0][1][1] = gradient<FOCAL_PARTS, false>;
      loops.entropy_gradient = gradient<FOCAL_PARTS | EXTRA_SLOPE, false>;
    } else if (takes_full(call)) {
      set_gradients<SQUARE_SLOPE>(loops);
    } else if constexpr (sizeof(T) < sizeof(double)) {
      set_gradients<0>(loops);
    }
    return loops;
  }

 private:
  template <unsigned SQUARE>
  static void set_gradients(Loops& loops) {
    constexpr unsigned ANY = SQUARE | CLAMPED | MISSING_CLASSES;
    loops.gradient[0][0][0] = gradient<SQUARE, false>;
    loops.gradient[0][0][1] = gradient<SQUARE | MISSING_CLASSES, false>;
    loops.gradient[0][1][1] = gradient<ANY, false>;
    loops.gradient[1][0][0] = gradient<SQUARE, true>;
    loops.gradient[1][1][0] = gradient<SQUARE | CLAMPED, true>;
    loops.entropy_gradient = gradient<ANY | EXTRA_SLOPE, false>;
  }

  static double load(const void* z) { return double(load_one(static_cast<const S*>(z))); }
  static void fill(void* g, int64_t n, double value) {
    S bits;
    store_one(&bits, T(value));
    for (int64_t k = 0; k < n; ++k) static_cast<S*>(g)[k] = bits;
  }

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
  static ANL_NOINLINE void first(const void* logits, int n, int y, void* exps, Block& out) {
    const S* z = static_cast<const S*>(logits);
    T *kept = static_cast<T*>(exps), high, low;
    extrema(z, n, high, low);
    if (y >= 0) out.z_y = double(load_one(z + y));
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
  static ANL_NOINLINE void second(const void* logits, int n, int y, double row_max, const SecondSweep<ScalarMath>& row,
                                  double* out) {
    const S* z = static_cast<const S*>(logits);
    const auto sweep = row.as<M>();
    const T high = T(row_max);
    SecondSums<M, FOCAL> sums[4] = {};
    for_vectors(
        z, n, y,
        [&](int u, V v, int) __attribute__((always_inline)) { sweep.template add_as<MASS, FOCAL>(sums[u], v - high); },
        [&](V v, int, int) __attribute__((always_inline)) { sweep.template add_as<MASS, FOCAL>(sums[0], v - high); });
    totals(sums, out);
  }

  static ANL_NOINLINE void moments(const void* logits, int n, const void* log_probs, double rounded, double row_max,
                                   Moments& out) {
    const S* z = static_cast<const S*>(logits);
    const T *log_q = static_cast<const T*>(log_probs), center = T(rounded), high = T(row_max);
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

  // The gradient of a block. y: as in the first. KEPT: the exps are there, about the block's maximum. entropy: for
  // EXTRA_SLOPE.
  template <unsigned PARTS, bool KEPT>
  static ANL_NOINLINE void gradient(const void* logits, void* grad, int n, int y, double row_max,
                                    const GradientRow<ScalarMath>& row, const void* exps, const EntropySlope& entropy) {
    const S* z = static_cast<const S*>(logits);
    S* g = static_cast<S*>(grad);
    const T *kept = static_cast<const T*>(exps), *log_q = static_cast<const T*>(entropy.log_q);
    const auto lanes = row.as<M>();
    const T high = T(row_max), center = T(entropy.center), lost = T(entropy.lost), scale = T(entropy.scale);
    const auto value = [&](V v, V e, V l) __attribute__((always_inline)) {
      const V x = v - high;
      if (!KEPT && !(PARTS & FOCAL_OFFSET)) e = M::class_exp(x);
      return lanes.template at<PARTS>(x, e, ((l - center) - lost) * scale);
    };
    constexpr bool ENTROPY = PARTS & EXTRA_SLOPE;
    const int full = n / W * W, rest = n - full;
    for (int i = 0; i < full; i += W)
      Storage<S>::store(g + i, value(Storage<S>::load(z + i), KEPT ? Storage<T>::load(kept + i) : V{},
                                     ENTROPY ? Storage<T>::load(log_q + i) : V{}));
    if (rest)
      store_part(g + full, rest, value(load_part(z + full, rest, set1(T(-INF))),
                                       KEPT ? load_part(kept + full, rest, V{}) : V{},
                                       ENTROPY ? load_part(log_q + full, rest, V{}) : V{}));
    if (y >= 0) store_one(g + y, T(row.target));
  }
};

// Where the rows of a call are, and their blocks.
struct RowLayout {
  const Call& call;
  const Loops loops;
  const int64_t K, num_blocks, num_rows;
  const int64_t size, real_size;  // bytes of a stored logit, and of a number of the arithmetic type
  const bool split;  // blocks are spread over the threads

  RowLayout(const Call& c, bool spread)
      : call(c), loops(loops_of(c)), K(c.num_classes), num_blocks(ceil_div(K, BLOCK)), num_rows(c.outer * c.inner),
        size(logit_bytes(c)), real_size(real_bytes(c)), split(spread) {}

  const char* logits(int64_t r) const {
    return static_cast<const char*>(call.logits) + row_offset(call, call.logits_strides, r) * size;
  }
  char* grad(int64_t r) const {
    return static_cast<char*>(call.grad) + row_offset(call, call.grad_strides, r) * size;
  }

  // The target's place in the block that begins with class k0, or -1.
  static int target_in_block(int64_t y, int64_t k0, int n) { return y >= k0 && y < k0 + n ? int(y - k0) : -1; }

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

 private:
  static Loops loops_of(const Call& call) {
    return by_storage<half_t, bfloat16_t>(
        call.dtype, [&](auto stored) { return Sweep<typename decltype(stored)::type>::loops(call); });
  }
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
