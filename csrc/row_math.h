// The mathematics of the loss family: a loss is f(statistics of a row), its gradient follows from f's partials.
//
// For a row of logits z with target y: lse = logsumexp(z), l_j = z_j - lse, p_j = exp(l_j), T = -log(min_prob),
// I_j = [l_j > -T], w_j = (1 - p_j)^gamma (held constant under differentiation, as the authors do).
//
//   dL/dz_j = (a + d I_j + square (p_j - max p)) p_j + b + c I_j + (bw + cw I_j) w_j + e [j = y]
//
// A traversal sweeps a row once for FirstSums, makes RowStatistics of them, sweeps it again for SecondSums where a loss
// needs those, calls evaluate (terms.h), and writes GradientRow::at of every class. It owns loops and memory; the
// formulas stand here, and those of the losses in terms.h.
#pragma once

#include <math.h>
#include <stdint.h>

#include "policy.h"
#include "program.h"

namespace anl {

// What a loss reads besides the sums that every loss has. anl_kernels/row_math.py has the same bits.
enum Needs : unsigned { NEED_ABOVE = 1, NEED_ABOVE_MASS = 2, NEED_FOCAL = 4, NEED_FOCAL_ABOVE = 8, NEED_SQUARES = 16 };

ANL_HD bool needs_mass(const Program& prog) { return prog.needs & NEED_ABOVE_MASS; }
ANL_HD bool needs_focal(const Program& prog) { return prog.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE); }
// Whether a second sweep has anything to find, in a row that has classes below the clamp.
ANL_HD bool needs_second(const Program& prog) {
  return prog.needs & (NEED_ABOVE | NEED_ABOVE_MASS | NEED_FOCAL | NEED_FOCAL_ABOVE);
}
// Kernels are compiled lean and full: lean ones leave out the sums, and the parts of a gradient, that few losses read.
ANL_HD bool needs_full(const Program& prog) { return needs_focal(prog) || prog.needs & NEED_SQUARES; }

// ---- sums over the classes of a row, the target left out -----------------------------------------------------------
//
// With the target's part added by hand, what is equal in a loss and its gradient cancels exactly, however dominant the
// target or another class. Sums before LEAN_... are made for every loss, the others by full kernels alone.

enum FirstSum : int {
  TAIL,   // exp(z_j - anchor); the anchor is the row's largest logit, once that is known
  GAP,    // anchor - z_j
  COUNT,  // 1 per class that exists (logit > -inf)
  LEAN_FIRST_SUMS,
  SQUARES = LEAN_FIRST_SUMS,  // exp(z_j - anchor)^2
  NUM_FIRST_SUMS
};

enum SecondSum : int {
  ABOVE_SUM,    // I_j (T + l_j)
  ABOVE_COUNT,  // I_j
  BELOW_MASS,   // (1 - I_j) p_j
  LEAN_SECOND_SUMS,
  FOCAL_SUM = LEAN_SECOND_SUMS,  // -w_j l_j
  FOCAL_WEIGHT,                  // w_j
  FOCAL_ABOVE_SUM,               // I_j (A + w_j l_j)
  FOCAL_ABOVE_WEIGHT,            // I_j w_j
  NUM_SECOND_SUMS
};

template <class M, bool FULL>
struct FirstSums {
  using V = typename M::V;
  static constexpr int SIZE = FULL ? NUM_FIRST_SUMS : LEAN_FIRST_SUMS;
  V of[SIZE];

  // One class: x = z_j - anchor, e = class_exp(x). MASKED: x may be -inf, of what does not count; else everything counts,
  // and COUNT is left to the caller, who knows how many there are.
  template <bool MASKED>
  ANL_HD void add(V x, V e) {
    add_exp(e);
    add_gap<MASKED>(x);
  }
  // Its two halves, for callers that mask some of their classes: what is -inf adds nothing to the sums of exps.
  ANL_HD void add_exp(V e) {
    of[TAIL] += e;
    if constexpr (FULL) of[SQUARES] += e * e;
  }
  template <bool MASKED>
  ANL_HD void add_gap(V x) {
    if constexpr (MASKED) {
      const auto exists = x != M::set(-__builtin_inf());
      M::add_where(exists, of[GAP], -x);
      M::add_where(exists, of[COUNT], M::set(1.0));
    } else {
      of[GAP] -= x;
    }
  }

