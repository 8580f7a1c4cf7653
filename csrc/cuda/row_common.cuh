// What every traversal does with a row: labels, the sums of both sweeps, the mathematics between them, results.
//
// The sums leave the target out. A kernel puts -inf in its place where it keeps the row (what lies outside the row is
// -inf too), reads the target's logit apart, and writes the target's gradient last.
#pragma once

#include "kernels.h"
#include "reduce.cuh"

namespace anl {
namespace gpu {

constexpr double INF = __builtin_inf();
constexpr double NOT_A_NUMBER = __builtin_nan("");

template <class T>
ANL_DEVICE T minus_inf() {
  return T(-INF);
}

// ---- kernels by what their template arguments are ------------------------------------------------------------------

// f(Stored<S>(), FOCAL): whether the second sweep is the focal losses'.
template <class F>
cudaError_t by_variant(const Call& call, F f) {
  const bool focal = call.program.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE);
  return by_storage<half_t, bfloat16_t>(
      call.dtype, [&](auto s) { return focal ? f(s, std::true_type()) : f(s, std::false_type()); });
}

// ---- labels --------------------------------------------------------------------------------------------------------

enum class Label { LIVE, IGNORED, BAD };  // BAD: outside [0, K), its row is NaN

ANL_DEVICE Label label_kind(const Call& call, int64_t y) {
  if (y == call.ignore_index) return Label::IGNORED;
  return y < 0 || y >= call.num_classes ? Label::BAD : Label::LIVE;
}

// Weight of the row in the loss: of a bad label 1, so that the others' denominator is a number.
template <class T>
ANL_DEVICE T row_weight(const Call& call, int64_t y, Label kind) {
  if (kind == Label::IGNORED) return T(0);
  return call.weight && kind == Label::LIVE ? static_cast<const T*>(call.weight)[y] : T(1);
}

// What the rows' gradients and the sum of losses are divided by. All threads of the CTA call this.
template <class T>
ANL_DEVICE double loss_denominator(const Params& p) {
  if (p.reduction != MEAN || p.call.op != Op::LOSS) return 1.0;
  double sum = 0.0;
  if (p.weight_parts) {
    for (int i = lane_index(); i < WEIGHT_PARTS; i += WARP) sum += p.weight_parts[i];
    return warp_reduce(sum, Add<double>());
  }
  ANL_STATIC_SHARED(double[WARP], shared);
  for (int64_t r = threadIdx.x; r < p.num_rows; r += blockDim.x) {
    const int64_t y = label_at(p.call, r);
    sum += double(row_weight<T>(p.call, y, label_kind(p.call, y)));
  }
  return block_reduce(sum, Add<double>(), shared);
}

// The loss from its parts, added up in order by one CTA.
template <class T>
ANL_DEVICE void add_loss_parts(const Params& p, double denominator) {
  ANL_STATIC_SHARED(double[WARP], shared);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < p.plan.loss_parts; i += blockDim.x) sum += p.loss_parts[i];
  sum = block_reduce(sum, Add<double>(), shared);
  if (threadIdx.x == 0) *static_cast<T*>(p.loss) = T(sum / denominator);
}

// The CTA's sum of losses (thread 0 has it) into the call's: the CTA that comes last adds the parts up, or launch_finish.
// All threads of the CTA call this.
template <class T>
ANL_DEVICE void finish_loss(const Params& p, int64_t part, double sum, double denominator) {
  if (!p.loss) return;
  const int64_t parts = p.plan.loss_parts;
  if (parts == 1) {
    if (threadIdx.x == 0) *static_cast<T*>(p.loss) = T(sum / denominator);
  } else if (!p.loss_ticket) {
    if (threadIdx.x == 0) p.loss_parts[part] = sum;
  } else {
    ANL_STATIC_SHARED(unsigned, last);
    __syncthreads();  // of a part before this one
    if (threadIdx.x == 0) {
      p.loss_parts[part] = sum;
      last = add_acq_rel(p.loss_ticket, 1) == unsigned(parts - 1);
    }
    __syncthreads();
    if (last) add_loss_parts<T>(p, denominator);
  }
}

