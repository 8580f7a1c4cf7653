// The mathematics of the loss family: a loss is f(statistics of a row), its gradient follows from f's partials.
//
// For a row of logits z with target y: lse = logsumexp(z), l_j = z_j - lse, p_j = exp(l_j), T = -log(min_prob),
// I_j = [l_j > -T], w_j = (1 - p_j)^gamma (held constant under differentiation, as the authors do).
//
//   dL/dz_j = (a + d I_j) p_j + b + c I_j + (bw + cw I_j) w_j + e [j = y]
//
// Everything is written over a policy M: M::V is a scalar or a vector of lanes (one row a lane), with
// M::set, exp, log, log1p, expm1, sqrt. Comparisons of two V give what `mask ? V : V` takes.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define ANL_HD __host__ __device__ __forceinline__
#else
#define ANL_HD inline __attribute__((always_inline))
#endif

namespace anl {

enum TermKind : int { CE, NCE, NNCE, FL, NFL, NNFL, MAE, RCE, GCE, AGCE, AUL, AEL, NUM_TERM_KINDS };

// Which statistics of the second sweep a loss reads.
enum Needs : unsigned { NEED_ABOVE = 1, NEED_ABOVE_MASS = 2, NEED_FOCAL = 4, NEED_FOCAL_ABOVE = 8 };

constexpr int MAX_TERMS = 16;

// A weighted sum of terms, and the one clamp and one focal exponent they share.
struct Program {
  int num_terms;
  int kind[MAX_TERMS];
  double coef[MAX_TERMS], p0[MAX_TERMS], p1[MAX_TERMS];
  double min_prob, gamma;
  double log_floor_neg;  // T = -log(min_prob)
  double focal_floor;    // A = (1 - min_prob)^gamma T
  unsigned needs;
};

constexpr unsigned term_needs(int kind) {
  return kind == NNCE ? NEED_ABOVE
         : kind == RCE ? (NEED_ABOVE | NEED_ABOVE_MASS)
         : kind == NFL ? NEED_FOCAL
         : kind == NNFL ? NEED_FOCAL_ABOVE
                        : 0u;
}

// What the sweeps over a row find. Sums leave the target out: with its part added by hand, what is equal in a loss and
// its gradient cancels exactly, however dominant the target or another class.
template <class M>
struct RowStatistics {
  using V = typename M::V;
  V log_sum;          // lse - max
  V target_log_prob;  // l_y
  V target_tail;      // 1 - p_y, from the sum without the target: exact as p_y -> 1
  V target_prob;      // p_y
  V classes;          // how many exist (logit > -inf) besides the target
  V neg_log_sum;      // sum_{j != y} -l_j, and so on
  V above_sum;        // I_j (T + l_j)
  V above_count;      // I_j
  V below_mass;       // (1 - I_j) p_j
  V focal_sum;        // -w_j l_j
  V focal_weight;     // w_j
  V focal_above_sum;  // I_j (A + w_j l_j)
  V focal_above_weight;  // I_j w_j
};

template <class M>
struct Coefficients {
  typename M::V a, b, c, bw, cw;
  typename M::V a_above;  // a + d: 1 - P would cancel in the sum
  typename M::V target;  // the whole gradient at j = y
};

// x^gamma for x >= 0. The published exponents avoid the logarithm.
template <class M>
ANL_HD typename M::V focal_weight(typename M::V x, double gamma) {
  using V = typename M::V;
  if (gamma == 0.5) return M::sqrt(x);
  if (gamma == 0.0) return M::set(1.0);
  if (gamma == 1.0) return x;
  if (gamma == 2.0) return x * x;
  const V zero = M::set(0.0);
  return x > zero ? M::exp(M::set(gamma) * M::log(x)) : zero;
}

// log_sum, l_y, p_y and 1 - p_y from the first sweep: x_y = z_y - max, tail = sum_{j != y} exp(z_j - max).
template <class M>
ANL_HD void target_statistics(RowStatistics<M>& s, typename M::V x_y, typename M::V tail) {
  using V = typename M::V;
  const V one = M::set(1.0);
  const V e_y = M::exp(x_y);
  const V sum = tail + e_y;
  // The largest logit's exp is 1: log1p of the others' keeps the digits that log(sum) would drop.
  s.log_sum = M::log1p(x_y == M::set(0.0) ? tail : (tail - one) + e_y);
  s.target_log_prob = x_y - s.log_sum;
  s.target_tail = tail / sum;
  s.target_prob = e_y / sum;
}

// f's partials by the statistics over all classes, and a without the part that P makes.
template <class M>
struct Partials {
  typename M::V a, S, U, P, F, G;
};

// Adds coef * term to the loss and its partials.
template <class M>
ANL_HD void add_term(const Program& prog, int t, const RowStatistics<M>& s, typename M::V w_y, typename M::V& loss,
                     Partials<M>& f) {
  using V = typename M::V;
  const V k = M::set(prog.coef[t]), zero = M::set(0.0), T = M::set(prog.log_floor_neg);
  const V l = s.target_log_prob, p = s.target_prob, tail = s.target_tail;
  const V infinity = M::set(__builtin_inf());
  const auto above = l > -T;
  const double p0 = prog.p0[t], p1 = prog.p1[t];
  switch (prog.kind[t]) {
    case CE:
      loss -= k * l;
      f.a += k;
      break;
    case NCE: {  // -l / S
      const V S = s.neg_log_sum - l, r = k / S;
      loss -= r * l;
      f.S += r * l / S;
      // Logits near the dtype's lowest, as masks write them, overflow the sum: the loss and its gradient are then 0.
      f.a += S < infinity ? r * (s.neg_log_sum + s.classes * l) / S : zero;
      break;
    }
    case NNCE: {  // 1 - I (T + l) / U
      const V U = s.above_sum + (T + l), r = above ? k / U : zero;
      const V v = above ? r * (T + l) : zero;
      loss += above ? r * s.above_sum : k;
      f.U += v / U;
      f.a += above ? r * (s.above_sum - s.above_count * (T + l)) / U : zero;
      break;
    }
    case FL:
      loss -= k * w_y * l;
      f.a += k * w_y;
      break;
    case NFL: {  // -w l / F
      const V F = s.focal_sum - w_y * l, r = k * w_y / F;
      loss -= r * l;
      f.F += r * l / F;
      f.a += F < infinity ? r * (s.focal_sum + s.focal_weight * l) / F : zero;
      break;
    }
    case NNFL: {  // 1 - I (A + w l) / G
      const V height = M::set(prog.focal_floor) + w_y * l;
      const V G = s.focal_above_sum + height, r = above ? k / G : zero;
      const V v = above ? r * height : zero;
      loss += above ? r * s.focal_above_sum : k;
      f.G += v / G;
      f.a += above ? r * (w_y * s.focal_above_sum - s.focal_above_weight * height) / G : zero;
      break;
    }
    case MAE:
      loss += k * tail;
      f.a += k * p;
      break;
    case RCE: {  // p0 sum_{k != y} max(p_k, min_prob)
      const V r = k * M::set(p0), mp = M::set(prog.min_prob);
      loss += r * (tail - s.below_mass + (s.classes - s.above_count) * mp);
      f.a += above ? r * p : zero;
      f.P += r;
      break;
    }
    case GCE:  // (1 - p^q) / q
      loss -= k * M::expm1(M::set(p0) * l) / M::set(p0);
      f.a += k * M::exp(M::set(p0) * l);
      break;
    case AGCE: {  // ((a + 1)^q - (a + p)^q) / q, from log(a + p) - log(a + 1) = log1p(-tail / (a + 1))
      const V lead = M::exp(M::set(p1) * M::log(M::set(p0 + 1.0)));
      const V ratio = M::log1p(-tail / M::set(p0 + 1.0));
      loss -= k * lead * M::expm1(M::set(p1) * ratio) / M::set(p1);
      f.a += k * lead * M::exp(M::set(p1) * ratio) / (M::set(p0) + p) * p;
      break;
    }
    case AUL: {  // ((a - p)^q - (a - 1)^q) / q, likewise
      const V lead = M::exp(M::set(p1) * M::log(M::set(p0 - 1.0)));
      const V ratio = M::log1p(tail / M::set(p0 - 1.0));
      loss += k * lead * M::expm1(M::set(p1) * ratio) / M::set(p1);
      f.a += k * lead * M::exp(M::set(p1) * ratio) / (M::set(p0 - 1.0) + tail) * p;
      break;
    }
    case AEL: {  // exp(-p / a)
      const V v = k * M::exp(-p / M::set(p0));
      loss += v;
      f.a += v * p / M::set(p0);
      break;
    }
  }
}

// The loss of a row and the coefficients of its gradient.
template <class M>
ANL_HD typename M::V evaluate(const Program& prog, const RowStatistics<M>& s, Coefficients<M>& g) {
  using V = typename M::V;
  const V zero = M::set(0.0), one = M::set(1.0);
  const V w_y = focal_weight<M>(s.target_tail, prog.gamma);
  V loss = zero;
  Partials<M> f = {zero, zero, zero, zero, zero, zero};
  for (int t = 0; t < prog.num_terms; ++t) add_term<M>(prog, t, s, w_y, loss, f);

  const V below_y = s.target_log_prob > M::set(-prog.log_floor_neg) ? zero : one;
  const V below = s.below_mass + below_y * s.target_prob;  // 1 - P
  g.a_above = f.a + below * f.P;
  g.a = g.a_above - f.P;
  g.b = -f.S;
  g.c = f.U;
  g.bw = -f.F;
  g.cw = f.G;
  // At the target the parts of a p_y + ... + e that are equal cancel by hand: what is left is exact as p_y -> 1.
  g.target = s.classes * f.S - s.above_count * f.U + s.focal_weight * f.F - s.focal_above_weight * f.G -
             f.a * s.target_tail + (below - below_y) * s.target_prob * f.P;
  return loss + (s.target_tail - s.target_tail);  // a NaN row is NaN in every loss
}

// Fields of the (10, N) coefficients, from which a gradient can be made later, and of the (13, N) statistics that a loss
// written in Python sees.
enum CoefField : int {
  COEF_MAX, COEF_INV_SUM, COEF_A, COEF_B, COEF_A_ABOVE, COEF_C, COEF_BW, COEF_CW, COEF_TARGET, COEF_LOG_SUM, NUM_COEFS
};
enum StatField : int {
  STAT_MAX, STAT_LOG_SUM, STAT_TARGET_LOG_PROB, STAT_NUM_CLASSES, STAT_NEG_LOG_SUM, STAT_ABOVE_SUM, STAT_ABOVE_MASS,
  STAT_ABOVE_COUNT, STAT_FOCAL_SUM, STAT_FOCAL_WEIGHT, STAT_FOCAL_ABOVE_SUM, STAT_FOCAL_ABOVE_WEIGHT, STAT_VALID,
  NUM_STATS
};

// The statistics over all classes; NaN for those that no sweep was asked for, and for a NaN row.
template <class M>
ANL_HD void all_statistics(const Program& prog, const RowStatistics<M>& s, typename M::V max,
                           typename M::V (&out)[NUM_STATS]) {
  using V = typename M::V;
  const V zero = M::set(0.0), one = M::set(1.0), absent = M::set(__builtin_nan(""));
  const V l = s.target_log_prob, w_y = focal_weight<M>(s.target_tail, prog.gamma);
  const V I_y = l > M::set(-prog.log_floor_neg) ? one : zero;
  const bool above = prog.needs, mass = prog.needs & NEED_ABOVE_MASS;
  const bool focal = prog.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE);
  const V poison = s.target_tail - s.target_tail;
  out[STAT_MAX] = max + poison;
  out[STAT_LOG_SUM] = s.log_sum;
  out[STAT_TARGET_LOG_PROB] = l;
  out[STAT_NUM_CLASSES] = s.classes + one + poison;
  out[STAT_NEG_LOG_SUM] = s.neg_log_sum - l;
  out[STAT_ABOVE_SUM] = above ? s.above_sum + I_y * (M::set(prog.log_floor_neg) + l) : absent;
  out[STAT_ABOVE_MASS] = mass ? one - (s.below_mass + (one - I_y) * s.target_prob) : absent;
  out[STAT_ABOVE_COUNT] = above ? s.above_count + I_y + poison : absent;
  out[STAT_FOCAL_SUM] = focal ? s.focal_sum - w_y * l : absent;
  out[STAT_FOCAL_WEIGHT] = focal ? s.focal_weight + w_y : absent;
  out[STAT_FOCAL_ABOVE_SUM] = focal ? s.focal_above_sum + I_y * (M::set(prog.focal_floor) + w_y * l) : absent;
  out[STAT_FOCAL_ABOVE_WEIGHT] = focal ? s.focal_above_weight + I_y * w_y : absent;
  out[STAT_VALID] = one;
}

}  // namespace anl