  // The same sums about an anchor that is larger by `by`; not infinite where COUNT is 0.
  ANL_HD void rebase(V by) { rebase(by, M::exp(-by)); }
  ANL_HD void rebase(V by, V shrink) {
    of[TAIL] *= shrink;
    if constexpr (FULL) of[SQUARES] *= shrink * shrink;
    of[GAP] += of[COUNT] * by;
  }

  ANL_HD void add(const FirstSums& other) {
    for (int i = 0; i < SIZE; ++i) of[i] += other.of[i];
  }
};

template <class M, bool FULL>
struct SecondSums {
  using V = typename M::V;
  static constexpr int SIZE = FULL ? NUM_SECOND_SUMS : LEAN_SECOND_SUMS;
  V of[SIZE];

  ANL_HD void add(const SecondSums& other) {
    for (int i = 0; i < SIZE; ++i) of[i] += other.of[i];
  }

  ANL_HD void clear_focal() {
    if constexpr (FULL) of[FOCAL_SUM] = of[FOCAL_WEIGHT] = of[FOCAL_ABOVE_SUM] = of[FOCAL_ABOVE_WEIGHT] = M::set(0.0);
  }

  // What the second sweep would find of classes that are all above the clamp, save focal sums. height: T + l at gap's anchor.
  ANL_HD void set_all_above(V count, V gap, V height) {
    of[ABOVE_SUM] = count * height - gap;
    of[ABOVE_COUNT] = count;
    of[BELOW_MASS] = M::set(0.0);
  }
  // The same of classes that are all below the clamp; tail: TAIL about the row's largest logit.
  ANL_HD void set_all_below(V tail) {
    of[ABOVE_SUM] = of[ABOVE_COUNT] = M::set(0.0);
    of[BELOW_MASS] = tail;
  }
};

// ---- a row between its sweeps ---------------------------------------------------------------------------------------

// Sums leave the target out.
template <class M>
struct RowStatistics {
  using V = typename M::V;
  V x_y;              // z_y - max, of all classes: 0 where the target is the row's top
  V log_sum;          // lse - max
  V target_log_prob;  // l_y
  V target_tail;      // 1 - p_y, from the sum without the target: exact as p_y -> 1
  V target_prob;      // p_y
  V classes;          // how many exist besides the target
  V neg_log_sum;      // -l_j
  V squares;          // p_j^2; 0 in a lean kernel
  V below_top;        // max p - squares, exact as another class's p -> 1; 0 in a lean kernel
  V second[NUM_SECOND_SUMS];  // zeros where no sweep made them; BELOW_MASS divided by the sum of exps

  ANL_HD void clear_second() {  // not a loop: g++ makes a slow string instruction of one that clears memory
    second[ABOVE_SUM] = second[ABOVE_COUNT] = second[BELOW_MASS] = second[FOCAL_SUM] = second[FOCAL_WEIGHT] =
        second[FOCAL_ABOVE_SUM] = second[FOCAL_ABOVE_WEIGHT] = M::set(0.0);
  }

  // The same numbers in another arithmetic.
  template <class N>
  ANL_HD RowStatistics<N> as() const {
    using W = typename N::V;
    RowStatistics<N> s = {W(x_y),         W(log_sum), W(target_log_prob), W(target_tail),
                          W(target_prob), W(classes), W(neg_log_sum),     W(squares), W(below_top)};
    for (int i = 0; i < NUM_SECOND_SUMS; ++i) s.second[i] = W(second[i]);
    return s;
  }
};

// RowStatistics from the first sweep: x_y = z_y - max, and its sums about the max, in arithmetic A (that of V or wider).
template <class M, class A, int SIZE>
ANL_HD void set_first_sums(RowStatistics<M>& s, typename M::V x_y, const A (&sum)[SIZE]) {
  using V = typename M::V;
  const V one = M::set(1.0), tail = V(sum[TAIL]);
  const V e_y = M::exp(x_y);
  const V total = tail + e_y;
  // The largest logit's exp is 1: log1p of the others' keeps the digits that log(total) would drop.
  s.x_y = x_y;
  s.log_sum = M::log1p(x_y == M::set(0.0) ? tail : (tail - one) + e_y);
  s.target_log_prob = x_y - s.log_sum;
  s.target_tail = M::divide(tail, total);
  s.target_prob = M::divide(e_y, total);
  s.classes = V(sum[COUNT]);
  s.neg_log_sum = V(sum[COUNT] * A(s.log_sum) + sum[GAP]);
  s.squares = s.below_top = M::set(0.0);
  if constexpr (SIZE > SQUARES) {
    s.squares = M::divide(V(sum[SQUARES]), total * total);
    s.below_top = M::divide(V(sum[TAIL] - sum[SQUARES]) + e_y, total * total);
  }
  s.clear_second();
}

