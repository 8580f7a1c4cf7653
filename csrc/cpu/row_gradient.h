// The gradient of a row whose classes lie side by side.
#pragma once

#include "row_sweeps.h"

namespace anl {
namespace ANL_ISA {
namespace {

using Coefs = double[NUM_COEFS];

// A row's gradient is `factor` times that of its coefficients. blocks: the first sweep's (whole blocks above or below
// the clamp then take the short loop), or null. kept: the first sweep's exps, or null.
template <bool FULL, class T>
struct GradientJob {
  int64_t r, y;
  const Coefs& coefs;
  double factor;
  const Block<FULL>* blocks;
  const T* kept;
};

template <class S, bool FULL>
class RowGradients {
  using T = typename Storage<S>::Acc;
  using Sw = Sweep<S>;

 public:
  // scratch: the blocks of a row, for the entropy term.
  RowGradients(const RowLayout<S>& rows, Block<FULL>* scratch)
      : rows_(rows), prog_(rows.call.program), scratch_(scratch) {}

  // Writes it, the target's place included.
  void write(const GradientJob<FULL, T>& job) const {
    by_gradient_parts<FULL>(prog_, [&](auto parts) {
      if (rows_.call.log_q)
        entropy_gradient<parts.value>(job);
      else
        blocks_gradient<parts.value>(job);
    });
  }

 private:
  // sum_k p_k log_q_k as center + sum_k p_k (log_q_k - center): the nearer the center, the fewer digits cancel where
  // the gradient takes the mean from log_q_j.
  double mean_log_q(const S* z, const T* log_q, double max, double center) const {
    const T c = T(center);
    rows_.each_block(false, [&](int64_t b, int64_t k0, int n) {
      Sw::moments(z + k0, n, log_q + k0, c, max, scratch_[b].moments);
    });
    double mass = 0.0, moment = 0.0;
    for (int64_t b = 0; b < rows_.num_blocks; ++b) {
      mass += scratch_[b].moments.mass;
      moment += scratch_[b].moments.moment;
    }
    return double(c) + moment / mass;
  }

  // What p_j is exp(z_j - max) times, to GradientRow.
  template <unsigned PARTS>
  static double norm_of(const GradientJob<FULL, T>& job) {
    return PARTS & FOCAL_OFFSET ? 1.0 : job.coefs[COEF_INV_SUM];
  }

  template <unsigned PARTS>
  void blocks_gradient(const GradientJob<FULL, T>& job) const {
    constexpr unsigned UNCLAMPED = PARTS & ~unsigned(CLAMPED), EXISTING = ~unsigned(MISSING_CLASSES);
    constexpr Constant<true> KEPT;
    constexpr Constant<false> ANEW;
    const S* z = rows_.logits(job.r);
    S* g = rows_.grad(job.r);
    const double max = job.coefs[COEF_MAX], norm = norm_of<PARTS>(job);
    const auto row = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm);
    rows_.each_block(true, [&](int64_t b, int64_t k0, int n) {
      const Block<FULL>* block = job.blocks ? job.blocks + b : nullptr;
      const bool exist = block && block->min != -INF, kept = exist && job.kept;
      const T* e = kept ? job.kept + k0 : nullptr;
      const auto run = [&](auto parts, auto from, const GradientRow<ScalarMath>& part) {
        Sw::template gradient<parts.value, from.value>(z + k0, g + k0, n, max, part, e, {});
      };
      if constexpr (PARTS & FOCAL_OFFSET) {
        run(Constant<PARTS>(), ANEW, row);
      } else {
        const bool above = block && block->min - max > row.threshold;
        const bool mixed = PARTS & CLAMPED && !above && !(block && block->max - max <= row.threshold);
        auto part = row;
        if (kept) {
          const double scale = ScalarMath::exp(block->max - max);
          if (scale != 1.0) part = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm * scale);
        }
        if (above) part = part.all_above();
        if (mixed && kept)
          run(Constant<PARTS & EXISTING>(), KEPT, part);
        else if (mixed)
          run(Constant<PARTS>(), ANEW, part);
        else if (kept)
          run(Constant<UNCLAMPED & EXISTING>(), KEPT, part);
        else if (exist || part.offset == 0.0)  // what e_j multiplies is 0 where a class does not exist
          run(Constant<UNCLAMPED & EXISTING>(), ANEW, part);
        else
          run(Constant<UNCLAMPED>(), ANEW, part);
      }
    });
    store_one(g + job.y, T(row.target));
  }

  template <unsigned PARTS>
  void entropy_gradient(const GradientJob<FULL, T>& job) const {
    const S* z = rows_.logits(job.r);
    S* g = rows_.grad(job.r);
    const T* log_q = static_cast<const T*>(rows_.call.log_q);
    const double max = job.coefs[COEF_MAX], norm = norm_of<PARTS>(job), scale = entropy_scale<T>(rows_.call);
    const double mean = mean_log_q(z, log_q, max, mean_log_q(z, log_q, max, 0.0));
    const double p_y = exp(double(load_one(z + job.y)) - max) * job.coefs[COEF_INV_SUM];
    const T center = T(mean), lost = T(mean - double(center));
    const auto row = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm);
    rows_.each_block(false, [&](int64_t b, int64_t k0, int n) {
      Sw::template gradient<PARTS | CLAMPED | EXTRA_SLOPE, false>(z + k0, g + k0, n, max, row, nullptr,
                                                                  {log_q + k0, center, lost, T(scale * norm)});
    });
    store_one(g + job.y, T(row.target + scale * p_y * (double(log_q[job.y]) - mean)));
  }

  const RowLayout<S>& rows_;
  const Program& prog_;
  Block<FULL>* scratch_;
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
