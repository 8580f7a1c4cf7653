// A CTA's share of a long row, wherever its 16-byte packs are kept: the sweeps over it, and the merging of what they find.
//
// What lies between two 16-byte boundaries is the body of a row, read and written in packs. The few classes before and
// after it are the edges, one a thread. A thread meets the same packs and the same edge class in every sweep, several
// packs at a time, so that their exps are independent.
#pragma once

#include "row_common.cuh"

namespace anl {
namespace gpu {

template <class S>
constexpr int TILE_PACKS = sizeof(S) == 8 ? 2 : 4;  // that a thread takes at a time

ANL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number, the number
ANL_DEVICE double larger(double a, double b) { return fmax(a, b); }
ANL_DEVICE float smaller(float a, float b) { return fminf(a, b); }
ANL_DEVICE double smaller(double a, double b) { return fmin(a, b); }

template <int U>
struct Count {
  static constexpr int value = U;
};

// f(Count<U>(), i) for the thread's packs i, i + blockDim.x, ... (U of them) of [begin, end).
template <int U, class F>
ANL_DEVICE void each_tile(int begin, int end, const F& f) {
  const int step = int(blockDim.x);
  int i = begin + int(threadIdx.x);
  for (; i + (U - 1) * step < end; i += U * step) f(Count<U>(), i);
  for (; i < end; i += step) f(Count<1>(), i);
}

// Packs [first, first + packs) of a row's body and, if it has them, the row's edges.
template <class S>
struct Share {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;

  const S* logits;  // of the first pack
  S* grad;          // likewise, or null
  int packs;
  int target;       // as an element of the packs, if they hold it; else -1
  const S* edge;    // the thread's edge class, or null
  S* edge_grad;
  bool edge_is_target;

  ANL_DEVICE Share(const S* row, S* row_grad, int64_t num_classes, int64_t y, int64_t first, int64_t most, bool edges) {
    const int64_t shift = int64_t(reinterpret_cast<uintptr_t>(row) / sizeof(S) % P);
    const int64_t head = shift ? (P - shift < num_classes ? P - shift : num_classes) : 0;
    const int64_t body = (num_classes - head) / P, left = body - first;
    packs = int(left < 0 ? 0 : left < most ? left : most);
    const int64_t k0 = head + first * P;
    logits = row + k0;
    grad = row_grad ? row_grad + k0 : nullptr;
    target = y >= k0 && y < k0 + int64_t(packs) * P ? int(y - k0) : -1;
    const int64_t t = threadIdx.x, k = t < P ? (t < head ? t : num_classes) : head + body * P + (t - P);
    const bool has = edges && t < 2 * P && k < num_classes;
    edge = has ? row + k : nullptr;
    edge_grad = has && row_grad ? row_grad + k : nullptr;
    edge_is_target = has && k == y;
  }

  // The edge class's logit, or -inf if it is in no sum.
  ANL_DEVICE T edge_logit() const { return edge && !edge_is_target ? widen(*edge) : minus_inf<T>(); }

  // The classes of U packs.
  template <int U, class Load>
  ANL_DEVICE void load_classes(int i, const Load& load_pack, T (&x)[U * P]) const {
    const int step = int(blockDim.x);
    uint4 bits[U];
#pragma unroll
    for (int u = 0; u < U; ++u) bits[u] = load_pack(i + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      T pack[P];
      widen_pack<S>(bits[u], pack);
#pragma unroll
      for (int v = 0; v < P; ++v) x[u * P + v] = pack[v];
    }
  }

  // The same, the target's -inf.
  template <int U, class Load>
  ANL_DEVICE void load_others(int i, const Load& load_pack, T (&x)[U * P]) const {
    load_classes<U>(i, load_pack, x);
    put_target(i, x, minus_inf<T>());
  }

  // `value` in the target's place, if that is among the classes of these U packs.
  template <int E>
  ANL_DEVICE void put_target(int i, T (&x)[E], T value) const {
    constexpr int U = E / P;
    const int step = int(blockDim.x), away = target / P - i;
    if (target < 0 || unsigned(away) > unsigned((U - 1) * step) || away % step) return;
    const int at = away / step * P + target % P;
#pragma unroll
    for (int j = 0; j < E; ++j) x[j] = j == at ? value : x[j];
  }

  // load(i): pack i. Adds the packs [begin, end) to the thread's sums.
  template <class Load>
  ANL_DEVICE void first_sweep(FirstSums<T>& sums, int begin, int end, const Load& load_pack) const {
    each_tile<TILE_PACKS<S>>(begin, end, [&](auto count, int i) {
      T x[decltype(count)::value * P];
      load_others<decltype(count)::value>(i, load_pack, x);
      add_tile(sums, x);
    });
  }

  template <bool FOCAL, class Load>
  ANL_DEVICE void second_sweep(SecondSums<T>& sums, const SecondSweep<T>& sweep, int begin, int end,
                               const Load& load_pack) const {
    each_tile<TILE_PACKS<S>>(begin, end, [&](auto count, int i) {
      constexpr int E = decltype(count)::value * P;
      T x[E];
      load_others<decltype(count)::value>(i, load_pack, x);
#pragma unroll
      for (int j = 0; j < E; ++j) sweep.template add<FOCAL>(sums, x[j]);
    });
  }