// mass_scale: what BELOW_MASS still has to be multiplied with, 1 / sum exp(z_j - max); 1 where `focal` sums were made.
template <class M, class A, int SIZE>
ANL_HD void set_second_sums(RowStatistics<M>& s, const A (&sum)[SIZE], typename M::V mass_scale) {
  for (int i = 0; i < SIZE; ++i) s.second[i] = typename M::V(sum[i]);
  s.second[BELOW_MASS] *= mass_scale;
}

// ---- the second sweep ------------------------------------------------------------------------------------------------

// What the second sweep knows of its row.
template <class M>
struct SecondSweep {
  using V = typename M::V;
  V log_sum;
  V threshold;  // z_j - max above it: above the clamp
  V focal_clamp_height;
  double gamma;
  bool mass, focal;

  static ANL_HD SecondSweep of_row(const Program& prog, V log_sum) {
    return {log_sum, log_sum - M::set(prog.clamp_height), M::set(prog.focal_clamp_height), prog.gamma,
            needs_mass(prog), needs_focal(prog)};
  }

  // The same numbers in another arithmetic.
  template <class N>
  ANL_HD SecondSweep<N> as() const {
    return {N::set(log_sum), N::set(threshold), N::set(focal_clamp_height), gamma, mass, focal};
  }

  // One class: x = z_j - max, -inf for what does not count. MASS: what is below the clamp is summed, as exp(x), or with
  // FOCAL as p_j.
  template <bool MASS, bool FOCAL, class Sums>
  ANL_HD void add_as(Sums& sums, V x) const {
    add_as<MASS, FOCAL>(sums, x > threshold, x, MASS && !FOCAL ? M::class_exp(x) : x);
  }
  // The same where it is known whether it is above the clamp, and e: exp(x), without FOCAL.
  template <bool MASS, bool FOCAL, class Sums, class Mask>
  ANL_HD void add_as(Sums& sums, Mask above, V x, V e) const {
    const V one = M::set(1.0);
    M::add_where(above, sums.of[ABOVE_SUM], x - threshold);
    M::add_where(above, sums.of[ABOVE_COUNT], one);
    if constexpr (FOCAL) {
      V rest;
      const V l = x - log_sum, p = M::class_exp_and_rest(l, rest);
      const V w = focal_weight<M>(rest, gamma), wl = w * l;
      const auto exists = x != M::set(-__builtin_inf());
      M::add_where(exists, sums.of[FOCAL_SUM], -wl);
      M::add_where(exists, sums.of[FOCAL_WEIGHT], w);
      M::add_where(above, sums.of[FOCAL_ABOVE_SUM], wl + focal_clamp_height);
      M::add_where(above, sums.of[FOCAL_ABOVE_WEIGHT], w);
      if constexpr (MASS) M::add_where(M::negate(above), sums.of[BELOW_MASS], p);
    } else if constexpr (MASS) {
      M::add_where(M::negate(above), sums.of[BELOW_MASS], e);
    }
  }
};

// Fields of the statistics (NUM_STATS, N) that a loss written in Python sees.
enum StatField : int {
  STAT_MAX, STAT_LOG_SUM, STAT_TARGET_LOG_PROB, STAT_NUM_CLASSES, STAT_NEG_LOG_SUM, STAT_ABOVE_SUM, STAT_ABOVE_MASS,
  STAT_ABOVE_COUNT, STAT_FOCAL_SUM, STAT_FOCAL_WEIGHT, STAT_FOCAL_ABOVE_SUM, STAT_FOCAL_ABOVE_WEIGHT, STAT_TOP_GAP, STAT_OTHER_P2,
  STAT_VALID, NUM_STATS
};

