// The gradient of a row, of logits as they are stored.
#pragma once

#include "sums.cuh"

namespace anl {
namespace gpu {

// row_math.h's gradient of logits as they are stored, in a lean or a full kernel.
template <class T, bool FULL>
struct RowGradient {
  using M = Scalar<T>;

  GradientRow<M> row;  // its slopes are those of `exps`
  T max, bound;
  ClassExps<T, FULL> exps;

  // A row that is not read: every logit stands for 0 here.
  static ANL_DEVICE RowGradient constant(T value) { return {GradientRow<M>::constant(value)}; }

  // `factor` times the gradient of these coefficients.
  static ANL_DEVICE RowGradient of_coefs(const Program& prog, const T (&coefs)[NUM_COEFS], T factor) {
    const T max = coefs[COEF_MAX], log_sum = coefs[COEF_LOG_SUM];
    const auto exps = ClassExps<T, FULL>::about(max);
    RowGradient g = {gradient_row<M>(prog, coefs, factor, norm_of<FULL>(prog, coefs[COEF_INV_SUM])), max,
                     clamp_bound(max, log_sum, M::set(prog.clamp_height)), exps};
    if constexpr (!FULL) {
      const T correction = exps.correction(max);
      g.row.slope *= correction;
      g.row.slope_above *= correction;
    }
    return g;
  }

  template <unsigned PARTS>
  ANL_DEVICE T at(T z) const {
    return at<PARTS>(z, exps.at(z));
  }
  // The gradient in the place of logits.
  template <unsigned PARTS, int E>
  ANL_DEVICE void replace(T (&z)[E]) const {
    if constexpr (std::is_same_v<T, float> && !FULL) {
      float l[E];
      exps.log2_of(z, l);
#pragma unroll
      for (int j = 0; j < E; ++j) z[j] = at<PARTS>(z[j], exp2_approx(l[j]));
    } else {
      each_of<bool(PARTS & FOCAL_OFFSET)>(z, [&](T& v) { v = at<PARTS>(v); });
    }
  }
  // e: exps.at(z), or what was kept of it.
  template <unsigned PARTS>
  ANL_DEVICE T at(T z, T e) const {
    return row.template at<PARTS & ~unsigned(EXTRA_SLOPE)>(z > bound, FULL ? z - max : z, e, e);
  }

  // Whether all classes are above the clamp, the smallest logit being `low`; and the row as they see it.
  ANL_DEVICE bool all_above(T low) const { return low > bound; }
  ANL_DEVICE RowGradient all_above() const {
    RowGradient g = *this;
    g.row = row.all_above();
    return g;
  }
};

template <unsigned PARTS>
struct Parts {
  static constexpr unsigned value = PARTS;
};

// f(Parts<...>()) with what the gradient of the program's losses can depend on: asked before a row's classes, not for each.
template <bool FULL, class F>
ANL_DEVICE void by_parts(const Program& prog, const F& f) {
  if constexpr (FULL) {
    if (needs_focal(prog)) return f(Parts<FOCAL_PARTS>());
    f(Parts<FULL_PARTS>());
  } else {
    f(Parts<LEAN_PARTS>());
  }
}

}  // namespace gpu
}  // namespace anl
