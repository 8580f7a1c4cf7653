// Any strides: (N, K, d1, ...), transposed matrices, classes with gaps. Lanes run across rows ("pixels").
//
// A thread takes V neighbouring pixels, whose logits of a class are one word: two where every such word is aligned.
// Groups of warps share the classes of the same pixels where there are many: group g has classes g, g + groups, ...
// Pixels that fit are staged in shared memory, in the logits' own format, and read from there by every sweep; a thread
// sees only what it staged itself. Others are read again, always by the full kernel: fewer to compile.
#include "pixels.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 256;
// Registers are for so many of a multiprocessor's threads: 640, with 96 each; 512 where more is kept of a row, or of pairs
// of float32.
template <class S, bool FULL>
constexpr int THREADS_HELD = sizeof(S) == 8 ? MAX_THREADS : FULL || sizeof(S) == 4 ? 512 : 640;
template <class S>
constexpr int CTAS = sizeof(S) == 8 ? 1 : 2;
template <class S>
constexpr int GRADIENT_CTAS = sizeof(S) == 8 ? 1 : 3;
constexpr int64_t STATIC_SHARED = 3 << 10;

// f(Parts<...>(), gradient) with what these pixels' gradients can depend on: most often all their classes are above the
// clamp, or all exist and the clamp changes what is added alone.
template <bool FULL, class T, int V, class F>
ANL_DEVICE void by_parts_of(const Program& program, const RowGradient<T, FULL> (&gradient)[V], const bool (&all_above)[V],
                            const bool (&all_exist)[V], const F& f) {
  if constexpr (!FULL) {
    bool above = true, exist = true;
    RowGradient<T, FULL> simple[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      above = above && all_above[v];
      exist = exist && all_exist[v] && gradient[v].row.slope == gradient[v].row.slope_above;
      simple[v] = gradient[v].all_above();
    }
    if (__all_sync(ALL_LANES, above)) return f(Parts<0>(), simple);
    if (__all_sync(ALL_LANES, above || exist)) return f(Parts<CLAMPED_OFFSET>(), gradient);
  }
  by_parts<FULL>(program, [&](auto parts) { f(parts, gradient); });
}

template <class S, bool FULL, int V, bool STAGED>
__global__ void __launch_bounds__(THREADS_HELD<S, FULL> / CTAS<S>, CTAS<S>)
    spatial_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, memory);  // scratch, then the pixels
  ANL_STATIC_SHARED(double[WARP], shared);
  const Call& call = p.call;
  const double denominator = loss_denominator<T>(p), grad_scale = inverse(denominator);
  double total = 0.0;
  for (int tile = 0; tile < int(p.plan.spatial.rows_per_cta) / p.plan.spatial.pixels; ++tile) {
    Pixels<S, V, STAGED> pixels(p, tile, memory + p.plan.shared_bytes - p.plan.spatial.staged_bytes);
#pragma unroll
    for (int v = 0; v < V; ++v) pixels.read_label(call, v);
    T z_y[V];
#pragma unroll
    for (int v = 0; v < V; ++v) z_y[v] = STAGED && V > 1 ? T(0) : pixels.target_logit(call, v);
    if constexpr (STAGED) pixels.stage(p.plan.spatial.aligned, z_y);
    AnchoredSums<T, FULL> sums[V];
    pixels.template first_sums<FULL>(sums, memory);
    Row<T> row[V];
    RowSweep<T, FULL> sweep[V];
    bool second = false;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      row[v].set_first_sums(call.program, sums[v], z_y[v]);
      sweep[v] = row[v].template sweep<FULL>(call.program);
      second = second || (pixels.live(v) && row[v].second);
    }
    if (pixels.groups == 1 ? second : __syncthreads_or(second)) {
      SecondSums<Scalar<T>, FULL> found[V];
      pixels.template second_sums<FULL>(sweep, found, second, memory);
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (row[v].second) row[v].set_second_sums(call.program, found[v]);
    }
    RowGradient<T, FULL> gradient[V];
    bool all_above[V], all_exist[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool writes = pixels.exist && pixels.group == 0;
      total += double(finish_any_row<T, FULL>(p, int64_t(pixels.r) + v, pixels.y[v], pixels.kind(v), row[v],
                                              grad_scale, writes, gradient[v]));
      all_exist[v] = !pixels.live(v) || sums[v].sums.of[COUNT] == T(pixels.count_of(call) - 1);
      all_above[v] = all_exist[v] && (!pixels.live(v) || gradient[v].all_above(sums[v].min));
    }
    if (!call.grad) continue;
    if constexpr (STAGED) pixels.unswap();
    by_parts_of<FULL>(call.program, gradient, all_above, all_exist, [&](auto parts, const RowGradient<T, FULL>(&rows)[V]) {
      pixels.template store<FULL ? 2 : 4>([&](int v, T z, auto) { return rows[v].template at<decltype(parts)::value>(z); },
                   [&](int v) { return rows[v].row.target; });
    });
  }
  if (p.loss) finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), shared), denominator);
}