// The statistics over all classes; NaN for those that no sweep was asked for, and for a NaN row. FOCAL: with those that
// few losses read.
template <class M, bool FOCAL = true>
ANL_HD void all_statistics(const Program& prog, const RowStatistics<M>& s, typename M::V max,
                           typename M::V (&out)[NUM_STATS]) {
  using V = typename M::V;
  const V zero = M::set(0.0), one = M::set(1.0), absent = M::set(__builtin_nan(""));
  const V l = s.target_log_prob, w_y = FOCAL ? focal_weight<M>(s.target_tail, prog.gamma) : one;
  const V I_y = l > M::set(-prog.clamp_height) ? one : zero;
  const bool above = needs_second(prog), mass = needs_mass(prog), focal = FOCAL && needs_focal(prog);
  const V poison = s.target_tail - s.target_tail;
  out[STAT_MAX] = max + poison;
  out[STAT_LOG_SUM] = s.log_sum;
  out[STAT_TARGET_LOG_PROB] = l;
  out[STAT_NUM_CLASSES] = s.classes + one + poison;
  out[STAT_NEG_LOG_SUM] = s.neg_log_sum - l;
  out[STAT_ABOVE_SUM] = above ? s.second[ABOVE_SUM] + I_y * (M::set(prog.clamp_height) + l) : absent;
  out[STAT_ABOVE_MASS] = mass ? one - (s.second[BELOW_MASS] + (one - I_y) * s.target_prob) : absent;
  out[STAT_ABOVE_COUNT] = above ? s.second[ABOVE_COUNT] + I_y + poison : absent;
  out[STAT_FOCAL_SUM] = focal ? s.second[FOCAL_SUM] - w_y * l : absent;
  out[STAT_FOCAL_WEIGHT] = focal ? s.second[FOCAL_WEIGHT] + w_y : absent;
  const V focal_height = M::set(prog.focal_clamp_height) + w_y * l;
  out[STAT_FOCAL_ABOVE_SUM] = focal ? s.second[FOCAL_ABOVE_SUM] + I_y * focal_height : absent;
  out[STAT_FOCAL_ABOVE_WEIGHT] = focal ? s.second[FOCAL_ABOVE_WEIGHT] + I_y * w_y : absent;
  out[STAT_TOP_GAP] = poison - s.x_y;
  out[STAT_OTHER_P2] = prog.needs & NEED_SQUARES ? s.squares : absent;
  out[STAT_VALID] = one;
}

// The statistics of an ignored row are those of a uniform one: any f is finite there, and its result is dropped.
ANL_HD void ignored_statistics(double num_classes, const Program& prog, double (&out)[NUM_STATS]) {
  const double K = num_classes, log_k = log(K), T = prog.clamp_height, w = pow(1.0 - 1.0 / K, prog.gamma);
  const double values[NUM_STATS] = {0.0, log_k, -log_k, K, K * log_k, K * (T - log_k), 1.0, K, K * w * log_k,
                                    K * w, K * (prog.focal_clamp_height - w * log_k), K * w, 0.0, (K - 1.0) / (K * K), 0.0};
  for (int i = 0; i < NUM_STATS; ++i) out[i] = values[i];
}

// ---- the gradient of a class -----------------------------------------------------------------------------------------

// Fields of the gradient's coefficients (NUM_COEFS, N), from which it can be made later: those of COEF_A to COEF_TARGET
// scale with the loss.
enum CoefField : int {
  COEF_MAX, COEF_INV_SUM, COEF_A, COEF_B, COEF_A_ABOVE, COEF_C, COEF_BW, COEF_CW, COEF_SQUARE, COEF_TARGET, COEF_LOG_SUM,
  NUM_COEFS
};

// What the gradient of a class can depend on besides exp(z_j - max); a traversal compiles in what may occur.
enum GradientPart : unsigned {
  CLAMPED_SLOPE = 1,   // whether it is above the clamp: what multiplies p_j
  CLAMPED_OFFSET = 2,  // and what is added
  FOCAL_OFFSET = 4,    // (1 - p_j)^gamma
  MISSING_CLASSES = 8, // it may not exist
  EXTRA_SLOPE = 16,    // something that the traversal adds to what multiplies p_j
  SQUARE_SLOPE = 32,   // p_j^2
  CLAMPED = CLAMPED_SLOPE | CLAMPED_OFFSET,
};

// The parts of a lean kernel, and of a full one whose loss needs_focal or does not.
constexpr unsigned LEAN_PARTS = CLAMPED | MISSING_CLASSES;
constexpr unsigned FULL_PARTS = LEAN_PARTS | SQUARE_SLOPE, FOCAL_PARTS = FULL_PARTS | FOCAL_OFFSET;

