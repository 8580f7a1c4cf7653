// The pixels that a thread takes of tensors of any strides, their sums and their gradient (spatial.cu).
#pragma once

#include "entropy.cuh"
#include "long_rows.cuh"

namespace anl {
namespace gpu {

// ---- the logits of V neighbouring pixels, of one class -----------------------------------------------------------------

template <int BYTES>
using Bits = std::conditional_t<BYTES == 2, uint16_t, std::conditional_t<BYTES == 4, uint32_t, uint64_t>>;

template <class S, int V>
struct Word {
  using T = acc_t<S>;
  Bits<V * int(sizeof(S))> bits;

  ANL_DEVICE T part(int v) const {
    if constexpr (sizeof(S) == 8) return __longlong_as_double((long long)(bits));
    if constexpr (sizeof(S) == 4) return __uint_as_float(uint32_t(V == 1 ? bits : bits >> 32 * (V - 1) * v));
    if constexpr (sizeof(S) == 2) return widen(S{uint16_t(bits >> 16 * v)});
  }
  static ANL_DEVICE Word of(const T (&x)[V]) {
    if constexpr (sizeof(S) == 8) return {uint64_t(__double_as_longlong(x[0]))};
    if constexpr (sizeof(S) == 4 && V == 1) return {__float_as_uint(x[0])};
    if constexpr (sizeof(S) == 4 && V == 2) return {uint64_t(__float_as_uint(x[1])) << 32 | __float_as_uint(x[0])};
    if constexpr (sizeof(S) == 2 && V == 1) return {narrow<S>(x[0]).bits};
    if constexpr (sizeof(S) == 2 && V == 2) return {narrow2<S>(x[0], x[1])};
  }
  ANL_DEVICE Word with(int v, T value) const {
    T x[V];
#pragma unroll
    for (int u = 0; u < V; ++u) x[u] = u == v ? value : part(u);
    return of(x);
  }
};

// Part by part; of a NaN and a number, the number.
template <class S, int V>
ANL_DEVICE Word<S, V> larger_parts(Word<S, V> a, Word<S, V> b) {
  if constexpr (sizeof(S) == 2) {
    return {decltype(a.bits)(larger2<S>(a.bits, b.bits))};
  } else {
    acc_t<S> x[V];
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = larger(a.part(v), b.part(v));
    return Word<S, V>::of(x);
  }
}
template <class S, int V>
ANL_DEVICE Word<S, V> smaller_parts(Word<S, V> a, Word<S, V> b) {
  if constexpr (sizeof(S) == 2) {
    return {decltype(a.bits)(smaller2<S>(a.bits, b.bits))};
  } else {
    acc_t<S> x[V];
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = smaller(a.part(v), b.part(v));
    return Word<S, V>::of(x);
  }
}
template <class S, int V>
ANL_DEVICE Word<S, V> all_parts(acc_t<S> value) {
  acc_t<S> x[V];
#pragma unroll
  for (acc_t<S>& part : x) part = value;
  return Word<S, V>::of(x);
}

constexpr int FOLD = 64;  // so many classes are added up before they are added to the others

// ---- a thread's pixels ---------------------------------------------------------------------------------------------------

// And those of their classes that the thread takes: class group + j * groups is number j of n.
template <class S, int V, bool STAGED>
struct Pixels {
  using T = acc_t<S>;
  using W = Word<S, V>;
  using Index = std::conditional_t<STAGED || V != 1, int, int64_t>;
  // Pairs are where there is one group, and rows and the bytes from a class to the next are counted by 32 bits.
  using Row = std::conditional_t<V == 1, int64_t, uint32_t>;
  using Step = std::conditional_t<V == 1, int64_t, uint32_t>;

  int lane, groups, group;
  Row r;  // of the first pixel
  bool exist;
  const char* logits;
  char* grad;
  Step step, grad_step;  // bytes from one class to the next
  W* staged;
  Index n;
  enum : int { NO_TARGET = -1, IGNORED = -2, BAD = -3 };
  Index y[V];       // the target, or one of these; the logits of the last two are not read, and stand for 0
  Index target[V];  // the same as number j, or negative

