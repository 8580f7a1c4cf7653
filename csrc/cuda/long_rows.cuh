// The part of a long row in global memory that a CTA takes: the sweeps over it, wherever its 16-byte packs are kept.
//
// What lies between two 16-byte boundaries is the body of a row, read and written in packs. The few classes before and
// after it are the edges, one per thread. A thread meets the same packs and the same edge class in every sweep, several
// packs at a time, so that their exps are independent.
#pragma once

#include "packed_sweeps.cuh"
#include "results.cuh"

namespace anl {
namespace gpu {

template <class S>
constexpr int TILE_PACKS = sizeof(S) == 8 ? 2 : 4;  // that a thread takes at a time
// The same where classes are looked at one by one: in full kernels 4 packs of half precision do not fit in a thread's
// registers, and lean ones seldom do so.
template <class S, bool FULL>
constexpr int FULL_PACKS = sizeof(S) > 2 ? TILE_PACKS<S> : FULL ? 2 : 1;

ANL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number, the number
ANL_DEVICE double larger(double a, double b) { return fmax(a, b); }
ANL_DEVICE float smaller(float a, float b) { return fminf(a, b); }
ANL_DEVICE double smaller(double a, double b) { return fmin(a, b); }

// Whether lean kernels sweep over words of two classes.
template <class S, bool FULL>
constexpr bool IS_PACKED = !FULL && sizeof(S) == 2;

template <int U>
struct Count {
  static constexpr int value = U;
};

// f(Count<U>(), i, inside) for the thread's packs i, i + blockDim.x, ... (U of them) of [begin, end), as often for all of
// a warp's lanes; where the last packs are not enough for them, some are not inside.
template <int U, class F>
ANL_DEVICE void each_tile(int begin, int end, const F& f) {
  const int step = int(blockDim.x), last_lane = WARP - 1 - int(lane_index());
  int i = begin + int(threadIdx.x);
  for (; i + last_lane + (U - 1) * step < end; i += U * step) f(Count<U>(), i, true);
  for (; i + last_lane - (WARP - 1) < end; i += step) f(Count<1>(), i, i < end);
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
  int target_pack;  // the pack that holds it, if that is one of the thread's; else far below 0
  int edge;         // the thread's edge class, as an element of the packs; NO_EDGE: it has none
  bool edge_is_target;
  static constexpr int NO_EDGE = INT32_MIN;

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
    const bool takes = target >= 0 && target / P % int(blockDim.x) == int(threadIdx.x);
    target_pack = takes ? target / P : INT32_MIN / 2;
    const int64_t t = threadIdx.x, k = t < P ? (t < head ? t : num_classes) : head + body * P + (t - P);
    const bool has = edges && t < 2 * P && k < num_classes;
    edge = has ? int(k - k0) : NO_EDGE;
    edge_is_target = has && k == y;
  }

  // The edge class's logit, or -inf if it is in no sum.
  ANL_DEVICE T edge_logit() const { return edge != NO_EDGE && !edge_is_target ? widen(logits[edge]) : minus_inf<T>(); }

  // The words of U packs; zeros outside.
  template <int U, class Load>
  ANL_DEVICE void load_words(int i, bool inside, const Load& load_pack, uint32_t (&words)[U * 4]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint4 bits = inside ? load_pack(i + u * int(blockDim.x)) : uint4{};
      const uint32_t pack[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int v = 0; v < 4; ++v) words[u * 4 + v] = pack[v];
    }
  }

  // The classes of U packs.
  template <int U, class Load>
  ANL_DEVICE void load_classes(int i, const Load& load_pack, T (&x)[U * P]) const {
    uint32_t words[U * 4];
    load_words<U>(i, true, load_pack, words);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      T pack[P];
      widen_pack<S>(make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]), pack);
