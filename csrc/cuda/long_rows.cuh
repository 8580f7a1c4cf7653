// The part of a long row in global memory that a CTA takes: the sweeps over it, wherever its 16-byte packs are kept.
//
// What lies between two 16-byte boundaries is the body of a row, read and written in packs. The few classes before and
// after it are the edges, one per thread. A thread takes several packs at a time, so that their exps are independent.
#pragma once

#include "float_sweep.cuh"
#include "packed_focal.cuh"
#include "results.cuh"

namespace anl {
namespace gpu {

template <class S>
constexpr int TILE_PACKS = sizeof(S) == 8 ? 2 : sizeof(S) == 4 ? 8 : 4;  // that a thread takes at a time
// The same where classes are looked at one by one: few, but in lean kernels of float32, as the others take long to compile.
template <class S, bool FULL>
constexpr int FULL_PACKS = sizeof(S) == 4 && !FULL ? TILE_PACKS<S> : 1;

// Whether sweeps are over words of two classes, those of full kernels where the loss and the row allow it.
template <class S>
constexpr bool IS_PACKED = sizeof(S) == 2;

template <int U>
struct Count {
  static constexpr int value = U;
};

// Where packs are: load(i, u) is pack i + u WARP, element(j) element j of them all.
//
// In shared memory.
template <class S>
struct SharedPacks {
  SharedPlace data;
  ANL_DEVICE uint4 load(int i, int u) const { return data.load(i + u * WARP); }
  ANL_DEVICE S element(int j) const { return static_cast<const S*>(data.pointer())[j]; }
};
// In global memory, of which single elements are read.
template <class S>
struct GlobalPacks {
  const S* data;
  ANL_DEVICE S element(int j) const { return data[j]; }
};

// In the thread's registers: pack i, whichever that is, and U - 1 more.
template <int U>
struct HeldPacks {
  const uint4 (&words)[U];
  ANL_DEVICE uint4 load(int, int u) const { return words[u]; }
};

// A walk over packs in one place. Like any walk, it has
// tiles<U>(f): f(Count<U>(), i, inside, packs) for the packs i, i + WARP, ... (U of them) that are the thread's, as often
// for all of a warp's lanes. Warps take whole tiles in turn, and what is left in turn, too: there, some lanes are not inside.
// chunks(f): f(begin, end, packs) for those of the warp, some at a time.
template <class Packs>
struct PlainWalk {
  Packs packs;
  int count;

  template <int U, class F>
  ANL_DEVICE void tiles(const F& f) const {
    constexpr int TILE = U * WARP;
    const int lane = int(lane_index()), warps = int(blockDim.x) / WARP, tiles = U > 1 ? count / TILE : 0;
    int tile = int(threadIdx.x) / WARP;
    if constexpr (U > 1) for (; tile < tiles; tile += warps) f(Count<U>(), tile * TILE + lane, true, packs);
    const int rest = tiles * TILE;
    for (int i = rest + (tile - tiles) * WARP + lane; i - lane < count; i += warps * WARP) f(Count<1>(), i, i < count, packs);
  }
  template <class F>
  ANL_DEVICE void chunks(const F& f) const {
    constexpr int CHUNK = 8 * WARP;
    const int step = int(blockDim.x) / WARP * CHUNK;
    for (int begin = int(threadIdx.x) / WARP * CHUNK; begin < count; begin += step)
      f(begin, min(begin + CHUNK, count), packs);
  }
};

// Where packs [first_pack, first_pack + most) of a row's body are, as far as it has so many; the same for all threads.
template <class S>
struct PartPlace {
  static constexpr int P = PACK<S>;

  const S* logits;  // of the first pack
  S* grad;          // likewise, or null
  int first;        // its class
  int packs;
  int target;       // as an element of the packs, whether they hold it or not
  int head, tail;   // classes before the body, and the first behind it

