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

template <class M>
struct RowStatistics {
  using V = typename M::V;
  V log_sum;          // lse - max
  V target_log_prob;  // l_y
  V target_tail;      // 1 - p_y, from the sum without the target: exact as p_y -> 1
  V target_prob;      // p_y
  V num_classes;      // classes that exist in this row (logit > -inf)
  V neg_log_sum;      // S = sum_j -l_j
  V above_sum;        // U = sum_j I_j (T + l_j)
  V below_rest;       // sum_{j != y} (1 - I_j) p_j: small, so that neither P - p_y nor 1 - P cancels; P = above_mass
  V above_count;      // n = sum_j I_j
  V focal_sum;        // F = sum_j -w_j l_j
  V focal_weight;     // W = sum_j w_j
  V focal_above_sum;  // G = sum_j I_j (A + w_j l_j)
  V focal_above_weight;  // W+ = sum_j I_j w_j
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

// f and its partials by each statistic; f_lse = -f_l, f_target_logit = f_l for every built-in term.
template <class M>
struct Partials {
  typename M::V l, S, U, P, F, G;
};

// Adds coef * term to the loss and its partials.
template <class M>
ANL_HD void add_term(const Program& prog, int t, const RowStatistics<M>& s, typename M::V w_y, typename M::V& loss,
                     Partials<M>& f) {
  using V = typename M::V;
  const V k = M::set(prog.coef[t]), zero = M::set(0.0), T = M::set(prog.log_floor_neg);
  const V l = s.target_log_prob, p = s.target_prob, tail = s.target_tail;
  const auto above = l > -T;
  const double p0 = prog.p0[t], p1 = prog.p1[t];
  switch (prog.kind[t]) {
    case CE:
      loss -= k * l;
      f.l -= k;
      break;
    case NCE: {  // -l / S
      const V r = k / s.neg_log_sum;
      loss -= r * l;
      f.l -= r;
      f.S += r * l / s.neg_log_sum;
      break;
    }
    case NNCE: {  // 1 - I (T + l) / U
      const V r = above ? k / s.above_sum : zero;
      const V v = above ? r * (T + l) : zero;
      loss += k - v;
      f.l -= r;
      f.U += v / s.above_sum;
      break;
    }
    case FL:
      loss -= k * w_y * l;
      f.l -= k * w_y;
      break;
    case NFL: {  // -w l / F
      const V r = k * w_y / s.focal_sum;
      loss -= r * l;
      f.l -= r;
      f.F += r * l / s.focal_sum;
      break;
    }
    case NNFL: {  // 1 - I (A + w l) / G
      const V r = above ? k / s.focal_above_sum : zero;
      const V v = above ? r * (M::set(prog.focal_floor) + w_y * l) : zero;
      loss += k - v;
      f.l -= r * w_y;
      f.G += v / s.focal_above_sum;
      break;
    }
    case MAE:
      loss += k * tail;
      f.l -= k * p;
      break;
    case RCE: {  // p0 sum_{k != y} max(p_k, min_prob)
      const V r = k * M::set(p0), mp = M::set(prog.min_prob);
      const V rest = tail - s.below_rest + (s.num_classes - s.above_count) * mp - (above ? zero : mp);
      loss += r * rest;
      f.l -= above ? r * p : zero;
      f.P += r;
      break;
    }
    case GCE:  // (1 - p^q) / q
      loss -= k * M::expm1(M::set(p0) * l) / M::set(p0);
      f.l -= k * M::exp(M::set(p0) * l);
      break;
    case AGCE: {  // ((a + 1)^q - (a + p)^q) / q, from log(a + p) - log(a + 1) = log1p(-tail / (a + 1))
      const V lead = M::exp(M::set(p1) * M::log(M::set(p0 + 1.0)));
      const V ratio = M::log1p(-tail / M::set(p0 + 1.0));
      loss -= k * lead * M::expm1(M::set(p1) * ratio) / M::set(p1);
      f.l -= k * lead * M::exp(M::set(p1) * ratio) / (M::set(p0) + p) * p;
      break;
    }
    case AUL: {  // ((a - p)^q - (a - 1)^q) / q, likewise
      const V lead = M::exp(M::set(p1) * M::log(M::set(p0 - 1.0)));
      const V ratio = M::log1p(tail / M::set(p0 - 1.0));
      loss += k * lead * M::expm1(M::set(p1) * ratio) / M::set(p1);
      f.l -= k * lead * M::exp(M::set(p1) * ratio) / (M::set(p0 - 1.0) + tail) * p;
      break;
    }
    case AEL: {  // exp(-p / a)
      const V v = k * M::exp(-p / M::set(p0));
      loss += v;
      f.l -= v * p / M::set(p0);
      break;
    }
  }
}

// 1 - P: the probability of the classes below the clamp.
template <class M>
ANL_HD typename M::V below_mass(const Program& prog, const RowStatistics<M>& s) {
  const typename M::V zero = M::set(0.0);
  return s.below_rest + (s.target_log_prob > M::set(-prog.log_floor_neg) ? zero : s.target_prob);
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

  const V above = s.target_log_prob > M::set(-prog.log_floor_neg) ? one : zero;
  const V below = below_mass<M>(prog, s);
  const V a = s.num_classes * f.S - s.above_count * f.U + s.focal_weight * f.F - s.focal_above_weight * f.G - f.l;
  g.a_above = a + below * f.P;
  g.a = g.a_above - f.P;
  g.b = -f.S;
  g.c = f.U;
  g.bw = -f.F;
  g.cw = f.G;
  // At the target the parts of a p_y + ... + e that are equal cancel by hand: what is left is exact as p_y -> 1.
  g.target = (s.num_classes - one) * f.S - (s.above_count - above) * f.U + (s.focal_weight - w_y) * f.F -
             (s.focal_above_weight - above * w_y) * f.G - a * s.target_tail +
             (below - (one - above)) * s.target_prob * f.P;
  return loss + (s.target_tail - s.target_tail);  // a NaN row is NaN in every loss
}

}  // namespace anl