  ANL_DEVICE Pixels(const Params& p, int tile, char* shared) {
    const SpatialPlan& plan = p.plan.spatial;
    groups = V > 1 ? 1 : int(blockDim.x) >> plan.column_bits;
    group = V > 1 ? 0 : int(threadIdx.x) >> plan.column_bits;
    lane = V > 1 ? int(threadIdx.x) : int(threadIdx.x) & ((1 << plan.column_bits) - 1);
    r = Row(blockIdx.x) * Row(plan.rows_per_cta) + Row(tile * plan.pixels + lane * V);
    exist = r < Row(p.num_rows);
    const Call& call = p.call;
    const Row row = exist ? r : 0, o = call.outer == 1 ? 0 : row / Row(call.inner), i = row - o * Row(call.inner);
    logits = static_cast<const char*>(call.logits) + offset(call.logits_strides, o, i);
    grad = static_cast<char*>(call.grad) + offset(call.grad_strides, o, i);
    step = Step(groups) * Step(call.logits_strides.sk) * Step(sizeof(S));
    grad_step = Step(groups) * Step(call.grad_strides.sk) * Step(sizeof(S));
    n = Index(plan.words_per_lane);
    staged = reinterpret_cast<W*>(shared) + threadIdx.x / WARP * WARP * int(n) + lane_index();
    if (group + (n - 1) * groups >= Index(call.num_classes)) --n;
  }

  // Of the group's first class.
  ANL_DEVICE int64_t offset(const Strides& s, Row o, Row i) const {
    const int64_t along = V == 1 ? i * s.si : i;
    return (o * s.so + along + (groups == 1 ? 0 : group * s.sk)) * int64_t(sizeof(S));
  }

  // label: a class, or what else y may be.
  ANL_DEVICE void set_label(int v, int64_t label) {
    y[v] = target[v] = Index(label);
    if (groups == 1 || y[v] < 0) return;
    const Index k = y[v] - group, j = k / groups;
    target[v] = k >= 0 && j * groups == k ? j : NO_TARGET;
  }
  ANL_DEVICE void read_label(const Call& call, int v) {
    const int64_t label = exist ? label_at(call, int64_t(r) + v) : call.ignore_index;
    set_label(v, label == call.ignore_index ? IGNORED : is_class(call, label) ? label : BAD);
  }
  ANL_DEVICE Label kind(int v) const { return y[v] >= 0 ? Label::LIVE : y[v] == IGNORED ? Label::IGNORED : Label::BAD; }
  ANL_DEVICE bool live(int v) const { return y[v] >= NO_TARGET; }

  ANL_DEVICE Index count_of(const Call& call) const { return Index(call.num_classes); }

  static ANL_DEVICE W load(const char* p) { return *reinterpret_cast<const W*>(p); }
  // The logit of the target, wherever it is.
  ANL_DEVICE T target_logit(const Call& call, int v) const {
    const int64_t apart = int64_t(y[v] - group) * call.logits_strides.sk * int64_t(sizeof(S));
    return y[v] >= 0 ? load(logits + apart).part(v) : T(0);
  }

  ANL_DEVICE W at(Index j) const { return STAGED ? staged[j * WARP] : load(logits + j * int64_t(step)); }
  // Pixel v's logit number j. Between its use and that of words stands a __syncwarp, for the compiler's sake.
  ANL_DEVICE S& number(Index j, int v) const { return reinterpret_cast<S*>(staged + j * WARP)[v]; }

  // `count` words, `step` bytes apart, to every WARP-th of shared memory.
  template <class To>
  static ANL_DEVICE void copy(const char* from, Step step, To* to, int count) {
#pragma unroll 4
    for (int j = 0; j < count; ++j, from += step) copy_async<sizeof(To)>(to + j * WARP, from);
    copy_async_commit();
    copy_async_wait<0>();
  }
  // Words of 2 bytes, by way of registers: so many at once, the last of them with some that were copied already.
  ANL_DEVICE void copy_by_registers() const {
    constexpr int AT_ONCE = 12;
#pragma unroll 1
    for (int j = 0; j < n && n < AT_ONCE; ++j) staged[j * WARP] = load(logits + j * int64_t(step));
#pragma unroll 1
    for (int j = 0; j < n && n >= AT_ONCE; j += AT_ONCE) {
      const int first = int(n) - j < AT_ONCE ? int(n) - AT_ONCE : j;
      const char* from = logits + first * int64_t(step);
      W z[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u, from += step) z[u] = load(from);
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) staged[(first + u) * WARP] = z[u];
    }
  }