template <class S, bool FULL, int V>
__global__ void __launch_bounds__(MAX_THREADS, GRADIENT_CTAS<S>)
    spatial_gradient_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, scratch);
  const Call& call = p.call;
  const T* log_q = static_cast<const T*>(call.log_q);
  Pixels<S, V, false> pixels(p, 0, nullptr);
  RowGradient<T, FULL> gradient[V];
  T z_y[V];
  EntropyRow<T> entropy[V] = {};
  const int64_t first = pixels.exist ? int64_t(pixels.r) : 0;
  GivenRow<T> given[V];
#pragma unroll
  for (int v = 0; v < V; ++v) given[v].set_all_but_coefs(call, first + v);
#pragma unroll
  for (int i = 0; i < NUM_COEFS; ++i) {
    const auto* at = reinterpret_cast<const Word<T, V>*>(GivenRow<T>::coefs_of(p, first) + i * p.num_rows);
#pragma unroll
    for (int v = 0; v < V; ++v) given[v].coefs[i] = at->part(v);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const KnownRow<T, FULL, V == 1> known(call, given[v]);
    gradient[v] = known.gradient;
    pixels.set_label(v, pixels.exist && !known.unread ? known.label : pixels.IGNORED);
    z_y[v] = pixels.target_logit(call, v);  // in place, another group overwrites it
    if (!log_q) continue;
    entropy[v] = EntropyRow<T>::begin(gradient[v].max, known.inv_sum, *static_cast<const T*>(call.entropy_scale));
  }
  if (log_q) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      entropy[v].set_center(pixels.entropy_sums(entropy[v], v, log_q, scratch));
      entropy[v].set_lost(pixels.entropy_sums(entropy[v], v, log_q, scratch));
    }
  }
  const auto more = [&](int v, T z, int64_t k) { return log_q && pixels.live(v) ? entropy[v].at(z, log_q[k]) : T(0); };
  by_parts<FULL>(call.program, [&](auto parts) {
    pixels.template store<FULL ? 3 : 6>(
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
    return ANL_LAUNCH((spatial_kernel<S, true, 1, false>), grid, block, NO_CLUSTER, bytes, stream, p);
  return cudaErrorInvalidConfiguration;  // the plan has no such words
}

// Of lean kernels alone: fewer to compile.
template <bool FULL, int SIZE>
constexpr bool HAS_PAIRS = !FULL && SIZE < 8;

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  if constexpr (HAS_PAIRS<FULL, sizeof(S)>)
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

// Whether the logits of two neighbouring pixels are always one aligned word, and 32 bits count what Pixels says.
bool pairs(const void* data, const Strides& s, const Call& call) {
  const int64_t size = logit_bytes(call), along = call.outer == 1 ? 0 : s.so;
  return s.si == 1 && call.inner % 2 == 0 && s.sk >= 0 && s.sk <= UINT32_MAX / size && rows_of(call) <= INT32_MAX &&
         call.num_classes <= INT32_MAX &&
         (reinterpret_cast<uintptr_t>(data) | uintptr_t((s.sk | along) * size)) % uintptr_t(2 * size) == 0;
}

// How a tile of pixels lies in threads: `word` pixels each; a column is a warp's pixels.
struct Tiling {
  int64_t word, columns, groups, words_per_lane, room;

  Tiling(const Call& call, const Limits& limits, int64_t pixels_per_word)
      : word(pixels_per_word), room(limits.shared_bytes - STATIC_SHARED) {
    const int64_t N = rows_of(call), pixels = WARP * word;
    const int64_t bytes = call.op == Op::GRAD ? 1 : pixels * call.num_classes * logit_bytes(call);  // of shared memory
    const int64_t warps = std::min(limits.max_threads, MAX_THREADS) / WARP;
    // Groups: enough warps for a multiprocessor although its shared memory holds few columns, or there are few at all.
    // Pairs do with fewer, as each thread has two pixels' work.
    const int64_t held = std::max<int64_t>(1, room / bytes), enough = word == 2 ? 10 : 16;
    const int64_t wanted = std::max(ceil_div(enough, held), ceil_div(8 * int64_t(limits.num_sms), ceil_div(N, pixels)));
    groups = power_of_two(std::max<int64_t>(1, std::min(wanted, call.num_classes / 8)));
    while (groups > warps) groups /= 2;
    columns = power_of_two(std::min<int64_t>(4, std::max<int64_t>(1, warps / groups)) + 1) / 2;
    while (columns > 1 && (N < 2 * columns * pixels * limits.num_sms || columns * bytes > room / 4)) columns /= 2;
    words_per_lane = ceil_div(call.num_classes, groups);
  }
  int64_t threads() const { return columns * groups * WARP; }
  int64_t bytes(const Call& call) const { return threads() * words_per_lane * word * logit_bytes(call); }
};

}  // namespace

Plan plan_spatial(const Call& call, const Limits& limits) {
  const bool wide = call.dtype == FLOAT64, grad = call.op == Op::GRAD, full = takes_full(call);
  const bool aligned = pairs(call.logits, call.logits_strides, call);
  const bool paired = !wide && !full && aligned && (!call.grad || pairs(call.grad, call.grad_strides, call)) &&
                      (!grad || reinterpret_cast<uintptr_t>(call.grad_coefs) % (2 * sizeof(float)) == 0);
  Tiling tiling(call, limits, paired ? 2 : 1);
  if (paired && (tiling.groups > 1 || (!grad && tiling.bytes(call) > tiling.room))) tiling = Tiling(call, limits, 1);
  Plan plan = {};
  plan.kernel = Kernel::SPATIAL;
  plan.cluster = 1;
  plan.threads = int(tiling.threads());
  const auto scratch = [&](bool of_full) {
    const int64_t per_thread = wide ? exchanged_bytes<double>(of_full) : exchanged_bytes<float>(of_full);
    return tiling.groups > 1 ? plan.threads * per_thread : 0;
  };
  const int64_t bytes = tiling.bytes(call);
  const bool staged = !grad && !wide && scratch(full) + bytes <= tiling.room;
  const int64_t pixels = tiling.columns * tiling.word * WARP, tiles = ceil_div(rows_of(call), pixels);
  // Several tiles in turn, where there are many more than run at a time.
  const int64_t at_once = int64_t(limits.num_sms) * (2048 / plan.threads);
  const int64_t in_turn = std::max<int64_t>(tiles / LOSS_PARTS, std::min<int64_t>(8, tiles / at_once));
  const int64_t many = grad ? 1 : std::max<int64_t>(1, in_turn);
  int bits = 0;
  while (1 << bits < tiling.columns * WARP) ++bits;
  plan.spatial = {int(pixels), int(tiling.word), aligned, bits, int(tiling.words_per_lane),
                  pixels * many, staged ? bytes : 0};
  plan.shared_bytes = staged ? scratch(full) + bytes : scratch(full || !grad);
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
