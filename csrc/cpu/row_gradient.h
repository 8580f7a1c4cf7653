// The gradient of a row whose classes lie side by side.
#pragma once

#include "row_sweeps.h"

namespace anl {
namespace ANL_ISA {
namespace {

using Coefs = double[NUM_COEFS];

// A row's gradient is `factor` times that of its coefficients. blocks: the first sweep's (whole blocks above or below
// the clamp then take the short loop), or null. kept: the first sweep's exps, or null.
template <class T>
struct GradientJob {
  int64_t r, y;
  const Coefs& coefs;
  double factor;
  const Block* blocks;
  const T* kept;
};

template <class S>
class RowGradients {
  using T = typename Storage<S>::Acc;
  using Sw = Sweep<S>;

 public:
  // scratch: the blocks of a row, for the entropy term.
  RowGradients(const RowLayout<S>& rows, Block* scratch)
      : rows_(rows), prog_(rows.call.program), parts_(gradient_parts(rows.call)), scratch_(scratch) {}

  // Writes it, the target's place included.
  void write(const GradientJob<T>& job) const {
    if (rows_.call.log_q)
      entropy_gradient(job);
    else
      blocks_gradient(job);
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
  double norm_of(const GradientJob<T>& job) const { return parts_ & FOCAL_OFFSET ? 1.0 : job.coefs[COEF_INV_SUM]; }

  void blocks_gradient(const GradientJob<T>& job) const {
    const S* z = rows_.logits(job.r);
    S* g = rows_.grad(job.r);
    const double max = job.coefs[COEF_MAX], norm = norm_of(job);
    const auto row = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm);
    rows_.each_block(true, [&](int64_t b, int64_t k0, int n) {
      const Block* block = job.blocks ? job.blocks + b : nullptr;
      const bool exist = block && block->min != -INF, kept = exist && job.kept;
      unsigned parts = parts_;
      auto part = row;
      if (!(parts & FOCAL_OFFSET)) {
        const bool above = block && block->min - max > row.threshold;
        const bool mixed = parts & CLAMPED && !above && !(block && block->max - max <= row.threshold);
        if (kept) {
          const double scale = ScalarMath::exp(block->max - max);
          if (scale != 1.0) part = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm * scale);
        }
        if (above) part = part.all_above();
        if (!mixed) parts &= ~unsigned(CLAMPED);
        // What e_j multiplies is 0 where a class does not exist.
        if (kept || (!mixed && (exist || part.offset == 0.0))) parts &= ~unsigned(MISSING_CLASSES);
      }
      Sw::gradient_loop(parts, kept)(z + k0, g + k0, n, max, part, kept ? job.kept + k0 : nullptr, {});
    });
    store_one(g + job.y, T(row.target));
  }

  void entropy_gradient(const GradientJob<T>& job) const {
    const S* z = rows_.logits(job.r);
    S* g = rows_.grad(job.r);
    const T* log_q = static_cast<const T*>(rows_.call.log_q);
    const double max = job.coefs[COEF_MAX], norm = norm_of(job), scale = entropy_scale<T>(rows_.call);
    const double mean = mean_log_q(z, log_q, max, mean_log_q(z, log_q, max, 0.0));
    const double p_y = exp(double(load_one(z + job.y)) - max) * job.coefs[COEF_INV_SUM];
    const T center = T(mean), lost = T(mean - double(center));
    const auto row = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm);
    const auto loop = Sw::gradient_loop(parts_ | CLAMPED | EXTRA_SLOPE, false);
    rows_.each_block(false, [&](int64_t b, int64_t k0, int n) {
      loop(z + k0, g + k0, n, max, row, nullptr, {log_q + k0, center, lost, T(scale * norm)});
    });
    store_one(g + job.y, T(row.target + scale * p_y * (double(log_q[job.y]) - mean)));
  }

  const RowLayout<S>& rows_;
  const Program& prog_;
  const unsigned parts_;
  Block* scratch_;
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
