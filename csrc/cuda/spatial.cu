// Any strides: (N, K, d1, ...), transposed matrices, classes with gaps. Lanes run across rows ("pixels").
//
// A thread takes V neighbouring pixels, whose logits of a class are one word: two of them where every such word is aligned.
// Groups of warps share the classes of the same pixels where there are many: group g has classes g, g + groups, ... Pixels
// that fit are staged in shared memory, in the logits' own format, and read from there by every sweep; a thread sees only
// what it staged itself. Others are read again.
#include "entropy.cuh"
#include "long_rows.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 256;
// Registers are for so many of a multiprocessor's threads: 640, with 96 each; 512 where more is kept of a row.
template <class S, bool FULL>
constexpr int THREADS_HELD = sizeof(S) == 8 ? 2 * MAX_THREADS : FULL ? 512 : 640;
constexpr int UNROLL = 8;
constexpr int FOLD = 64;  // so many are added up before they are added to the others
constexpr int64_t STATIC_SHARED = 3 << 10;

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
    if constexpr (sizeof(S) == 2 && V == 2) return {narrow_pair<S>(x[0], x[1])};
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
    return {decltype(a.bits)(larger_pair<S>(a.bits, b.bits))};
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
    return {decltype(a.bits)(smaller_pair<S>(a.bits, b.bits))};
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

// ---- a thread's pixels ---------------------------------------------------------------------------------------------------

// And those of their classes that the thread takes: class group + j * groups is number j of n.
template <class S, int V, bool STAGED>
struct Pixels {
  using T = acc_t<S>;
  using W = Word<S, V>;
  using Index = std::conditional_t<STAGED || V != 1, int, int64_t>;
  // Pairs are where rows and the bytes from a class to the next are counted by 32 bits.
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
  bool live[V];     // read; else its logits stand for 0
  Index y[V];       // the target, or -1
  Index target[V];  // the same as number j, or -1

  ANL_DEVICE Pixels(const Params& p, int tile, char* shared) {
    const SpatialPlan& plan = p.plan.spatial;
    groups = int(blockDim.x) >> plan.column_bits;
    group = int(threadIdx.x) >> plan.column_bits;
    lane = int(threadIdx.x) & ((1 << plan.column_bits) - 1);
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
#pragma unroll
    for (int v = 0; v < V; ++v) {
      live[v] = false;
      y[v] = target[v] = -1;
    }
  }

  // Of the group's first class.
  ANL_DEVICE int64_t offset(const Strides& s, Row o, Row i) const {
    const int64_t along = V == 1 ? i * s.si : i;
    return (o * s.so + along + (groups == 1 ? 0 : group * s.sk)) * int64_t(sizeof(S));
  }

  // Pixel v is one that is read.
  ANL_DEVICE void set_label(int v, int64_t label) {
    live[v] = true;
    y[v] = target[v] = Index(label);
    if (groups == 1) return;
    const Index k = y[v] - group, j = k / groups;
    target[v] = k >= 0 && j * groups == k ? j : -1;
  }

  static ANL_DEVICE W load(const char* p) { return *reinterpret_cast<const W*>(p); }
  // The logit of the target, wherever it is.
  ANL_DEVICE T target_logit(const Call& call, int v) const {
    return live[v] ? load(logits + int64_t(y[v] - group) * call.logits_strides.sk * int64_t(sizeof(S))).part(v) : T(0);
  }

  ANL_DEVICE W at(Index j) const { return STAGED ? staged[j * WARP] : load(logits + j * int64_t(step)); }
  // Pixel v's logit number j. Between its use and that of words stands a __syncwarp, for the compiler's sake.
  ANL_DEVICE S& number(Index j, int v) const { return reinterpret_cast<S*>(staged + j * WARP)[v]; }