  // What is read of the pixels, into shared memory. Of a pixel with a target, that changes places with the last number,
  // and is then -inf: so all the others exist, most often. unswap() makes good for the other. Of pairs,
  // z_y becomes the target's logit. aligned: SpatialPlan's.
  ANL_DEVICE void stage(bool aligned, T (&z_y)[V]) const {
    bool all = true, any = false;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      all = all && live(v);
      any = any || live(v);
    }
    if constexpr (sizeof(W) > 2) {
      if (any) copy(logits, step, staged, n);
    } else if (aligned) {  // of two lanes, one copies the even numbers of both, the other the odd ones
      const int odd = int(lane_index()) & 1;
      const char* from = logits + odd * (int64_t(step) - int64_t(sizeof(W)));
      if (__shfl_xor_sync(ALL_LANES, int(any), 1) || any)
        copy(from, 2 * step, reinterpret_cast<uint32_t*>(staged - odd + odd * WARP), (n - odd + 1) / 2);
      __syncwarp();
    } else if (any) {
      copy_by_registers();
    }
    if (!all)
      for (int j = 0; j < n; ++j) staged[j * WARP] = any ? living(staged[j * WARP]) : all_parts<S, V>(T(0));
    __syncwarp();
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (target[v] >= 0) {
        if (V > 1) z_y[v] = widen(number(target[v], v));
        number(target[v], v) = number(n - 1, v);
        number(n - 1, v) = narrow<S>(minus_inf<T>());
      }
    __syncwarp();
  }
  ANL_DEVICE void unswap() const {
    __syncwarp();
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (target[v] >= 0) number(n - 1, v) = number(target[v], v);
    __syncwarp();
  }
  // The word with zeros for pixels that are not read.
  ANL_DEVICE W living(W word) const {
    T x[V];
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = live(v) ? word.part(v) : T(0);
    return W::of(x);
  }

  // Every group gets the sums of all: `scratch` has room for one X per thread. All threads of the CTA call this.
  template <class X, class Merge>
  ANL_DEVICE X combine(X x, const Merge& merge, char* scratch) const {
    if (groups == 1) return x;
    X* all = reinterpret_cast<X*>(scratch);
    const int columns = int(blockDim.x) / groups;
    all[threadIdx.x] = x;
    __syncthreads();
    x = all[lane];
#pragma unroll 1
    for (int g = 1; g < groups; ++g) x = merge(x, all[g * columns + lane]);
    __syncthreads();
    return x;
  }

  // How many numbers are neither the target, nor what changed places with it; none of a pixel that is not read.
  ANL_DEVICE Index others() const { return STAGED ? n - 1 : live(0) ? n : 0; }
  // Pixel v's logit number j, for sums: -inf is none.
  ANL_DEVICE T other(Index j, W word, int v) const { return !STAGED && j == target[v] ? minus_inf<T>() : word.part(v); }

