// The batch entropy's part of a row's gradient: scale p_j (log_q_j - sum_k p_k log_q_k).
//
// The mean of log_q is taken about zero, and once more about what that gave: what the first mean's rounding left out
// is then known too, and the difference keeps its digits where all log_q are nearly alike.
#pragma once

#include "scalar.cuh"

namespace anl {
namespace gpu {

// Sums of exp(z_k - max), and of that times log_q_k - center.
template <class A>
struct EntropySums {
  A mass, moment;
};

template <class A>
struct MergeEntropy {
  ANL_DEVICE EntropySums<A> operator()(EntropySums<A> a, EntropySums<A> b) const {
    return {a.mass + b.mass, a.moment + b.moment};
  }
};

template <class T>
struct EntropyRow {
  T max;           // the row's largest logit
  T slope;         // the term's scale over the sum of exp(z_k - max)
  T center, lost;  // the mean, in two parts

  static ANL_DEVICE EntropyRow begin(T max, T inv_sum, T scale) { return {max, scale * inv_sum, T(0), T(0)}; }

  ANL_DEVICE void add(EntropySums<T>& s, T x, T log_q) const {
    const T e = exp_approx(x - max);
    s.mass += e;
    s.moment += e * (log_q - center);
  }
  // After the first sweep for the mean, and after the second.
  template <class A>
  ANL_DEVICE void set_center(const EntropySums<A>& s) {
    center = T(s.moment / s.mass);
  }
  template <class A>
  ANL_DEVICE void set_lost(const EntropySums<A>& s) {
    lost = T(s.moment / s.mass);
  }
  ANL_DEVICE T at(T x, T log_q) const { return exp_approx(x - max) * slope * ((log_q - center) - lost); }
};

}  // namespace gpu
}  // namespace anl