// ---- the first sweep -----------------------------------------------------------------------------------------------

// Of the classes that exist besides the target. A stands for float or double: double where many parts are merged.
template <class A>
struct FirstSums {
  A max;    // -inf if there are none
  A min;    // +inf if there are none
  A tail;   // sum of exp(z_j - max)
  A gap;    // sum of max - z_j
  A count;

  static ANL_DEVICE FirstSums none() { return {A(-INF), A(INF), A(0), A(0), A(0)}; }

  // What the exponent is taken from while sums are made: max, and any number if that is none.
  ANL_DEVICE A anchor() const { return max == A(-INF) ? A(0) : max; }

  // max is known; x: a class, or -inf for what does not count. NaN and +inf leave a NaN in tail.
  ANL_DEVICE void add(A x, A anchor) {
    tail += exp_approx(x - anchor);
    add_gap(x, anchor);
  }
  ANL_DEVICE void add_gap(A x, A anchor) {
    const A d = x - anchor;
    if (d > A(-INF)) {
      gap -= d;
      min = x < min ? x : min;
      count += A(1);
    }
  }

  // The same for E of them, the smallest of which is `low`. Most often all exist, and need no looking at.
  template <int E>
  ANL_DEVICE void add_all(const A (&x)[E], A low, A anchor) {
#pragma unroll
    for (int j = 0; j < E; ++j) tail += exp_approx(x[j] - anchor);
    if (low > A(-INF)) {
#pragma unroll
      for (int j = 0; j < E; ++j) gap -= x[j] - anchor;
      min = low < min ? low : min;
      count += A(E);
    } else {
#pragma unroll
      for (int j = 0; j < E; ++j) add_gap(x[j], anchor);
    }
  }

  // The same sums relative to a larger max.
  ANL_DEVICE void rebase(A larger) {
    if (max == larger) return;
    tail *= Scalar<A>::exp(max - larger);
    if (count > A(0)) gap += count * (larger - max);
    max = larger;
  }
};

template <class B, class A>
ANL_DEVICE FirstSums<B> convert(const FirstSums<A>& s) {
  return {B(s.max), B(s.min), B(s.tail), B(s.gap), B(s.count)};
}

template <class A>
struct MergeFirst {
  ANL_DEVICE FirstSums<A> operator()(FirstSums<A> a, FirstSums<A> b) const {
    const A max = b.max > a.max ? b.max : a.max;
    a.rebase(max);
    b.rebase(max);
    return {max, b.min < a.min ? b.min : a.min, a.tail + b.tail, a.gap + b.gap, a.count + b.count};
  }
};

// ---- the second sweep ----------------------------------------------------------------------------------------------

// As RowStatistics, of the same classes; below_mass still has to be divided by the sum of exps.
template <class A>
struct SecondSums {
  A above_sum, above_count, below_mass;
  A focal_sum, focal_weight, focal_above_sum, focal_above_weight;  // zeros without FOCAL

  static ANL_DEVICE SecondSums none() { return {A(0), A(0), A(0), A(0), A(0), A(0), A(0)}; }
};

template <class B, class A>
ANL_DEVICE SecondSums<B> convert(const SecondSums<A>& s) {
  return {B(s.above_sum), B(s.above_count), B(s.below_mass), B(s.focal_sum),
          B(s.focal_weight), B(s.focal_above_sum), B(s.focal_above_weight)};
}

template <class A>
struct MergeSecond {
  ANL_DEVICE SecondSums<A> operator()(const SecondSums<A>& a, const SecondSums<A>& b) const {
    return {a.above_sum + b.above_sum,       a.above_count + b.above_count,
            a.below_mass + b.below_mass,     a.focal_sum + b.focal_sum,
            a.focal_weight + b.focal_weight, a.focal_above_sum + b.focal_above_sum,
            a.focal_above_weight + b.focal_above_weight};
  }
};