  // What is read of the pixels, into shared memory. Of a pixel with a target, that changes places with the last number, and
  // is then -inf: so all the others exist, most often. unswap() makes good for the other.
  ANL_DEVICE void stage() const {
    bool all = true, any = false;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      all = all && live[v];
      any = any || live[v];
    }
    if (any) {
      const char* from = logits;
      if constexpr (sizeof(W) == 2) {
        for (int j0 = 0; j0 < n; j0 += UNROLL, from += UNROLL * step) {
          W z[UNROLL];
#pragma unroll
          for (int u = 0; u < UNROLL; ++u)
            if (j0 + u < n) z[u] = load(from + u * int64_t(step));
#pragma unroll
          for (int u = 0; u < UNROLL; ++u)
            if (j0 + u < n) staged[(j0 + u) * WARP] = z[u];
        }
      } else {
#pragma unroll 4
        for (int j = 0; j < n; ++j, from += step) copy_async<sizeof(W)>(staged + j * WARP, from);
        copy_async_commit();
        copy_async_wait<0>();
      }
    }
    if (!all)
      for (int j = 0; j < n; ++j) staged[j * WARP] = any ? living(staged[j * WARP]) : all_parts<S, V>(T(0));
    __syncwarp();
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (target[v] >= 0) {
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
    for (int v = 0; v < V; ++v) x[v] = live[v] ? word.part(v) : T(0);
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

  // How many numbers are neither the target, nor what changed places with it.
  ANL_DEVICE Index others() const { return STAGED ? n - 1 : n; }
  // Pixel v's logit number j, for sums: -inf is none.
  ANL_DEVICE T other(Index j, W word, int v) const { return !STAGED && j == target[v] ? minus_inf<T>() : word.part(v); }

  // f(begin, end) for FOLD numbers and then the next, up to `end`.
  template <class F>
  static ANL_DEVICE void by_folds(Index end, const F& f) {
    for (Index j = 0; j < end; j += FOLD) f(j, end - j < FOLD ? end : j + FOLD);
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
    by_folds(others(), [&](Index begin, Index end) {
      AnchoredSums<T, FULL> part[V];
#pragma unroll
      for (auto& some : part) some = none<AnchoredSums<T, FULL>>();
      if (all) {
#pragma unroll 4
        for (Index j = begin; j < end; ++j) {
          const W word = at(j);
#pragma unroll
          for (int v = 0; v < V; ++v) part[v].add_existing(word.part(v), anchor[v]);
        }
#pragma unroll
        for (int v = 0; v < V; ++v) part[v].count_existing(T(end - begin), low.part(v));
      } else {
#pragma unroll 1
        for (Index j = begin; j < end; ++j) {
#pragma unroll
          for (int v = 0; v < V; ++v) part[v].add(other(j, at(j), v), anchor[v]);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v].add(part[v]);
    });
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (STAGED && target[v] < 0) sums[v].add(last.part(v), anchor[v]);
      sums[v] = combine(sums[v], MergeSameMax(), scratch);
    }
  }

  template <bool FULL>
  ANL_DEVICE void second_sums(const RowSweep<T> (&sweep)[V], SecondSums<Scalar<T>, FULL> (&sums)[V], bool wanted,
                              char* scratch) const {
    for (auto& s : sums) clear(s);
    if (wanted) {
      by_folds(n, [&](Index begin, Index end) {
        SecondSums<Scalar<T>, FULL> part[V];
        for (auto& s : part) clear(s);
        sweep[0].run(part[0], [&](const auto& add) {
          sweep[V - 1].run(part[V - 1], [&](const auto& add_last) {
#pragma unroll 4
            for (Index j = begin; j < end; ++j) {
              const W word = this->at(j);
              add(this->other(j, word, 0));
              if (V > 1) add_last(word.part(V - 1));
            }
          });
        });
#pragma unroll
        for (int v = 0; v < V; ++v) sums[v].add(part[v]);
      });
    }
#pragma unroll
    for (auto& s : sums) s = combine(s, MergeSameMax(), scratch);
  }

  ANL_DEVICE EntropySums<T> entropy_sums(const EntropyRow<T>& row, int v, const T* log_q, char* scratch) const {
    EntropySums<T> sums = {T(0), T(0)};
    if (live[v]) {
      by_folds(n, [&](Index begin, Index end) {
        EntropySums<T> part = {T(0), T(0)};
#pragma unroll 4
        for (Index j = begin; j < end; ++j) row.add(part, this->at(j).part(v), log_q[group + j * groups]);
        sums = MergeEntropy<T>()(sums, part);
      });
    }
    return combine(sums, MergeEntropy<T>(), scratch);
  }

  // value(v, z, j): the gradient of number j of pixel v. At the target, target_value(v).
  template <class F, class Target>
  ANL_DEVICE void store(const F& value, const Target& target_value) const {
    bool read = true;
#pragma unroll
    for (int v = 0; v < V; ++v) read = read && live[v];
    char* to = grad;
    const Index count = exist ? n : 0;
#pragma unroll 4
    for (Index j = 0; j < count; ++j, to += grad_step) {
      W word = all_parts<S, V>(T(0));
      if (STAGED || read) word = at(j);
      else if (V > 1) word = living(at(j));
      T x[V];
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = value(v, word.part(v), j);
      *reinterpret_cast<W*>(to) = W::of(x);
    }
    __syncwarp();  // keeps the target's store behind that of its word, in the compiler as well
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (count && target[v] >= 0)
        reinterpret_cast<S*>(grad + target[v] * int64_t(grad_step))[v] = narrow<S>(target_value(v));
  }
};

// ---- kernels -------------------------------------------------------------------------------------------------------------

// f(Parts<...>(), gradient) with what these pixels' gradients can depend on: most often all their classes are above the
// clamp, or all exist and the clamp changes what is added alone.
template <bool FULL, class T, int V, class F>
ANL_DEVICE void by_parts_of(const Program& program, const RowGradient<T> (&gradient)[V], const bool (&all_above)[V],
                            const bool (&all_exist)[V], const F& f) {
  if constexpr (!FULL) {
    bool above = true, exist = true;
    RowGradient<T> simple[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      above = above && all_above[v];
      exist = exist && all_exist[v] && gradient[v].row.slope == gradient[v].row.slope_above;
      simple[v] = {gradient[v].row.all_above(), gradient[v].max};
    }
    if (__all_sync(ALL_LANES, above)) return f(Parts<0>(), simple);
    if (__all_sync(ALL_LANES, above || exist)) return f(Parts<CLAMPED_OFFSET>(), gradient);
  }
  by_parts<FULL>(program, [&](auto parts) { f(parts, gradient); });
}

template <class S, bool FULL, int V, bool STAGED>
__global__ void __launch_bounds__(THREADS_HELD<S, FULL> / 2, sizeof(S) == 8 ? 1 : 2) spatial_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, memory);  // scratch, then the pixels
  ANL_STATIC_SHARED(double[WARP], shared);
  const Call& call = p.call;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  for (int tile = 0; tile < int(p.plan.spatial.rows_per_cta) / p.plan.spatial.pixels; ++tile) {
    Pixels<S, V, STAGED> pixels(p, tile, memory + p.plan.shared_bytes - p.plan.spatial.staged_bytes);
    Label kind[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t y = pixels.exist ? label_at(call, pixels.r + v) : call.ignore_index;
      kind[v] = label_kind(call, y);
      if (kind[v] == Label::LIVE) pixels.set_label(v, y);
    }
    T z_y[V];
#pragma unroll
    for (int v = 0; v < V; ++v) z_y[v] = pixels.target_logit(call, v);
    if constexpr (STAGED) pixels.stage();
    AnchoredSums<T, FULL> sums[V];
    pixels.template first_sums<FULL>(sums, memory);
    Row<T> row[V];
    RowSweep<T> sweep[V];
    bool second = false;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      row[v].set_first_sums(call.program, sums[v], z_y[v]);
      sweep[v] = row[v].sweep(call.program);
      second = second || (pixels.live[v] && row[v].second);
    }
    if (pixels.groups == 1 ? second : __syncthreads_or(second)) {
      SecondSums<Scalar<T>, FULL> found[V];
      pixels.template second_sums<FULL>(sweep, found, second, memory);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (row[v].second) row[v].set_second_sums(call.program, found[v]);
    }
    RowGradient<T> gradient[V];
    bool all_above[V], all_exist[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      total += double(finish_any_row<T, FULL>(p, pixels.r + v, pixels.y[v], kind[v], row[v], denominator,
                                              pixels.exist && pixels.group == 0, gradient[v]));
      all_exist[v] = !pixels.live[v] || sums[v].sums.of[COUNT] == T(call.num_classes - 1);
      all_above[v] = all_exist[v] && (!pixels.live[v] || gradient[v].all_above(sums[v].min));
    }
    if (!call.grad) continue;
    if constexpr (STAGED) pixels.unswap();
    by_parts_of<FULL>(call.program, gradient, all_above, all_exist, [&](auto parts, const RowGradient<T>(&rows)[V]) {
      pixels.store([&](int v, T z, auto) { return rows[v].template at<decltype(parts)::value>(z); },
                   [&](int v) { return rows[v].row.target; });
    });
  }
  if (p.loss) finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), shared), denominator);
}

