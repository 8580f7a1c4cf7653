// The part of a long row in global memory that a CTA takes: the sweeps over it, wherever its 16-byte packs are kept.
//
// What lies between two 16-byte boundaries is the body of a row, read and written in packs. The few classes before and
// after it are the edges, one per thread. A thread meets the same packs and the same edge class in every sweep, several
// packs at a time, so that their exps are independent.
#pragma once

#include "results.cuh"

namespace anl {
namespace gpu {

template <class S>
constexpr int TILE_PACKS = sizeof(S) == 8 ? 2 : 4;  // that a thread takes at a time
// In full kernels 4 packs of half precision do not fit in its registers.
template <class S, bool FULL>
constexpr int FULL_PACKS = FULL && sizeof(S) == 2 ? 2 : TILE_PACKS<S>;

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

// Packs [first, first + packs) of a row's body and, if `edges`, the row's edges.
template <class S>
struct GlobalRowPart {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;

  const S* logits;  // of the first pack
  S* grad;          // likewise, or null
  int packs;
  int target;       // as an element of the packs, if they hold it; else -1
  const S* edge;    // the thread's edge class, or null
  S* edge_grad;
  bool edge_is_target;

  // most: packs that the part has at most.
  ANL_DEVICE GlobalRowPart(const S* row, S* row_grad, int64_t num_classes, int64_t y, int64_t first, int64_t most,
                           bool edges) {
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

  // The same, with -inf in the target's place.
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

  // Adds the packs [begin, end) to the thread's sums. load(i): pack i.
  template <bool FULL, class Load>
  ANL_DEVICE void first_sweep(AnchoredSums<T, FULL>& sums, int begin, int end, const Load& load_pack) const {
    each_tile<FULL_PACKS<S, FULL>>(begin, end, [&](auto count, int i) {
      T z[decltype(count)::value * P];
      load_others<decltype(count)::value>(i, load_pack, z);
      add_tile(sums, z);
    });
  }

  template <bool FULL, class Load>
  ANL_DEVICE void second_sweep(SecondSums<Scalar<T>, FULL>& sums, const RowSweep<T>& sweep, int begin, int end,
                               const Load& load_pack) const {
    sweep.run(sums, [&](const auto& add) {
      each_tile<FULL_PACKS<S, FULL>>(begin, end, [&](auto count, int i) {
        T z[decltype(count)::value * P];
        load_others<decltype(count)::value>(i, load_pack, z);
#pragma unroll
        for (T v : z) add(v);
      });
    });
  }

  // The gradient of the packs [begin, end): `value` of each class but the target.
  template <Cache C, bool FULL, class Value, class Load>
  ANL_DEVICE void write_packs(const Value& value, T target_value, int begin, int end, const Load& load_pack) const {
    const int step = int(blockDim.x);
    each_tile<FULL_PACKS<S, FULL>>(begin, end, [&](auto count, int i) {
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
  template <bool FULL, Cache C, class Load>
  ANL_DEVICE void write_gradient(const Program& program, const RowGradient<T>& gradient, bool all_exist, int begin,
                                 int end, const Load& load_pack) const {
    const auto write = [&](auto parts) {
      const auto value = [&](T z) { return gradient.template at<decltype(parts)::value>(z); };
      write_packs<C, FULL>(value, gradient.row.target, begin, end, load_pack);
    };
    if constexpr (!FULL)
      if (all_exist && gradient.row.slope == gradient.row.slope_above) return write(Parts<CLAMPED_OFFSET>());
    by_parts<FULL>(program, write);
  }

  // The same where the gradient's packs lie elsewhere than the logits': neighbouring threads take neighbouring classes.
  template <bool FULL, class Load>
  ANL_DEVICE void write_elements(const Program& program, const RowGradient<T>& gradient, int begin, int end,
                                 const Load& load_element) const {
    by_parts<FULL>(program, [&](auto parts) {
      for (int j = begin * P + int(threadIdx.x); j < end * P; j += int(blockDim.x)) {
        const T value = gradient.template at<decltype(parts)::value>(widen(load_element(j)));
        grad[j] = narrow<S>(j == target ? gradient.row.target : value);
      }
    });
  }

  template <bool FULL>
  ANL_DEVICE void write_edge(const Program& program, const RowGradient<T>& gradient, T logit) const {
    if (!edge_grad) return;
    by_parts<FULL>(program, [&](auto parts) {
      const T value = gradient.template at<decltype(parts)::value>(logit);
      *edge_grad = narrow<S>(edge_is_target ? gradient.row.target : value);
    });
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

  template <bool FULL, int E>
  static ANL_DEVICE void add_tile(AnchoredSums<T, FULL>& sums, const T (&z)[E]) {
    T high = z[0], low = z[0];
#pragma unroll
    for (int j = 1; j < E; ++j) {
      high = larger(high, z[j]);
      low = smaller(low, z[j]);
    }
    if (high > sums.max) sums.rebase(high);
    sums.add_all(z, low, sums.anchor());
  }
};

// One class more, outside the tiles; -inf: none.
template <class T, bool FULL>
ANL_DEVICE void add_edge(AnchoredSums<T, FULL>& sums, T z) {
  if (z > sums.max) sums.rebase(z);
  sums.add(z, sums.anchor());
}
template <class T, bool FULL>
ANL_DEVICE void add_edge(SecondSums<Scalar<T>, FULL>& sums, const RowSweep<T>& sweep, T z) {
  sweep.run(sums, [&](const auto& add) { add(z); });
}

}  // namespace gpu
}  // namespace anl