  // The gradient of the packs [begin, end): `value` of each class but the target.
  template <Cache C, class Value, class Load>
  ANL_DEVICE void write_packs(const Value& value, T target_value, int begin, int end, const Load& load_pack) const {
    const int step = int(blockDim.x);
    each_tile<TILE_PACKS<S>>(begin, end, [&](auto count, int i) {
      constexpr int U = decltype(count)::value;
      T x[U * P];
      load_classes<U>(i, load_pack, x);
#pragma unroll
      for (T& v : x) v = value(v);
      put_target(i, x, target_value);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        T pack[P];
#pragma unroll
        for (int v = 0; v < P; ++v) pack[v] = x[u * P + v];
        store16<C>(grad + int64_t(i + u * step) * P, narrow_pack<S>(pack));
      }
    });
  }

  // all_exist: no class of the row is missing.
  template <bool FOCAL, Cache C, class Load>
  ANL_DEVICE void write_gradient(const GradientRow<T>& gradient, bool all_exist, int begin, int end,
                                 const Load& load_pack) const {
    if constexpr (!FOCAL) {
      if (all_exist && gradient.plain()) {
        const auto value = [&](T x) { return gradient.at_plain(x); };
        return write_packs<C>(value, gradient.target, begin, end, load_pack);
      }
    }
    const auto value = [&](T x) { return gradient.template at<FOCAL>(x); };
    write_packs<C>(value, gradient.target, begin, end, load_pack);
  }

  // The same where the gradient's packs lie elsewhere than the logits': neighbouring threads take neighbouring classes.
  template <bool FOCAL, class Load>
  ANL_DEVICE void write_elements(const GradientRow<T>& gradient, int begin, int end, const Load& load_element) const {
    for (int j = begin * P + int(threadIdx.x); j < end * P; j += int(blockDim.x)) {
      const T value = gradient.template at<FOCAL>(widen(load_element(j)));
      grad[j] = narrow<S>(j == target ? gradient.target : value);
    }
  }

  template <bool FOCAL>
  ANL_DEVICE void write_edge(const GradientRow<T>& gradient, T logit) const {
    if (edge_grad) *edge_grad = narrow<S>(edge_is_target ? gradient.target : gradient.template at<FOCAL>(logit));
  }

  // The gradient of a row that is not read.
  ANL_DEVICE void fill(T value, bool whole_packs) const {
    const S element = narrow<S>(value);
    T x[P];
#pragma unroll
    for (T& v : x) v = value;
    const uint4 bits = narrow_pack<S>(x);
    if (whole_packs)
      for (int i = threadIdx.x; i < packs; i += blockDim.x) store16<Cache::STREAM>(grad + int64_t(i) * P, bits);
    else
      for (int j = threadIdx.x; j < packs * P; j += blockDim.x) grad[j] = element;
    if (edge_grad) *edge_grad = element;
  }

  template <int E>
  static ANL_DEVICE void add_tile(FirstSums<T>& sums, const T (&x)[E]) {
    T high = x[0], low = x[0];
#pragma unroll
    for (int j = 1; j < E; ++j) {
      high = larger(high, x[j]);
      low = smaller(low, x[j]);
    }
    if (high > sums.max) sums.rebase(high);
    sums.template add_all<E>(x, low, sums.anchor());
  }
};

// One class more, outside the tiles; -inf: none.
template <class T>
ANL_DEVICE void add_edge(FirstSums<T>& sums, T x) {
  if (x > sums.max) sums.rebase(x);
  sums.add(x, sums.anchor());
}

// ---- merging, in an order that depends on the number of threads alone --------------------------------------------------

template <class A>
ANL_DEVICE FirstSums<A> warp_merge(FirstSums<A> s) {
  s.rebase(warp_reduce(s.max, Largest<A>()));
  s.min = warp_reduce(s.min, Smallest<A>());
  s.tail = warp_reduce(s.tail, Add<A>());
  s.gap = warp_reduce(s.gap, Add<A>());
  s.count = warp_reduce(s.count, Add<A>());
  return s;
}
template <class A>
ANL_DEVICE SecondSums<A> warp_merge(const SecondSums<A>& s) {
  return warp_reduce(s, MergeSecond<A>());
}

// Of all threads' sums, in every lane of warp 0. `shared` has a place for every warp; a __syncthreads stands between two
// uses of it.
template <template <class> class Sums, class A>
ANL_DEVICE Sums<double> block_merge(const Sums<A>& own, Sums<double>* shared) {
  const unsigned warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const Sums<A> s = warp_merge(own);
  if (lane_index() == 0) shared[warp] = convert<double>(s);
  __syncthreads();
  if (warp > 0) return Sums<double>::none();
  return warp_merge(lane_index() < warps ? shared[lane_index()] : Sums<double>::none());
}

}  // namespace gpu
}  // namespace anl