template <class S, bool FULL, int V>
__global__ void __launch_bounds__(MAX_THREADS, 1) spatial_gradient_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, scratch);
  const Call& call = p.call;
  const T* log_q = static_cast<const T*>(call.log_q);
  Pixels<S, V, false> pixels(p, 0, nullptr);
  RowGradient<T> gradient[V];
  T z_y[V];
  EntropyRow<T> entropy[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t r = pixels.exist ? pixels.r + v : 0;
    const KnownRow<T, FULL> known(p, r);
    gradient[v] = known.gradient;
    if (pixels.exist && !known.unread) pixels.set_label(v, known.label(call, r));
    z_y[v] = pixels.target_logit(call, v);  // in place, another group overwrites it
    if (log_q) entropy[v] = EntropyRow<T>::begin(gradient[v].max, known.inv_sum, *static_cast<const T*>(call.entropy_scale));
  }
  if (log_q) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      entropy[v].set_center(pixels.entropy_sums(entropy[v], v, log_q, scratch));
      entropy[v].set_lost(pixels.entropy_sums(entropy[v], v, log_q, scratch));
    }
  }
  const auto more = [&](int v, T z, int64_t k) { return log_q && pixels.live[v] ? entropy[v].at(z, log_q[k]) : T(0); };
  by_parts<FULL>(call.program, [&](auto parts) {
    pixels.store(
        [&](int v, T z, int64_t j) {
          return gradient[v].template at<decltype(parts)::value>(z) + more(v, z, pixels.group + j * pixels.groups);
        },
        [&](int v) { return gradient[v].row.target + more(v, z_y[v], pixels.y[v]); });
  });
}