// exp(l) and 1 - exp(l) for l <= 0, the latter without cancellation.
template <class T>
ANL_DEVICE T exp_and_rest(T l, T& rest) {
  const T e = exp_approx(l);
  rest = l > T(-0.5) ? -Scalar<T>::expm1(l) : T(1) - e;
  return e;
}

// What the second sweep knows of its row.
template <class T>
struct SecondSweep {
  T max, log_sum;
  T threshold;    // z_j - max above it: above the clamp
  T floor;        // T - log_sum
  T focal_floor;
  double gamma;
  bool mass;

  template <bool FOCAL>
  ANL_DEVICE void add(SecondSums<T>& s, T x) const {
    const T d = x - max;
    const bool above = d > threshold;
    if (above) {
      s.above_sum += d + floor;
      s.above_count += T(1);
    }
    if constexpr (FOCAL) {
      const T l = d - log_sum;
      T rest;
      const T e = exp_and_rest(l, rest);
      const T w = focal_weight<Scalar<T>>(rest, gamma), wl = w * l;
      if (d > T(-INF)) {
        s.focal_sum -= wl;
        s.focal_weight += w;
      }
      if (above) {
        s.focal_above_sum += wl + focal_floor;
        s.focal_above_weight += w;
      } else {
        s.below_mass += e;  // divided already: see Row::take
      }
    } else if (mass) {
      s.below_mass += above ? T(0) : exp_approx(d);
    }
  }
};

// ---- the gradient --------------------------------------------------------------------------------------------------

// dL/dz_j of a row by the z_j alone; the target's apart.
template <class T>
struct GradientRow {
  T max, threshold;
  T slope, slope_above;    // of exp(z_j - max), or of p_j with FOCAL
  T offset, offset_above;
  T missing;               // of a class that does not exist: 0, or NaN in a NaN row
  T target;
  T log_sum, weight, weight_above;  // FOCAL
  double gamma;

  // Of a row that is not read: every logit stands for 0 here.
  static ANL_DEVICE GradientRow constant(T value) {
    return {T(0), T(0), T(0), T(0), value, value, value, value, T(0), T(0), T(0), 0.0};
  }

  template <bool FOCAL>
  ANL_DEVICE T at(T x) const {
    const T d = x - max;
    const bool above = d > threshold;
    const T a = above ? slope_above : slope, b = above ? offset_above : offset;
    T value;
    if constexpr (FOCAL) {
      T rest;
      const T p = exp_and_rest(d - log_sum, rest);
      value = p * a + (b + (above ? weight_above : weight) * focal_weight<Scalar<T>>(rest, gamma));
    } else {
      value = exp_approx(d) * a + b;
    }
    return d == T(-INF) ? missing : value;
  }

  // Whether at_plain gives the same, in a row all of whose classes exist.
  ANL_DEVICE bool plain() const { return slope == slope_above; }
  ANL_DEVICE T at_plain(T x) const {
    const T d = x - max;
    return exp_approx(d) * slope + (d > threshold ? offset_above : offset);
  }
};

// ---- a row between its sweeps --------------------------------------------------------------------------------------

template <class T>
struct Row {
  using M = Scalar<T>;

  RowStatistics<M> stats;
  T max, inv_sum;
  bool second;  // whether the second sweep has anything to find