// dL/dz_j of a row for every class but the target.
template <class M>
struct GradientRow {
  using V = typename M::V;
  V log_sum;
  V threshold;            // z_j - max above it: above the clamp
  V slope, slope_above;   // multiplies e_j, which is p_j over `norm` of gradient_row
  V offset, offset_above;
  V weight, weight_above; // FOCAL_OFFSET: multiplies (1 - p_j)^gamma
  V square;               // SQUARE_SLOPE: multiplies (e_j - 1) e_j
  V missing;              // of a class that does not exist: 0, or NaN in a NaN row
  V target;               // the whole gradient at the target
  double gamma;

  // A row that is not read: every logit stands for 0 here.
  static ANL_HD GradientRow constant(V value) {
    const V zero = M::set(0.0);
    return {zero, zero, zero, zero, value, value, zero, zero, zero, value, value, 1.0};
  }

  // The class with x = z_j - max; e: class_exp(x), or what was kept of it. With FOCAL_OFFSET p_j is made anew, norm is 1.
  template <unsigned PARTS>
  ANL_HD V at(V x, V e, V extra_slope) const {
    return at<PARTS>(x > threshold, x, e, extra_slope);
  }
  template <unsigned PARTS, class Mask>
  ANL_HD V at(Mask above, V x, V e, V extra_slope) const {
    V a = PARTS & CLAMPED_SLOPE ? (above ? slope_above : slope) : slope;
    V b = PARTS & CLAMPED_OFFSET ? (above ? offset_above : offset) : offset;
    if constexpr (PARTS & EXTRA_SLOPE) a += extra_slope;
    if constexpr (PARTS & FOCAL_OFFSET) {
      V rest;
      e = M::class_exp_and_rest(x - log_sum, rest);
      b += (above ? weight_above : weight) * focal_weight<M>(rest, gamma);
    }
    if constexpr (PARTS & SQUARE_SLOPE) a += square * (e - M::set(1.0));
    const V value = e * a + b;
    return PARTS & MISSING_CLASSES ? (x == M::set(-__builtin_inf()) ? missing : value) : value;
  }
  template <unsigned PARTS>
  ANL_HD V at(V x, V e) const {
    return at<PARTS & ~unsigned(EXTRA_SLOPE)>(x, e, e);
  }
  template <unsigned PARTS>
  ANL_HD V at(V x) const {
    return at<PARTS>(x, M::class_exp(x));
  }

  // The row as its classes above the clamp see it.
  ANL_HD GradientRow all_above() const {
    GradientRow row = *this;
    row.slope = slope_above;
    row.offset = offset_above;
    row.weight = weight_above;
    return row;
  }

  // The same numbers in another arithmetic.
  template <class N>
  ANL_HD GradientRow<N> as() const {
    return {N::set(log_sum), N::set(threshold), N::set(slope), N::set(slope_above), N::set(offset), N::set(offset_above),
            N::set(weight), N::set(weight_above), N::set(square), N::set(missing), N::set(target), gamma};
  }
};

// `factor` times the gradient of these coefficients. norm: what p_j is e_j times; where needs_focal(prog), 1.
template <class M>
ANL_HD GradientRow<M> gradient_row(const Program& prog, const typename M::V (&c)[NUM_COEFS], typename M::V factor,
                                   typename M::V norm) {
  using V = typename M::V;
  const V nan_or_0 = c[COEF_INV_SUM] - c[COEF_INV_SUM];  // NaN in a NaN row
  const V scale = norm * factor, b = c[COEF_B] * factor, bw = c[COEF_BW] * factor;
  GradientRow<M> g;
  g.log_sum = c[COEF_LOG_SUM];
  g.threshold = c[COEF_LOG_SUM] - M::set(prog.clamp_height);
  // a is that of p_j = max p = 1 / sum; the slope that of e_j = 1.
  const V to_one = c[COEF_SQUARE] * (norm - c[COEF_INV_SUM]);
  g.slope = (c[COEF_A] + to_one) * scale + nan_or_0;
  g.slope_above = (c[COEF_A_ABOVE] + to_one) * scale + nan_or_0;
  g.offset = b + nan_or_0;
  g.offset_above = b + c[COEF_C] * factor + nan_or_0;
  g.weight = bw;
  g.weight_above = bw + c[COEF_CW] * factor;
  g.square = c[COEF_SQUARE] * scale * norm;
  g.missing = nan_or_0;
  g.target = c[COEF_TARGET] * factor + nan_or_0;
  g.gamma = prog.gamma;
  return g;
}

}  // namespace anl