#pragma unroll
      for (int v = 0; v < P; ++v) x[u * P + v] = pack[v];
    }
  }

  // The same, with -inf in the target's place.
  template <int U, class Load>
  ANL_DEVICE void load_others(int i, const Load& load_pack, T (&x)[U * P]) const {
    load_classes<U>(i, load_pack, x);
    if (!has_target<U>(i)) return;
    const int at = target_of(i);
#pragma unroll
    for (int j = 0; j < U * P; ++j) x[j] = j == at ? minus_inf<T>() : x[j];
  }

  // Whether the target is among the classes of these U packs, and which of them it is.
  template <int U>
  ANL_DEVICE bool has_target(int i) const {
    return unsigned(target_pack - i) <= unsigned((U - 1) * int(blockDim.x));
  }
  ANL_DEVICE int target_of(int i) const { return (target_pack - i) / int(blockDim.x) * P + target % P; }

  // Adds the packs [begin, end) to the thread's sums. load(i): pack i.
  template <bool FULL, class Load>
  ANL_DEVICE void first_sweep(AnchoredSums<T, FULL>& sums, int begin, int end, const Load& load_pack) const {
    if constexpr (IS_PACKED<S, FULL>) {
      PackedFirstSweep<S> sweep = {sums};
      each_tile<TILE_PACKS<S>>(begin, end, [&](auto count, int i, bool inside) {
        constexpr int U = decltype(count)::value;
        uint32_t words[U * 4];
        load_words<U>(i, inside, load_pack, words);
        sweep.add(words, inside, has_target<U>(i), [&] { add_one_by_one<U>(sums, i, load_pack); });
      });
    } else {
      each_tile<FULL_PACKS<S, FULL>>(begin, end, [&](auto count, int i, bool inside) {
        constexpr int U = decltype(count)::value;
        if (!inside) return;
        T z[U * P];
        load_others<U>(i, load_pack, z);
        add_tile(sums, z);
      });
    }
  }

  // Classes some of which may not exist.
  template <int U, class Load>
  ANL_DEVICE void add_one_by_one(AnchoredSums<T, false>& sums, int i, const Load& load_pack) const {
#pragma unroll 1
    for (int u = 0; u < U; ++u) {
      T z[P];
      load_others<1>(i + u * int(blockDim.x), load_pack, z);
#pragma unroll
      for (T v : z) sums.include(v);
    }
  }

  template <bool FULL, class Load>
  ANL_DEVICE void second_sweep(SecondSums<Scalar<T>, FULL>& sums, const RowSweep<T>& sweep, int begin, int end,
                               const Load& load_pack) const {
    if constexpr (IS_PACKED<S, FULL>) {
      if (!sweep.classes.mass) {
        const PackedSecondSweep<S> packed(sweep.bound);
        return each_tile<TILE_PACKS<S>>(begin, end, [&](auto count, int i, bool inside) {
          constexpr int U = decltype(count)::value;
          uint32_t words[U * 4];
          load_words<U>(i, inside, load_pack, words);
          if (has_target<U>(i)) put_lowest<U>(i, words);
          __syncwarp();
          packed.add(sums, words, inside);
        });
      }
    }
    sweep.run(sums, [&](const auto& add) {
      each_tile<FULL_PACKS<S, FULL>>(begin, end, [&](auto count, int i, bool inside) {
        if (!inside) return;
        T z[decltype(count)::value * P];
        load_others<decltype(count)::value>(i, load_pack, z);
        add(z);
      });
    });
  }

  // The lowest finite number in the target's place.
  template <int U>
  ANL_DEVICE void put_lowest(int i, uint32_t (&words)[U * 4]) const {
    const int at = target_of(i);
    const uint32_t keep = at % 2 ? 0x0000ffffu : 0xffff0000u, put = ~keep & twice(Bits<S>::LOWEST);
#pragma unroll
    for (int j = 0; j < U * 4; ++j) words[j] = j == at / 2 ? (words[j] & keep) | put : words[j];
  }

  // replace(words) makes the gradient of each tile of packs [begin, end).
  template <Cache C, int TILE, class Replace, class Load>
  ANL_DEVICE void write_packs(const Replace& replace, int begin, int end, const Load& load_pack) const {
    each_tile<TILE>(begin, end, [&](auto count, int i, bool inside) {
      constexpr int U = decltype(count)::value;
      uint32_t words[U * 4];
      load_words<U>(i, inside, load_pack, words);
      replace(words);
      if (!inside) return;
#pragma unroll
      for (int u = 0; u < U; ++u)
        store16<C>(grad + int64_t(i + u * int(blockDim.x)) * P,
                   make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]));
    });
  }

  // Of every class but the target; write_rest is called after the last of these. all_exist: no class of the row is missing.
  template <bool FULL, Cache C, class Load>
  ANL_DEVICE void write_gradient(const Program& program, const RowGradient<T, FULL>& gradient, bool all_exist, int begin,
                                 int end, const Load& load_pack) const {
    const bool one_slope = gradient.row.slope == gradient.row.slope_above;
    const auto write_parts = [&](auto parts) {
      const auto replace = [&](auto& words) { replace_each<decltype(parts)::value>(gradient, words); };
      write_packs<C, FULL_PACKS<S, FULL>>(replace, begin, end, load_pack);
    };
    if constexpr (IS_PACKED<S, FULL>) {
      constexpr int TILE = TILE_PACKS<S>;
      if (all_exist && one_slope) return write_packs<C, TILE>(PackedGradient<S, false>(gradient), begin, end, load_pack);
      if (all_exist) return write_packs<C, TILE / 2>(PackedGradient<S, true>(gradient), begin, end, load_pack);
    } else if constexpr (!FULL) {
      if (all_exist && one_slope) return write_parts(Parts<CLAMPED_OFFSET>());
    }
    by_parts<FULL>(program, write_parts);
  }
  template <unsigned PARTS, bool FULL, int W>
  static ANL_DEVICE void replace_each(const RowGradient<T, FULL>& gradient, uint32_t (&words)[W]) {
#pragma unroll
    for (int u = 0; u < W / 4; ++u) {
      uint32_t* const pack = words + 4 * u;
      T x[P];
      widen_pack<S>(make_uint4(pack[0], pack[1], pack[2], pack[3]), x);
#pragma unroll
      for (T& v : x) v = gradient.template at<PARTS>(v);
      const uint4 bits = narrow_pack<S>(x);
      pack[0] = bits.x;
      pack[1] = bits.y;
      pack[2] = bits.z;
      pack[3] = bits.w;
    }
  }

  // The same where the gradient's packs lie elsewhere than the logits': neighbouring threads take neighbouring classes.
  template <bool FULL, class Load>
  ANL_DEVICE void write_elements(const Program& program, const RowGradient<T, FULL>& gradient, int begin, int end,
                                 const Load& load_element) const {
    by_parts<FULL>(program, [&](auto parts) {
      for (int j = begin * P + int(threadIdx.x); j < end * P; j += int(blockDim.x)) {
        const T value = gradient.template at<decltype(parts)::value>(widen(load_element(j)));
        grad[j] = narrow<S>(j == target ? gradient.row.target : value);
      }
    });
  }

  // The edge class, and the target where packs were written: by the thread that wrote its pack.
  template <bool FULL>
  ANL_DEVICE void write_rest(const Program& program, const RowGradient<T, FULL>& gradient, T logit, bool packs_written) const {
    const S target_value = narrow<S>(gradient.row.target);
    if (grad && packs_written && target_pack >= 0) grad[target] = target_value;
    if (!grad || edge == NO_EDGE) return;
    by_parts<FULL>(program, [&](auto parts) {
      const T value = gradient.template at<decltype(parts)::value>(logit);
      grad[edge] = edge_is_target ? target_value : narrow<S>(value);
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
    if (edge != NO_EDGE) grad[edge] = element;
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
  sums.include(z);
}
template <class T, bool FULL>
ANL_DEVICE void add_edge(SecondSums<Scalar<T>, FULL>& sums, const RowSweep<T>& sweep, T z) {
  sweep.run(sums, [&](const auto& add) { add(z); });
}

}  // namespace gpu
}  // namespace anl