template <class S, bool FULL, int V>
cudaError_t launch_words(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  const size_t bytes = size_t(p.plan.shared_bytes);
  if (p.call.op == Op::GRAD)
    return ANL_LAUNCH((spatial_gradient_kernel<S, FULL, V>), grid, block, NO_CLUSTER, bytes, stream, p);
  if constexpr (sizeof(S) < 8)
    if (p.plan.spatial.staged_bytes)
      return ANL_LAUNCH((spatial_kernel<S, FULL, V, true>), grid, block, NO_CLUSTER, bytes, stream, p);
  if constexpr (V == 1)
    return ANL_LAUNCH((spatial_kernel<S, FULL, 1, false>), grid, block, NO_CLUSTER, bytes, stream, p);
  return cudaErrorInvalidConfiguration;  // the plan has no such words
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  if constexpr (sizeof(S) < 8)
    if (p.plan.spatial.word == 2) return launch_words<S, FULL, 2>(p, stream);
  return launch_words<S, FULL, 1>(p, stream);
}

// What groups tell one another, in bytes per thread.
template <class T>
int64_t exchanged_bytes(bool full) {
  const size_t first = full ? sizeof(AnchoredSums<T, true>) : sizeof(AnchoredSums<T, false>);
  const size_t second = full ? sizeof(SecondSums<Scalar<T>, true>) : sizeof(SecondSums<Scalar<T>, false>);
  return int64_t(std::max(first, second));
}