  // After the first sweep. A NaN or +inf among the logits, or a target that does not exist, makes everything NaN.
  template <class A>
  ANL_DEVICE void begin(const Program& prog, FirstSums<A> first, T z_y) {
    first.rebase(A(z_y) > first.max ? A(z_y) : first.max);
    max = T(first.max);
    const bool bad = !(first.tail < A(INF)) || !(z_y > T(-INF));
    const T x_y = bad ? T(NOT_A_NUMBER) : z_y - max, tail = bad ? T(NOT_A_NUMBER) : T(first.tail);
    target_statistics<M>(stats, x_y, tail);
    inv_sum = T(1) / (tail + M::exp(x_y));
    stats.classes = T(first.count);
    stats.neg_log_sum = T(first.count * A(stats.log_sum) + first.gap);
    take(SecondSums<T>::none(), false);
    second = prog.needs != 0 && !bad;
    if (!second || prog.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE)) return;
    if (first.min - first.max > A(stats.log_sum) - A(prog.log_floor_neg)) {  // every class above the clamp
      stats.above_count = stats.classes;
      stats.above_sum = T(first.count * (A(prog.log_floor_neg) - A(stats.log_sum)) - first.gap);
      second = false;
    }
  }

  ANL_DEVICE SecondSweep<T> sweep(const Program& prog) const {
    return {max, stats.log_sum, stats.log_sum - T(prog.log_floor_neg), T(prog.log_floor_neg) - stats.log_sum,
            T(prog.focal_floor), prog.gamma, (prog.needs & NEED_ABOVE_MASS) != 0};
  }

  // After the second sweep. focal: its masses are probabilities.
  template <class A>
  ANL_DEVICE void take(const SecondSums<A>& s, bool focal) {
    stats.above_sum = T(s.above_sum);
    stats.above_count = T(s.above_count);
    stats.below_mass = focal ? T(s.below_mass) : T(s.below_mass) * inv_sum;
    stats.focal_sum = T(s.focal_sum);
    stats.focal_weight = T(s.focal_weight);
    stats.focal_above_sum = T(s.focal_above_sum);
    stats.focal_above_weight = T(s.focal_above_weight);
  }
};

// Coefficients (10, N) of row r from its gradient's, the whole multiplied by `scale`.
template <class T>
ANL_DEVICE void write_coefs(const Params& p, int64_t r, const T (&fields)[NUM_COEFS]) {
  T* out = static_cast<T*>(p.call.coefs) + r;
#pragma unroll
  for (int i = 0; i < NUM_COEFS; ++i) out[i * p.num_rows] = fields[i];
}

template <class T>
ANL_DEVICE GradientRow<T> gradient_row(const Program& prog, const T (&c)[NUM_COEFS], T factor, bool focal) {
  const T norm = focal ? factor : c[COEF_INV_SUM] * factor;
  const T a = c[COEF_A] * norm, b = c[COEF_B] * factor, bw = c[COEF_BW] * factor;
  const T nothing = c[COEF_INV_SUM] - c[COEF_INV_SUM];  // NaN in a NaN row
  GradientRow<T> g;
  g.max = c[COEF_MAX];
  g.log_sum = c[COEF_LOG_SUM];
  g.threshold = g.log_sum - T(prog.log_floor_neg);
  g.slope = a + nothing;
  g.slope_above = c[COEF_A_ABOVE] * norm + nothing;
  g.offset = b + nothing;
  g.offset_above = b + c[COEF_C] * factor + nothing;
  g.missing = nothing;
  g.target = c[COEF_TARGET] * factor + nothing;
  g.weight = bw;
  g.weight_above = bw + c[COEF_CW] * factor;
  g.gamma = prog.gamma;
  return g;
}

// The loss of a live row, weighted, and its gradient's coefficients; `writes`: this thread writes what is kept of it.
template <class T, bool FOCAL>
ANL_DEVICE T finish_row(const Params& p, int64_t r, const Row<T>& row, T weight, double denominator, bool writes,
                        GradientRow<T>& gradient) {
  Coefficients<Scalar<T>> g;
  const T loss = evaluate<Scalar<T>>(p.call.program, row.stats, g) * weight;
  const T scale = T(double(weight) / denominator);
  const T fields[NUM_COEFS] = {row.max,    row.inv_sum, g.a * scale,  g.b * scale,      g.a_above * scale,
                               g.c * scale, g.bw * scale, g.cw * scale, g.target * scale, row.stats.log_sum};
  gradient = gradient_row(p.call.program, fields, T(1), FOCAL);
  if (writes) {
    if (p.call.row_loss) static_cast<T*>(p.call.row_loss)[r] = loss;
    if (p.call.coefs) write_coefs(p, r, fields);
  }
  return loss;
}

