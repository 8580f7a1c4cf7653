// Rows in shared memory that a group of lanes sweeps: how they come and go, and each lane's share of the sweeps.
//
// Sums leave the target out: its place is taken by one other class, the displaced one, which stands at the row's beginning
// or end and is left out of the sweeps there. So no class has to be looked at for what it is.
#pragma once

#include "packed_sweeps.cuh"
#include "results.cuh"

namespace anl {
namespace gpu {

template <int N>
struct Units {
  static constexpr int value = N;
};

template <class S>
ANL_DEVICE int misaligned(const S* p) {  // by so many elements
  return int(reinterpret_cast<uintptr_t>(p) / sizeof(S) % PACK<S>);
}

// ---- to and from shared memory, by lane i of `lanes` --------------------------------------------------------------------

// f(to, from) for n elements: in whole packs of 16 bytes, those on whose boundaries `to` lies, four at a time; and one by
// one what lies before and after them.
template <class S, class Copy, class One>
ANL_DEVICE void each_pack(S* to, const S* from, const S* boundaries, int n, int i, int lanes, const Copy& f,
                          const One& one) {
  constexpr int P = PACK<S>;
  const int head = min(n, (P - misaligned(boundaries)) % P), packs = int(unsigned(n - head) / P), step = lanes * P;
  const int at = head + i * P;
  S* t = to + at;
  const S* s = from + at;
  int left = packs - i;
#pragma unroll 1
  for (; left > 3 * lanes; left -= 4 * lanes, t += 4 * step, s += 4 * step) {
#pragma unroll
    for (int u = 0; u < 4; ++u) f(t + u * step, s + u * step);
  }
#pragma unroll 1
  for (; left > 0; left -= lanes, t += step, s += step) f(t, s);
#pragma unroll 1
  for (int e = i; e < n - packs * P; e += lanes) {
    const int k = e < head ? e : e + packs * P;
    one(to + k, from + k);
  }
}

// To shared memory that is aligned as they are; asynchronous.
template <class S>
ANL_DEVICE void copy_in(S* to, const S* from, int n, int i, int lanes) {
  each_pack(to, from, from, n, i, lanes, [](S* t, const S* s) { copy_async16(t, s); }, [](S* t, const S* s) { *t = *s; });
}

template <class S>
ANL_DEVICE void copy_out(S* to, const S* from, int n, int i, int lanes) {
  each_pack(to, from, to, n, i, lanes, [](S* t, const S* s) { store16(t, load16(s)); }, [](S* t, const S* s) { *t = *s; });
}

// The same from memory that is aligned in any way.
template <class S>
ANL_DEVICE void gather_out(S* to, const S* from, int n, int i, int lanes) {
  const auto gather = [](S* t, const S* s) {
    acc_t<S> pack[PACK<S>];
#pragma unroll
    for (int v = 0; v < PACK<S>; ++v) pack[v] = widen(s[v]);
    store16(t, narrow_pack<S>(pack));
  };
  each_pack(to, from, to, n, i, lanes, gather, [](S* t, const S* s) { *t = *s; });
}

// ---- a row's classes, but for the displaced one ------------------------------------------------------------------------

template <class S, int BYTES>
struct alignas(BYTES) Unit {
  using T = acc_t<S>;
  static constexpr int P = BYTES / int(sizeof(S)), WORDS = BYTES / 4;
  uint32_t word[WORDS];

  ANL_DEVICE void widen(T (&x)[P]) const {
    uint32_t w[4] = {};
#pragma unroll
    for (int i = 0; i < WORDS; ++i) w[i] = word[i];
    T pack[PACK<S>];
    widen_pack<S>(make_uint4(w[0], w[1], w[2], w[3]), pack);
#pragma unroll
    for (int v = 0; v < P; ++v) x[v] = pack[v];
  }
  static ANL_DEVICE Unit narrow(const T (&x)[P]) {
    T pack[PACK<S>] = {};
#pragma unroll
    for (int v = 0; v < P; ++v) pack[v] = x[v];
    const uint4 bits = narrow_pack<S>(pack);
    const uint32_t w[4] = {bits.x, bits.y, bits.z, bits.w};
    Unit unit;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) unit.word[i] = w[i];
    return unit;
  }
};

// The largest and the smallest of a lane's classes: 16-bit numbers two at a time, else one. NaN is neither.
template <class S, bool PAIRS = sizeof(S) == 2>
struct Extremes {
  using T = acc_t<S>;
  T high = minus_inf<T>(), low = -minus_inf<T>();