  // f(begin, end) adds some numbers to the sums: FOLD of them and then the next, up to `end`, each fold's on their own.
  template <class X, class F>
  static ANL_DEVICE void by_folds(X (&sums)[V], Index end, const F& f) {
    X before[V];
    for (Index j = 0; j < end;) {
      const Index fold = end - j < FOLD ? end : j + FOLD;
      f(j, fold);
      if (end > FOLD) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (j > 0) sums[v].add(before[v]);
          before[v] = sums[v];
          if (fold < end) clear(sums[v]);
        }
      }
      j = fold;
    }
  }

  template <bool FULL>
  ANL_DEVICE void first_sums(AnchoredSums<T, FULL> (&sums)[V], char* scratch) const {
    W high = all_parts<S, V>(minus_inf<T>()), low = all_parts<S, V>(T(INF));
#pragma unroll 4
    for (Index j = 0; j < others(); ++j) {
      W word = at(j);
      if constexpr (!STAGED) word = word.with(0, other(j, word, 0));
      high = larger_parts(high, word);
      low = smaller_parts(low, word);
    }
    const W last = STAGED ? at(n - 1) : high;
    high = larger_parts(high, last);
    T anchor[V];
    bool all = true;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[v] = none<AnchoredSums<T, FULL>>();
      sums[v].max = combine(high.part(v), Largest<T>(), scratch);
      anchor[v] = sums[v].anchor();
      all = all && low.part(v) > minus_inf<T>();
    }
    by_folds(sums, others(), [&](Index begin, Index end) {
      if (all) {
#pragma unroll 4
        for (Index j = begin; j < end; ++j) {
          const W word = at(j);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v].add_class(word.part(v), anchor[v]);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v].count_existing(T(end - begin), low.part(v));
      } else {
#pragma unroll 1
        for (Index j = begin; j < end; ++j) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v].add(other(j, at(j), v), anchor[v]);
        }
      }
    });
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (STAGED && target[v] < 0) sums[v].add(last.part(v), anchor[v]);
      sums[v] = combine(sums[v], MergeSameMax(), scratch);
    }
  }

  // Of two pixels that share no class: of each, the sum of what is above its bound, and how many those are.
  ANL_DEVICE void pair_heights(const RowSweep<T, false> (&sweep)[V], SecondSums<Scalar<T>, false> (&sums)[V]) const {
    const WordHeights<S> of_nothing(sweep[0].bound, sweep[1].bound);
    by_folds(sums, n, [&](Index begin, Index end) {
      WordHeights<S> heights = of_nothing;
#pragma unroll 4
      for (Index j = begin; j < end; ++j) heights.add({at(j).bits});
#pragma unroll
      for (int v = 0; v < V; ++v) heights.finish(v, T(end - begin), sums[v]);
    });
  }

  template <bool FULL>
  ANL_DEVICE void second_sums(const RowSweep<T, FULL> (&sweep)[V], SecondSums<Scalar<T>, FULL> (&sums)[V], bool wanted,
                              char* scratch) const {
    for (auto& s : sums) clear(s);
    if constexpr (!FULL && V == 2 && sizeof(S) == 2) {
      if (wanted && sweep[0].by_bound() && sweep[1].by_bound()) return pair_heights(sweep, sums);
    }
    if (wanted) {
      by_folds(sums, n, [&](Index begin, Index end) {
        sweep[0].run(sums[0], [&](const auto& add) {
          sweep[V - 1].run(sums[V - 1], [&](const auto& add_last) {
#pragma unroll (FULL ? 2 : 4)
            for (Index j = begin; j < end; ++j) {
              const W word = this->at(j);
              add(this->other(j, word, 0));
              if (V > 1) add_last(word.part(V - 1));
            }
          });
        });
      });
    }
#pragma unroll
    for (auto& s : sums) s = combine(s, MergeSameMax(), scratch);
  }

  ANL_DEVICE EntropySums<T> entropy_sums(const EntropyRow<T>& row, int v, const T* log_q, char* scratch) const {
    EntropySums<T> sums = {T(0), T(0)};
    const Index end = live(v) ? n : 0;
    for (Index j = 0; j < end;) {
      EntropySums<T> part = {T(0), T(0)};
      const Index fold = end - j < FOLD ? end : j + FOLD;
#pragma unroll 4
      for (; j < fold; ++j) row.add(part, at(j).part(v), log_q[group + j * groups]);
      sums = MergeEntropy<T>()(sums, part);
    }
    return combine(sums, MergeEntropy<T>(), scratch);
  }

  // value(v, z, j): the gradient of number j of pixel v, so many at a time. At the target, target_value(v).
  template <int AT_ONCE, class F, class Target>
  ANL_DEVICE void store(const F& value, const Target& target_value) const {
    bool read = true;
#pragma unroll
    for (int v = 0; v < V; ++v) read = read && live(v);
    char* to = grad;
    const Index count = exist ? n : 0;
    const auto put = [&](W word, Index j) {
      T x[V];
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = value(v, word.part(v), j);
      *reinterpret_cast<W*>(to) = W::of(x);
      to += grad_step;
    };
    if constexpr (STAGED) {
#pragma unroll (AT_ONCE)
      for (Index j = 0; j < count; ++j) put(at(j), j);
    } else {  // the gradient may take the logits' place: all that is read together is read before that
      const auto put_some = [&](Index j, auto guarded) {
        W words[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
          words[u] = all_parts<S, V>(T(0));
          if ((!guarded.value || j + u < count) && (read || V > 1)) words[u] = at(j + u);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
          if (!guarded.value || j + u < count) put(read ? words[u] : living(words[u]), j + u);
      };
      Index j = 0;
#pragma unroll 1
      for (; j + AT_ONCE <= count; j += AT_ONCE) put_some(j, std::false_type());
      if (j < count) put_some(j, std::true_type());
    }
    __syncwarp();  // keeps the target's store behind that of its word, in the compiler as well
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (count && target[v] >= 0)
        reinterpret_cast<S*>(grad + target[v] * int64_t(grad_step))[v] = narrow<S>(target_value(v));
  }
};

}  // namespace gpu
}  // namespace anl