  PartPlace() = default;
  // Rows have 2^30 classes at most; y may be anything.
  ANL_DEVICE PartPlace(const S* row, S* row_grad, int num_classes, int64_t y, int first_pack, int most) {
    const int shift = int(reinterpret_cast<uintptr_t>(row) / sizeof(S) % P), to_pack = shift ? P - shift : 0;
    head = to_pack < num_classes ? to_pack : num_classes;
    const int body = (num_classes - head) / P, left = body - first_pack;
    tail = head + body * P;
    first = head + first_pack * P;
    packs = left < 0 ? 0 : left < most ? left : most;
    logits = row + first;
    grad = row_grad ? row_grad + first : nullptr;
    const int label = y >= 0 && y < num_classes ? int(y) : -1;
    target = label - first;
  }
};

// A thread's view of such packs and, if `edges`, of the row's edges.
template <class S>
struct GlobalRowPart : PartPlace<S> {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;
  using PartPlace<S>::logits, PartPlace<S>::grad, PartPlace<S>::first, PartPlace<S>::packs, PartPlace<S>::target;
  static constexpr int NO_EDGE = INT32_MIN;

  int edge = NO_EDGE;  // the thread's edge class, as an element of the packs; NO_EDGE: it has none

  ANL_DEVICE GlobalRowPart(const PartPlace<S>& place, int num_classes, bool edges) : PartPlace<S>(place) {
    const int t = int(threadIdx.x);
    if (!edges || t >= 2 * P) return;
    const int k = t < P ? (t < place.head ? t : num_classes) : place.tail + (t - P);
    if (k < num_classes) edge = k - first;
  }

  ANL_DEVICE T logit_of(int64_t y) const { return widen(logits[y - first]); }

  // The edge class's logit, or -inf if it is in no sum.
  ANL_DEVICE T edge_logit() const { return edge != NO_EDGE && edge != target ? widen(logits[edge]) : minus_inf<T>(); }

  // The words of U packs; zeros outside.
  template <int U, class Packs>
  ANL_DEVICE void load_words(int i, bool inside, const Packs& packs, uint32_t (&words)[U * 4]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const uint4 bits = inside ? packs.load(i, u) : uint4{};
      const uint32_t pack[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int v = 0; v < 4; ++v) words[u * 4 + v] = pack[v];
    }
  }