  ANL_DEVICE void add_high(T z) { high = z > high ? z : high; }
  ANL_DEVICE void add_low(T z) { low = z < low ? z : low; }
  ANL_DEVICE void add(T z) {
    add_high(z);
    add_low(z);
  }
  template <int BYTES>
  ANL_DEVICE void add(const Unit<S, BYTES>& unit) {
    T x[Unit<S, BYTES>::P];
    unit.widen(x);
    for (const T z : x) add(z);
  }
  ANL_DEVICE Extremes whole() const { return *this; }
};
template <class S>
struct Extremes<S, true> {
  Extremes<S, false> rest;
  uint32_t high = Unit<S, 4>::narrow({rest.high, rest.high}).word[0];
  uint32_t low = Unit<S, 4>::narrow({rest.low, rest.low}).word[0];

  ANL_DEVICE void add(float z) { rest.add(z); }
  template <int BYTES>
  ANL_DEVICE void add(const Unit<S, BYTES>& unit) {
#pragma unroll
    for (const uint32_t word : unit.word) {
      high = larger2<S>(high, word);
      low = smaller2<S>(low, word);
    }
  }
  ANL_DEVICE Extremes<S, false> whole() const {
    Extremes<S, false> all = rest;
#pragma unroll
    for (int shift = 0; shift < 32; shift += 16) {
      all.high = fmaxf(all.high, widen(S{uint16_t(high >> shift)}));
      all.low = fminf(all.low, widen(S{uint16_t(low >> shift)}));
    }
    return all;
  }
};

// What a lane has of a row: `whole` units, `step` apart, and of the classes before and after all units, its edges, every
// lanes-th. Lanes that read 16 bytes take turns, others have units that lie side by side: so they meet in few banks of
// shared memory.
template <class S, int BYTES, bool FULL>
struct Share {
  using T = acc_t<S>;
  using U = Unit<S, BYTES>;
  static constexpr bool TURNS = BYTES == 16;
  static constexpr int P = U::P, CLASSES = FULL ? 2 : P > 1 ? 16 : 8;
  static constexpr int TILE = CLASSES / P > 1 ? CLASSES / P : 1;

  S* row;
  int bits, start, whole, before, within, edges;  // of the row's classes: before the units, in them, outside

  // Of so many classes from element `first` of 16 aligned bytes; 2^lane_bits lanes share them.
  ANL_DEVICE Share(S* aligned, int first, int classes, int lane_bits) : row(aligned + first), bits(lane_bits) {
    before = TURNS ? (P - first % P) % P : 0;  // a unit of 4 bytes is begun by the first class
    const int units = max(0, classes - before) / P;
    within = units * P;
    edges = classes - within;
    if (TURNS) {
      start = lane();
      whole = turns(units);
    } else {
      const int most = turns(units + lane()) | 1;
      start = lane() * most;
      whole = max(0, min(most, units - start));
    }
  }
  ANL_DEVICE int lanes() const { return 1 << bits; }
  ANL_DEVICE int lane() const { return int(threadIdx.x) & (lanes() - 1); }
  ANL_DEVICE int step() const { return TURNS ? lanes() : 1; }
  // How many of n are the lane's, if lanes take one after the other.
  ANL_DEVICE int turns(int n) const { return (n + lanes() - 1 - lane()) >> bits; }
  ANL_DEVICE int classes() const { return whole * P + turns(edges); }

  // f(Units<N>(), its first unit) for the whole units, g(class) for the edges.
  template <class F, class G>
  ANL_DEVICE void each(const F& f, const G& g) const {
    U* unit = reinterpret_cast<U*>(row + before) + start;
    int n = whole;
#pragma unroll 1
    for (; n >= TILE; n -= TILE, unit += TILE * step()) f(Units<TILE>(), unit);
    if constexpr (TILE > 1) {
#pragma unroll 1
      for (; n > 0; --n, unit += step()) f(Units<1>(), unit);
    }
    if constexpr (TURNS) {
#pragma unroll 1
      for (int i = lane(); i < edges; i += lanes()) g(row[i < before ? i : i + within]);
    } else if constexpr (P > 1) {
      if (lane() < edges) g(row[within]);
    }
  }
  // The same of their classes: f(array).
  template <class F>
  ANL_DEVICE void each_class(const F& f) const {
    each([&](auto n, const U* unit) {
      T x[decltype(n)::value * P];
      load<decltype(n)::value>(unit, x);
      f(x);
    }, [&](S edge) {
      const T x[1] = {widen(edge)};
      f(x);
    });
  }

