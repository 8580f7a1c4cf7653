// The losses: each term's value and its partial derivatives by the statistics of a row (row_math.h).
#pragma once

#include "row_math.h"

namespace anl {

enum TermKind : int { CE, NCE, NNCE, FL, NFL, NNFL, MAE, RCE, GCE, AGCE, AUL, AEL, MSE, AMSE, EPS_CE, NUM_TERM_KINDS };

// f's partials by the statistics over all classes, and a without the parts that P and the others' squares make.
template <class M>
struct Partials {
  typename M::V a, S, U, P, F, G, Q;
};

// Adds factor * term to the loss and its partials; of FL the factor to `focal`, so that compilers do not prepare a power for
// every loss. Without FULL, terms for which a program needs_full are left out.
template <class M, bool FULL>
ANL_HD void add_term(const Program& prog, int t, const RowStatistics<M>& s, typename M::V& loss, Partials<M>& f,
                     double& focal) {
  using V = typename M::V;
  const V k = M::set(prog.factor[t]), zero = M::set(0.0), T = M::set(prog.clamp_height);
  const V l = s.target_log_prob, p = s.target_prob, tail = s.target_tail;
  const V infinity = M::set(__builtin_inf());
  const auto above = l > -T;
  const double p0 = prog.p0[t], p1 = prog.p1[t];
  const auto w_y = [&] { return focal_weight<M>(tail, prog.gamma); };
  switch (prog.kind[t]) {
    case CE:
      loss -= k * l;
      f.a += k;
      break;
    case NCE: {  // -l / S
      const V S = s.neg_log_sum - l, r = M::divide(k, S);
      loss -= r * l;
      f.S += M::divide(r * l, S);
      // Logits near the dtype's lowest, as masks write them, overflow the sum: the loss and its gradient are then 0.
      f.a += S < infinity ? M::divide(r * (s.neg_log_sum + s.classes * l), S) : zero;
      break;
    }
    case NNCE: {  // 1 - I (T + l) / U
      const V U = s.second[ABOVE_SUM] + (T + l), r = above ? M::divide(k, U) : zero;
      const V v = above ? r * (T + l) : zero;
      loss += above ? r * s.second[ABOVE_SUM] : k;
      f.U += M::divide(v, U);
      f.a += above ? M::divide(r * (s.second[ABOVE_SUM] - s.second[ABOVE_COUNT] * (T + l)), U) : zero;
      break;
    }
    case FL:
      focal += prog.factor[t];
      break;
    case NFL: {  // -w l / F
      if constexpr (!FULL) break;
      const V w = w_y(), F = s.second[FOCAL_SUM] - w * l, r = M::divide(k * w, F);
      loss -= r * l;
      f.F += M::divide(r * l, F);
      f.a += F < infinity ? M::divide(r * (s.second[FOCAL_SUM] + s.second[FOCAL_WEIGHT] * l), F) : zero;
      break;
    }
    case NNFL: {  // 1 - I (A + w l) / G
      if constexpr (!FULL) break;
      const V w = w_y(), height = M::set(prog.focal_clamp_height) + w * l;
      const V G = s.second[FOCAL_ABOVE_SUM] + height, r = above ? M::divide(k, G) : zero;
      const V v = above ? r * height : zero;
      loss += above ? r * s.second[FOCAL_ABOVE_SUM] : k;
      f.G += M::divide(v, G);
      f.a += above ? M::divide(r * (w * s.second[FOCAL_ABOVE_SUM] - s.second[FOCAL_ABOVE_WEIGHT] * height), G) : zero;
      break;
    }
    case MAE:
      loss += k * tail;
      f.a += k * p;
      break;
    case RCE: {  // p0 sum_{k != y} max(p_k, min_prob)
      const V r = k * M::set(p0), mp = M::set(prog.min_prob);
      loss += r * (tail - s.second[BELOW_MASS] + (s.classes - s.second[ABOVE_COUNT]) * mp);
      f.a += above ? r * p : zero;
      f.P += r;
      break;
    }
    case GCE:  // (1 - p^q) / q
      loss -= M::divide(k * M::expm1(M::set(p0) * l), M::set(p0));
      f.a += k * M::exp(M::set(p0) * l);
      break;
    case AGCE: {  // ((a + 1)^q - (a + p)^q) / q, from log(a + p) - log(a + 1) = log1p(-tail / (a + 1))
      const V lead = M::exp(M::set(p1) * M::log(M::set(p0 + 1.0)));
      const V ratio = M::log1p(M::divide(-tail, M::set(p0 + 1.0)));
      loss -= M::divide(k * lead * M::expm1(M::set(p1) * ratio), M::set(p1));
      f.a += M::divide(k * lead * M::exp(M::set(p1) * ratio), M::set(p0) + p) * p;
      break;
    }
    case AUL: {  // ((a - p)^q - (a - 1)^q) / q, likewise
      const V lead = M::exp(M::set(p1) * M::log(M::set(p0 - 1.0)));
      const V ratio = M::log1p(M::divide(tail, M::set(p0 - 1.0)));
      loss += M::divide(k * lead * M::expm1(M::set(p1) * ratio), M::set(p1));
      f.a += M::divide(k * lead * M::exp(M::set(p1) * ratio), M::set(p0 - 1.0) + tail) * p;
      break;
    }
    case AEL: {  // exp(-p / a)
      const V v = k * M::exp(M::divide(-p, M::set(p0)));
      loss += v;
      f.a += M::divide(v * p, M::set(p0));
      break;
    }
    case MSE:
    case AMSE: {  // sum_j p_j^2 - 2 a p + a^2 = (a - p)^2 + sum_{j != y} p_j^2, over K in AMSE; a is 1 in MSE
      if constexpr (!FULL) break;
      const bool mean = prog.kind[t] == AMSE;
      const V r = mean ? M::divide(k, s.classes + M::set(1.0)) : k, gap = mean ? M::set(p0 - 1.0) + tail : tail;
      loss += r * (gap * gap + s.squares);
      f.a += M::set(2.0) * r * p * gap;
      f.Q += r;
      break;
    }
    case EPS_CE: {  // -log((p + m [y is the top]) / (1 + m)); p0 = m, p1 = log(1 + m)
      const auto top = s.x_y == zero;
      loss += k * (top ? -M::log1p(M::divide(-tail, M::set(p0 + 1.0))) : M::set(p1) - l);
      f.a += top ? M::divide(k * p, p + M::set(p0)) : k;
      break;
    }
  }
}

// The loss of a row, and COEF_A to COEF_TARGET of its gradient: a + d stands in A_ABOVE, as 1 - P would cancel in the sum;
// TARGET is the whole gradient at j = y.
template <class M, bool FULL = true>
ANL_HD typename M::V evaluate(const Program& prog, const RowStatistics<M>& s, typename M::V (&g)[NUM_COEFS]) {
  using V = typename M::V;
  const V zero = M::set(0.0), one = M::set(1.0);
  V loss = zero;
  Partials<M> f = {zero, zero, zero, zero, zero, zero, zero};
  double focal = 0.0;
  for (int t = 0; t < prog.num_terms; ++t) add_term<M, FULL>(prog, t, s, loss, f, focal);
  if (focal != 0.0) {  // FL
    const V kw = M::set(focal) * focal_weight<M>(s.target_tail, prog.gamma);
    loss -= kw * s.target_log_prob;
    f.a += kw;
  }

  const V below_y = s.target_log_prob > M::set(-prog.clamp_height) ? zero : one;
  const V below = s.second[BELOW_MASS] + below_y * s.target_prob;  // 1 - P
  const V square = M::set(2.0) * f.Q;
  g[COEF_A_ABOVE] = f.a + below * f.P;
  if constexpr (FULL) g[COEF_A_ABOVE] += square * s.below_top;
  g[COEF_A] = g[COEF_A_ABOVE] - f.P;
  g[COEF_B] = -f.S;
  g[COEF_C] = f.U;
  g[COEF_BW] = -f.F;
  g[COEF_CW] = f.G;
  g[COEF_SQUARE] = square;
  // At the target the parts of a p_y + ... + e that are equal cancel by hand: what is left is exact as p_y -> 1.
  V target = s.classes * f.S - s.second[ABOVE_COUNT] * f.U;
  if constexpr (FULL) target += s.second[FOCAL_WEIGHT] * f.F - s.second[FOCAL_ABOVE_WEIGHT] * f.G;
  target += (below - below_y) * s.target_prob * f.P - f.a * s.target_tail;
  if constexpr (FULL) target -= square * s.squares * s.target_prob;
  g[COEF_TARGET] = target;
  return loss + (s.target_tail - s.target_tail);  // a NaN row is NaN in every loss
}

}  // namespace anl