  // The classes of U packs.
  template <int U, class Packs>
  ANL_DEVICE void load_classes(int i, const Packs& packs, T (&x)[U * P]) const {
    uint32_t words[U * 4];
    load_words<U>(i, true, packs, words);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      T pack[P];
      widen_pack<S>(make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]), pack);
#pragma unroll
      for (int v = 0; v < P; ++v) x[u * P + v] = pack[v];
    }
  }

  // The same, with `absent` in the target's place.
  template <int U, class Packs>
  ANL_DEVICE void load_others(int i, const Packs& packs, T (&x)[U * P], T absent) const {
    load_classes<U>(i, packs, x);
    if (!has_target<U>(i)) return;
    const int at = target_in<U>(i);
#pragma unroll
    for (int j = 0; j < U * P; ++j) x[j] = j == at ? absent : x[j];
  }

  // Whether the target is among the classes of these U packs, and which of them it is; below 0: none.
  template <int U>
  ANL_DEVICE bool has_target(int i) const {
    const unsigned away = packs_to_target(i);
    return away <= (U - 1) * WARP && away % WARP == 0;
  }
  template <int U>
  ANL_DEVICE int target_in(int i) const {
    return has_target<U>(i) ? int(packs_to_target(i)) / WARP * P + target % P : -1;
  }
  ANL_DEVICE unsigned packs_to_target(int i) const { return unsigned(target - i * P) / P; }

  // The sums of the thread's packs.
  template <bool FULL, class Walk>
  ANL_DEVICE void first_sweep(const Program& program, AnchoredSums<T, FULL>& sums, const Walk& walk) const {
    if constexpr (IS_PACKED<S>) {
      if (!FULL || !(program.needs & NEED_SQUARES)) {
        PackedFirstSweep<S> sweep;
        add_words(sweep, walk);
        sums = as_sums_of<FULL>(sweep.result());
        return;
      }
    }
    const auto add_others = [&](const auto& add_tile) {
      walk.template tiles<FULL_PACKS<S, FULL>>([&](auto count, int i, bool inside, const auto& packs) {
        if (!inside) return;
        T z[decltype(count)::value * P];
        load_others<decltype(count)::value>(i, packs, z, minus_inf<T>());
        add_tile(z);
      });
    };
    if constexpr (FULL) {
      add_others([&](const auto& z) { sums.include_all(z); });
    } else if constexpr (!IS_PACKED<S>) {
      FloatFirstSweep sweep = {sums};
      add_others([&](const auto& z) { sweep.add(z); });
    }
  }

  // Of the thread's packs, sweep.add(words, ...).
  template <class Sweep, class Walk>
  ANL_DEVICE void add_words(Sweep& sweep, const Walk& walk) const {
    walk.template tiles<TILE_PACKS<S>>([&](auto count, int i, bool inside, const auto& packs) {
      constexpr int U = decltype(count)::value;
      uint32_t words[U * 4];
      load_words<U>(i, inside, packs, words);
      sweep.add(words, inside, target_in<U>(i), [&](const auto& add) { each_other<U>(i, packs, add); });
    });
  }

  // f(j, z), z as it is stored, for the classes of U packs besides the target, in few instructions.
  template <int U, class Packs, class F>
  ANL_DEVICE void each_other(int i, const Packs& packs, const F& f) const {
#pragma unroll 1
    for (int j = 0; j < U * P; ++j)
      if (j != target_in<U>(i)) f(j, packs.element((i + j / P * WARP) * P + j % P));
  }

  // all_exist: no class of the row is missing.
  template <bool FULL, class Walk>
  ANL_DEVICE void second_sweep(SecondSums<Scalar<T>, FULL>& sums, const RowSweep<T, FULL>& row, bool all_exist,
                               const Walk& walk) const {
    if constexpr (IS_PACKED<S> && FULL) {
      if (row.classes.focal && !row.classes.mass && all_exist && FocalSeries::fits(row.classes, row.max)) {
        PackedFocalSweep<S> sweep(row, sums);
        add_words(sweep, walk);
        return sweep.finish();
      }
    } else if constexpr (IS_PACKED<S>) {
      if (row.by_bound()) {
        PackedSecondSweep<S> sweep = {sums, PackedHeights<S>(row.bound)};
        return add_words(sweep, walk);
      }
    }
    row.run(sums, [&](const auto& add) {
      walk.template tiles<FULL_PACKS<S, FULL>>([&](auto count, int i, bool inside, const auto& packs) {
        if (!inside) return;
        T z[decltype(count)::value * P];
        load_others<decltype(count)::value>(i, packs, z, FULL ? minus_inf<T>() : T(-FLT_MAX));
        add(z);
      });
    }, all_exist);
  }

  // The gradient of every class but the edges. whole_packs: its packs are aligned as the logits' are.
  template <bool FULL, Cache C, class Walk>
  ANL_DEVICE void write_gradient(const Program& program, const RowGradient<T, FULL>& gradient, bool all_exist,
                                 bool whole_packs, const Walk& walk) const {
    if (!whole_packs) return write_elements<FULL>(program, gradient, walk);
    const S target_value = narrow<S>(gradient.row.target);
    const auto write_parts = [&](auto parts) {
      const auto replace = [&](auto& words, bool, const auto&) { replace_each<decltype(parts)::value>(gradient, words); };
      write_packs<C, FULL_PACKS<S, FULL>>(replace, target_value, walk);
    };
    if constexpr (IS_PACKED<S> && FULL) {
      if (needs_focal(program) && all_exist && FocalSeries::fits(gradient.row, gradient.max))
        return write_packs<C, TILE_PACKS<S> / 2>(PackedFocalGradient<S>(gradient), target_value, walk);
    } else if constexpr (IS_PACKED<S>) {
      constexpr int TILE = TILE_PACKS<S>;
      const bool plain = all_exist && !gradient.exps.is_far(), needs_exact = PackedGradient<S, false>::needs_exact(gradient);
      if (int(plain) & int(!needs_exact))
        return write_packs<C, TILE>(PackedGradient<S, false>(gradient), target_value, walk);
      if (plain) return write_packs<C, TILE / 2>(PackedGradient<S, true>(gradient), target_value, walk);
    } else if constexpr (!FULL) {
      if (all_exist && gradient.row.slope == gradient.row.slope_above) return write_parts(Parts<CLAMPED_OFFSET>());
    }
    by_parts<FULL>(program, write_parts);
  }

  // replace(words, inside, each): the gradient in the place of the logits; each(f) calls f(j, z) for all but the target.
  template <Cache C, int TILE, class Replace, class Walk>
  ANL_DEVICE void write_packs(const Replace& replace, S target_value, const Walk& walk) const {
    walk.template tiles<TILE>([&](auto count, int i, bool inside, const auto& packs) {
      constexpr int U = decltype(count)::value;
      uint32_t words[U * 4];
      load_words<U>(i, inside, packs, words);
      replace(words, inside, [&](const auto& f) { each_other<U>(i, packs, f); });
      if (has_target<U>(i)) put<U>(words, target_in<U>(i), target_value);
      if (!inside) return;
#pragma unroll
      for (int u = 0; u < U; ++u)
        store16<C>(grad + int64_t(i) * P + u * WARP * P,
                   make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]));
    });
  }
  template <unsigned PARTS, bool FULL, int W>
  static ANL_DEVICE void replace_each(const RowGradient<T, FULL>& gradient, uint32_t (&words)[W]) {
#pragma unroll
    for (int u = 0; u < W / 4; ++u) {
      uint32_t* const pack = words + 4 * u;
      T x[P];
      widen_pack<S>(make_uint4(pack[0], pack[1], pack[2], pack[3]), x);
      gradient.template replace<PARTS>(x);
      const uint4 bits = narrow_pack<S>(x);
      pack[0] = bits.x;
      pack[1] = bits.y;
      pack[2] = bits.z;
      pack[3] = bits.w;
    }
  }

  // Where the gradient's packs lie elsewhere than the logits': neighbouring lanes take neighbouring classes.
  template <bool FULL, class Walk>
  ANL_DEVICE void write_elements(const Program& program, const RowGradient<T, FULL>& gradient,
                                 const Walk& walk) const {
    by_parts<FULL>(program, [&](auto parts) {
      walk.chunks([&](int begin, int end, const auto& packs) {
#pragma unroll (FULL ? 1 : 4)
        for (int j = begin * P + int(lane_index()); j < end * P; j += WARP) {
          const T value = gradient.template at<decltype(parts)::value>(widen(packs.element(j)));
          grad[j] = narrow<S>(j == target ? gradient.row.target : value);
        }
      });
    });
  }

  // `value` in the place of an element.
  template <int U>
  static ANL_DEVICE void put(uint32_t (&words)[U * 4], int at, S value) {
    if constexpr (sizeof(S) == 2) {
      put_half(words, at, twice(value.bits));
    } else {
      constexpr int WORDS = sizeof(S) / 4;
      uint32_t bits[WORDS];
      memcpy(bits, &value, sizeof(S));
#pragma unroll
      for (int j = 0; j < U * 4; ++j) words[j] = j / WORDS == at ? bits[j % WORDS] : words[j];
    }
  }

  template <bool FULL>
  ANL_DEVICE void write_edge(const Program& program, const RowGradient<T, FULL>& gradient, T logit) const {
    if (!grad || edge == NO_EDGE) return;
    by_parts<FULL>(program, [&](auto parts) {
      const T value = gradient.template at<decltype(parts)::value>(logit);
      grad[edge] = narrow<S>(edge == target ? gradient.row.target : value);
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
};

// One class more, outside the tiles; -inf: none.
template <class T, bool FULL>
ANL_DEVICE void add_edge(AnchoredSums<T, FULL>& sums, T z) {
  if (z != minus_inf<T>()) sums.include(z);
}
template <class T, bool FULL>
ANL_DEVICE void add_edge(SecondSums<Scalar<T>, FULL>& sums, const RowSweep<T, FULL>& sweep, T z) {
  if (z == minus_inf<T>()) return;
  sweep.run(sums, [&](const auto& add) { add(z); });
}

}  // namespace gpu
}  // namespace anl