  template <int N>
  ANL_DEVICE void load(const U* unit, T (&x)[N * P]) const {
    U units[N];
#pragma unroll
    for (int u = 0; u < N; ++u) units[u] = unit[u * step()];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      T pack[P];
      units[u].widen(pack);
#pragma unroll
      for (int v = 0; v < P; ++v) x[u * P + v] = pack[v];
    }
  }

  // By all lanes of the warp, each for its group's row.
  ANL_DEVICE AnchoredSums<T, FULL> first_sums() const {
    Extremes<S> found;
    each([&](auto n, const U* unit) {
      U units[decltype(n)::value];
#pragma unroll
      for (int u = 0; u < decltype(n)::value; ++u) units[u] = unit[u * step()];
#pragma unroll
      for (const U& one : units) found.add(one);
    }, [&](S edge) { found.add(widen(edge)); });
    Extremes<S, false> extremes = found.whole();
#pragma unroll 1
    for (int offset = 1; offset < lanes(); offset *= 2) {
      extremes.add_high(shuffle_xor(extremes.high, offset));
      extremes.add_low(shuffle_xor(extremes.low, offset));
    }
    auto s = none<AnchoredSums<T, FULL>>();
    s.max = extremes.high;
    const auto exps = s.exps();
    if (extremes.low > minus_inf<T>()) {
      each_class([&](const auto& x) { s.add_classes(x, exps); });
      s.count_existing(T(classes()), extremes.low);
    } else {
      each_class([&](const auto& x) { s.add_all(x, extremes.low, exps); });
    }
#pragma unroll 1
    for (int offset = 1; offset < lanes(); offset *= 2) {  // of two lanes' numbers, both have the same sum
      AnchoredSums<T, FULL> other = s;
      other.min = shuffle_xor(s.min, offset);
      other.sums = shuffle_xor(s.sums, offset);
      s.add(other);
    }
    return s;
  }

  ANL_DEVICE void add_second(const RowSweep<T, FULL>& sweep, SecondSums<Scalar<T>, FULL>& s) const {
    sweep.run(s, [&](const auto& add) {
      each_class([&](const auto& x) { add(x); });
    });
  }
  // The same of whole units in words of two.
  ANL_DEVICE void add_heights(const RowSweep<T, FULL>& sweep, SecondSums<Scalar<T>, FULL>& s) const {
    WordHeights<S> heights(sweep.bound, sweep.bound);
    const auto whole_units = [&](auto n, const U* unit) {
      uint32_t words[decltype(n)::value * U::WORDS];
#pragma unroll
      for (int u = 0; u < decltype(n)::value; ++u) {
        const U one = unit[u * step()];
#pragma unroll
        for (int w = 0; w < U::WORDS; ++w) words[u * U::WORDS + w] = one.word[w];
      }
      heights.add(words);
    };
    each(whole_units, [&](S edge) { sweep.add_height(s, widen(edge)); });
#pragma unroll
    for (int half = 0; half < 2; ++half) heights.finish(half, T(whole * U::WORDS), s);
  }
  ANL_DEVICE SecondSums<Scalar<T>, FULL> second_sums(const RowSweep<T, FULL>& sweep) const {
    auto s = none<SecondSums<Scalar<T>, FULL>>();
    if constexpr (!FULL && sizeof(S) == 2) {
      if (sweep.by_bound())
        add_heights(sweep, s);
      else
        add_second(sweep, s);
    } else {
      add_second(sweep, s);
    }
#pragma unroll 1
    for (int offset = 1; offset < lanes(); offset *= 2) s.add(shuffle_xor(s, offset));
    return s;
  }

  template <unsigned PARTS>
  ANL_DEVICE void write(const RowGradient<T, FULL>& gradient) const {
    const auto whole_units = [&](auto n, U* unit) {
      constexpr int N = decltype(n)::value;
      T x[N * P];
      load<N>(unit, x);
      gradient.template replace<PARTS>(x);
#pragma unroll
      for (int u = 0; u < N; ++u) {
        T pack[P];
#pragma unroll
        for (int v = 0; v < P; ++v) pack[v] = x[u * P + v];
        unit[u * step()] = U::narrow(pack);
      }
    };
    each(whole_units, [&](S& edge) { edge = narrow<S>(gradient.template at<PARTS>(widen(edge))); });
  }
};

}  // namespace gpu
}  // namespace anl