// STATS: the table's row, by one thread. In double: what is 1 minus a small sum, or differs from another by one, has to
// keep the small part.
template <class T>
ANL_DEVICE void write_statistics(const Params& p, int64_t r, const Row<T>& row) {
  const RowStatistics<Scalar<T>>& s = row.stats;
  const RowStatistics<Scalar<double>> wide = {
      double(s.log_sum),     double(s.target_log_prob), double(s.target_tail),     double(s.target_prob),
      double(s.classes),     double(s.neg_log_sum),     double(s.above_sum),       double(s.above_count),
      double(s.below_mass),  double(s.focal_sum),       double(s.focal_weight),    double(s.focal_above_sum),
      double(s.focal_above_weight)};
  double fields[NUM_STATS];
  all_statistics<Scalar<double>>(p.call.program, wide, double(row.max), fields);
#pragma unroll
  for (int i = 0; i < NUM_STATS; ++i) p.call.stats[i * p.num_rows + r] = fields[i];
}

// A row that is not read: ignored (nothing) or with a bad label (NaN). By one thread; the gradient is the kernel's to
// write, from GradientRow::constant(unread_value). Returns its loss.
template <class T>
ANL_DEVICE T unread_value(Label kind) {
  return kind == Label::IGNORED ? T(0) : T(NOT_A_NUMBER);
}
template <class T>
ANL_DEVICE T write_unread_row(const Params& p, int64_t r, Label kind) {
  const T value = unread_value<T>(kind);
  if (p.call.op == Op::STATS) {
    for (int i = 0; i < NUM_STATS; ++i)
      p.call.stats[i * p.num_rows + r] = kind == Label::IGNORED ? p.ignored[i] : i == STAT_VALID ? 1.0 : NOT_A_NUMBER;
    return value;
  }
  if (p.call.row_loss) static_cast<T*>(p.call.row_loss)[r] = value;
  if (p.call.coefs) {
    const T fields[NUM_COEFS] = {T(0), value};
    write_coefs(p, r, fields);
  }
  return value;
}

// Of any row, one that does not exist included (not `writes`): its loss where `writes`, and its gradient.
template <class T, bool FOCAL>
ANL_DEVICE T finish_any_row(const Params& p, int64_t r, int64_t y, Label kind, const Row<T>& row, double denominator,
                            bool writes, GradientRow<T>& gradient) {
  const bool live = kind == Label::LIVE;
  gradient = GradientRow<T>::constant(unread_value<T>(kind));
  if (live && p.call.op != Op::STATS) {
    const T loss = finish_row<T, FOCAL>(p, r, row, row_weight<T>(p.call, y, kind), denominator, writes, gradient);
    return writes ? loss : T(0);
  }
  if (!writes) return T(0);
  if (!live) return write_unread_row<T>(p, r, kind);
  write_statistics(p, r, row);
  return T(0);
}

// A row as its coefficients (10, N) and grad_output describe it.
template <class T, bool FOCAL>
struct KnownRow {
  GradientRow<T> gradient;
  T inv_sum;
  bool unread;  // ignored, or NaN: its logits may be anything

  ANL_DEVICE KnownRow(const Params& p, int64_t r) {
    const Call& call = p.call;
    const T* coefs = static_cast<const T*>(call.coefs) + r;
    T fields[NUM_COEFS];
#pragma unroll
    for (int i = 0; i < NUM_COEFS; ++i) fields[i] = coefs[i * p.num_rows];
    inv_sum = fields[COEF_INV_SUM];
    unread = !(inv_sum > T(0));
    const T factor = static_cast<const T*>(call.grad_output)[r * call.grad_output_stride];
    gradient = unread ? GradientRow<T>::constant(inv_sum) : gradient_row(call.program, fields, factor, FOCAL);
  }

  // The target's class, or -1 where the row has none.
  ANL_DEVICE int64_t label(const Call& call, int64_t r) const {
    const int64_t y = unread ? -1 : label_at(call, r);
    return y >= 0 && y < call.num_classes ? y : -1;
  }
};

}  // namespace gpu
}  // namespace anl