// Whether the logits of two neighbouring pixels are always one aligned word.
bool pairs(const void* data, const Strides& s, const Call& call, int64_t size) {
  const int64_t most = UINT32_MAX / size / (MAX_THREADS / 32);
  return s.si == 1 && s.sk <= most && s.sk >= 0 && call.num_classes <= INT32_MAX / MAX_THREADS && call.inner % 2 == 0 &&
         rows_of(call) <= INT32_MAX &&
         (reinterpret_cast<uintptr_t>(data) | uintptr_t(s.sk * size) | uintptr_t(call.outer == 1 ? 0 : s.so * size)) %
                 uintptr_t(2 * size) == 0;
}

// How a tile of pixels lies in threads: `word` pixels each; a column is a warp's pixels.
struct Tiling {
  int64_t word, columns, groups, words_per_lane, room;

  Tiling(const Call& call, const Limits& limits, int64_t pixels_per_word, int64_t most_threads)
      : word(pixels_per_word), room(limits.shared_bytes - STATIC_SHARED) {
    const int64_t N = rows_of(call), pixels = WARP * word, bytes = pixels * call.num_classes * logit_bytes(call);
    // Groups: enough threads for a multiprocessor although its shared memory holds few columns, or there are few at all.
    const int64_t held = std::max<int64_t>(1, room / bytes), warps = most_threads / WARP;
    const int64_t wanted = std::max(ceil_div(24, held), ceil_div(8 * int64_t(limits.num_sms), ceil_div(N, pixels)));
    groups = power_of_two(std::max<int64_t>(1, std::min(wanted, call.num_classes / 8)));
    while (groups > warps) groups /= 2;
    columns = std::min<int64_t>(4, warps / groups);
    while (columns > 1 && (N < 2 * columns * pixels * limits.num_sms || columns * bytes > room / 4)) columns /= 2;
    words_per_lane = ceil_div(call.num_classes, groups);
  }
  int64_t threads() const { return columns * groups * WARP; }
  int64_t staged_bytes(const Call& call) const { return threads() * words_per_lane * word * logit_bytes(call); }
  // Whether a multiprocessor's shared memory holds it for so many threads.
  bool fills(const Call& call, int64_t wanted) const { return room / staged_bytes(call) * threads() >= wanted; }
};

}  // namespace

Plan plan_spatial(const Call& call, const Limits& limits) {
  const bool wide = call.dtype == FLOAT64, grad = call.op == Op::GRAD;
  const int64_t N = rows_of(call), most_threads = std::min(limits.max_threads, MAX_THREADS), size = logit_bytes(call);
  const bool may_pair = !wide && pairs(call.logits, call.logits_strides, call, size) &&
                        (!call.grad || pairs(call.grad, call.grad_strides, call, size));
  Tiling tiling(call, limits, may_pair ? 2 : 1, most_threads);
  if (may_pair && !grad && !tiling.fills(call, 512)) tiling = Tiling(call, limits, 1, most_threads);
  Plan plan = {};
  plan.kernel = Kernel::SPATIAL;
  plan.cluster = 1;
  plan.threads = int(tiling.threads());
  const bool full = takes_full(call);
  const int64_t scratch = plan.threads * (wide ? exchanged_bytes<double>(full) : exchanged_bytes<float>(full));
  const int64_t used = tiling.groups > 1 ? scratch : 0, bytes = tiling.staged_bytes(call);
  const bool staged = !grad && !wide && used + bytes <= tiling.room;
  const int64_t pixels = tiling.columns * tiling.word * WARP, tiles = ceil_div(N, pixels);
  // Several tiles in turn, where there are many more than run at a time.
  const int64_t at_once = int64_t(limits.num_sms) * (2048 / plan.threads);
  const int64_t many = grad ? 1 : std::max<int64_t>(1, std::max(tiles / LOSS_PARTS, std::min<int64_t>(8, tiles / at_once)));
  int bits = 5;
  while ((WARP << (bits - 5)) < tiling.columns * WARP) ++bits;
  plan.spatial = {int(pixels), int(tiling.word), bits, int(tiling.words_per_lane), pixels * many, staged ? bytes : 0};
  plan.shared_bytes = used + plan.spatial.staged_bytes;
  plan.blocks = plan.loss_parts = ceil_div(tiles, many);
  return plan;
}

cudaError_t launch_spatial(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
