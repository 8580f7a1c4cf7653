// The gradient of a row whose classes lie side by side.
#pragma once

#include "row_sweeps.h"

namespace anl {
namespace ANL_ISA {
namespace {

using Coefs = double[NUM_COEFS];

// A row's gradient is `factor` times that of its coefficients. blocks: the first sweep's (whole blocks above or below
// the clamp then take the short loop), or null. kept: the first sweep's exps, or null.
struct GradientJob {
  int64_t r, y;
  const Coefs& coefs;
  double factor;
  const Block* blocks;
  const void* kept;
};

class RowGradients {
 public:
  // scratch: the blocks of a row, for the entropy term.
  RowGradients(const RowLayout& rows, Block* scratch)
      : rows_(rows), loops_(rows.loops), prog_(rows.call.program), parts_(gradient_parts(rows.call)),
        scratch_(scratch) {}

  // Writes it, the target's place included.
  void write(const GradientJob& job) const {
    if (rows_.call.log_q)
      entropy_gradient(job);
    else
      blocks_gradient(job);
  }

 private:
  // sum_k p_k log_q_k as center + sum_k p_k (log_q_k - center): the nearer the center, the fewer digits cancel where
  // the gradient takes the mean from log_q_j.
  double mean_log_q(const char* z, const char* log_q, double max, double center) const {
    center = rounded(center);
    rows_.each_block(false, [&](int64_t b, int64_t k0, int n) {
      loops_.moments(z + k0 * rows_.size, n, log_q + k0 * rows_.real_size, center, max, scratch_[b].moments);
    });
    double mass = 0.0, moment = 0.0;
    for (int64_t b = 0; b < rows_.num_blocks; ++b) {
      mass += scratch_[b].moments.mass;
      moment += scratch_[b].moments.moment;
    }
    return center + moment / mass;
  }

  double rounded(double x) const { return rows_.call.dtype == FLOAT64 ? x : double(float(x)); }

  // What p_j is exp(z_j - max) times, to GradientRow.
  double norm_of(const GradientJob& job) const { return parts_ & FOCAL_OFFSET ? 1.0 : job.coefs[COEF_INV_SUM]; }

  void blocks_gradient(const GradientJob& job) const {
    const char *z = rows_.logits(job.r), *exps = static_cast<const char*>(job.kept);
    char* g = rows_.grad(job.r);
    const double max = job.coefs[COEF_MAX], norm = norm_of(job);
    const auto row = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm);
    rows_.each_block(true, [&](int64_t b, int64_t k0, int n) {
      const Block* block = job.blocks ? job.blocks + b : nullptr;
      const bool exist = block && block->min != -INF, kept = exist && job.kept;
      bool mixed = true, missing = true;
      auto part = row;
      if (!(parts_ & FOCAL_OFFSET)) {
        const bool above = block && block->min - max > row.threshold;
        mixed = parts_ & CLAMPED && !above && !(block && block->max - max <= row.threshold);
        if (kept && block->max != max)
          part = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm * ScalarMath::exp(block->max - max));
        if (above) part = part.all_above();
        // What e_j multiplies is 0 where a class does not exist.
        missing = !kept && (mixed || (!exist && part.offset != 0.0));
      }
      const char* exps_of_block = kept ? exps + k0 * rows_.real_size : nullptr;
      loops_.gradient[kept][mixed][missing](z + k0 * rows_.size, g + k0 * rows_.size, n,
                                            rows_.target_in_block(job.y, k0, n), max, part, exps_of_block, NO_ENTROPY);
    });
  }

  void entropy_gradient(const GradientJob& job) const {
    const char *z = rows_.logits(job.r), *log_q = static_cast<const char*>(rows_.call.log_q);
    char* g = rows_.grad(job.r);
    const double max = job.coefs[COEF_MAX], norm = norm_of(job), scale = entropy_scale(rows_.call);
    const double mean = mean_log_q(z, log_q, max, mean_log_q(z, log_q, max, 0.0));
    const double p_y = exp(loops_.load(z + job.y * rows_.size) - max) * job.coefs[COEF_INV_SUM];
    const double center = rounded(mean);
    auto row = gradient_row<ScalarMath>(prog_, job.coefs, job.factor, norm);
    row.target += scale * p_y * (real_at(rows_.call, log_q, job.y) - mean);
    rows_.each_block(false, [&](int64_t, int64_t k0, int n) {
      const EntropySlope entropy = {log_q + k0 * rows_.real_size, center, mean - center, scale * norm};
      loops_.entropy_gradient(z + k0 * rows_.size, g + k0 * rows_.size, n, rows_.target_in_block(job.y, k0, n), max,
                              row, nullptr, entropy);
    });
  }

  const RowLayout& rows_;
  const Loops& loops_;
  const Program& prog_;
  const unsigned parts_;
  Block* scratch_;
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
