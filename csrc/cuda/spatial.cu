// Any strides: (N, K, d1, ...), transposed matrices, classes with gaps. Lanes run across rows ("pixels").
//
// A CTA takes a tile of pixels, one lane per pixel, and several groups of lanes share a tile's classes where there are
// many: group g has classes g, g + groups, ... A tile that fits is staged in shared memory, in the logits' own format,
// and read from there by every sweep; a thread sees only what it staged itself. A longer one is read again.
#include "entropy.cuh"
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

template <class S>
constexpr int MAX_THREADS = sizeof(S) == 8 ? 256 : 512;
constexpr int UNROLL = 8;
constexpr int FOLD = 64;  // so many classes are added in float, then on in double
constexpr int64_t STATIC_SHARED = 3 << 10;

// A pixel, and those of its classes that a thread takes.
template <class S, bool STAGED>
struct Pixel {
  using T = acc_t<S>;
  using Index = std::conditional_t<STAGED, int, int64_t>;

  int pixels, groups, group, lane;
  int64_t r;
  bool exists;
  const S* logits;
  S* grad;
  int64_t sk;
  S* staged;
  Index num_classes;  // to be looked at: none if the row is not read
  Index y;

  ANL_DEVICE Pixel(const Params& p, int tile, S* shared) {
    pixels = p.plan.spatial.pixels;
    groups = int(blockDim.x) / pixels;
    group = int(threadIdx.x) / pixels;
    lane = int(threadIdx.x) % pixels;
    r = int64_t(blockIdx.x) * p.plan.spatial.rows_per_cta + tile * pixels + lane;
    exists = r < p.num_rows;
    // One division, before there is anything to be saved around it.
    const int64_t row = exists ? r : 0, o = p.call.outer == 1 ? 0 : row / p.call.inner, i = row - o * p.call.inner;
    logits = static_cast<const S*>(p.call.logits) + offset(p.call.logits_strides, o, i);
    grad = static_cast<S*>(p.call.grad) + offset(p.call.grad_strides, o, i);
    sk = p.call.logits_strides.sk;
    staged = shared + lane;
    num_classes = 0;
    y = -1;
  }

  static ANL_DEVICE int64_t offset(const Strides& s, int64_t o, int64_t i) { return o * s.so + i * s.si; }

  // Until then the row is one that is not read.
  ANL_DEVICE void set_label(const Params& p, int64_t label) {
    num_classes = Index(p.call.num_classes);
    y = Index(label);
  }

  // Class k, -inf for the target.
  ANL_DEVICE T at(Index k) const {
    if constexpr (STAGED) return widen(staged[k * pixels]);
    return k == y ? minus_inf<T>() : widen(logits[k * sk]);
  }

  // f(k, z_k) for the thread's classes; fold() after every FOLD of them.
  template <class F, class Fold>
  ANL_DEVICE void each(const F& f, const Fold& fold) const {
    for (Index k0 = group; k0 < num_classes; k0 += FOLD * groups) {
      const Index end = k0 + FOLD * groups < num_classes ? k0 + FOLD * groups : num_classes;
#pragma unroll 4
      for (Index k = k0; k < end; k += groups) f(k, at(k));
      fold();
    }
  }

  // The largest of the thread's classes, which are staged on the way.
  ANL_DEVICE T stage() const {
    T max = minus_inf<T>();
    for (Index k0 = group; k0 < num_classes; k0 += UNROLL * groups) {
      S z[UNROLL];
#pragma unroll
      for (int j = 0; j < UNROLL; ++j)
        if (k0 + j * groups < num_classes) z[j] = logits[(k0 + j * groups) * sk];
#pragma unroll
      for (int j = 0; j < UNROLL; ++j) {
        const Index k = k0 + j * groups;
        if (k >= num_classes) continue;
        if (k == y) z[j] = narrow<S>(minus_inf<T>());
        if constexpr (STAGED) staged[k * pixels] = z[j];
        max = Largest<T>()(max, widen(z[j]));
      }
    }
    return max;
  }

  // Every group gets the sums of all: `scratch` has room for one X per thread. All threads of the CTA call this.
  template <class X, class Merge>
  ANL_DEVICE X combine(X x, const Merge& merge, void* scratch) const {
    if (groups == 1) return x;
    X* all = static_cast<X*>(scratch);
    all[threadIdx.x] = x;
    __syncthreads();
    x = all[lane];
    for (int g = 1; g < groups; ++g) x = merge(x, all[g * pixels + lane]);
    __syncthreads();
    return x;
  }

  template <bool FULL>
  ANL_DEVICE AnchoredSums<T, FULL> first_sums(void* scratch) const {
    auto part = none<AnchoredSums<T, FULL>>();
    part.max = combine(stage(), Largest<T>(), scratch);
    auto total = convert<double>(part);
    const T anchor = part.anchor();
    each([&](Index, T z) { part.add(z, anchor); },
         [&] {
           total.add(convert<double>(part));
           clear(part);
         });
    return combine(convert<T>(total), MergeSameMax(), scratch);
  }

  template <bool FULL>
  ANL_DEVICE SecondSums<Scalar<T>, FULL> second_sums(const RowSweep<T, FULL>& sweep, bool wanted, void* scratch) const {
    auto part = none<SecondSums<Scalar<T>, FULL>>();
    auto total = convert<double>(part);
    if (wanted) {
      sweep.run(part, [&](const auto& add) {
        this->each([&](Index, T z) { add(z); },
                   [&] {
                     total.add(convert<double>(part));
                     clear(part);
                   });
      });
    }
    return combine(convert<T>(total), MergeSameMax(), scratch);
  }

  ANL_DEVICE EntropySums<T> entropy_sums(const EntropyRow<T>& row, const T* log_q, void* scratch) const {
    EntropySums<T> part = {T(0), T(0)};
    EntropySums<double> total = {0.0, 0.0};
    each([&](Index k, T x) { row.add(part, k == y ? widen(logits[k * sk]) : x, log_q[k]); },
         [&] {
           total = MergeEntropy<double>()(total, {double(part.mass), double(part.moment)});
           part = {T(0), T(0)};
         });
    return combine(EntropySums<T>{T(total.mass), T(total.moment)}, MergeEntropy<T>(), scratch);
  }

  // value(k, z_k) to the gradient of the thread's classes; z_k is 0 in a row that is not read.
  template <class F>
  ANL_DEVICE void store(const Params& p, const F& value) const {
    if (!exists) return;
    const int64_t step = p.call.grad_strides.sk;
#pragma unroll 4
    for (Index k = group; k < Index(p.call.num_classes); k += groups)
      grad[k * step] = narrow<S>(value(k, num_classes ? at(k) : T(0)));
  }
};

template <class S, bool FULL, bool STAGED>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) spatial_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, memory);  // scratch, then the tile
  ANL_STATIC_SHARED(double[WARP], shared);
  S* staged = reinterpret_cast<S*>(memory + p.plan.shared_bytes - p.plan.spatial.staged_bytes);
  const Call& call = p.call;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  for (int tile = 0; tile < int(p.plan.spatial.rows_per_cta) / p.plan.spatial.pixels; ++tile) {
    Pixel<S, STAGED> pixel(p, tile, staged);
    const int64_t r = pixel.r, y = pixel.exists ? label_at(call, r) : call.ignore_index;
    const Label kind = label_kind(call, y);
    const bool live = kind == Label::LIVE, writes = pixel.exists && pixel.group == 0;
    if (live) pixel.set_label(p, y);
    const T z_y = live ? widen(pixel.logits[y * pixel.sk]) : T(0);
    Row<T> row;
    row.set_first_sums(call.program, pixel.template first_sums<FULL>(memory), z_y);
    const bool second = live && row.second;
    if (pixel.groups == 1 ? second : __syncthreads_or(second)) {
      const auto sums = pixel.template second_sums<FULL>(row.template sweep<FULL>(call.program), second, memory);
      if (second) row.set_second_sums(call.program, sums);
    }
    RowGradient<T, FULL> gradient;
    total += double(finish_any_row<T, FULL>(p, r, y, kind, row, denominator, writes, gradient));
    if (!call.grad) continue;
    by_parts<FULL>(call.program, [&](auto parts) {
      pixel.store(p, [&](auto k, T z) {
        return k == pixel.y ? gradient.row.target : gradient.template at<decltype(parts)::value>(z);
      });
    });
  }
  if (p.loss) finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), shared), denominator);
}

template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) spatial_gradient_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, scratch);
  const Call& call = p.call;
  Pixel<S, false> pixel(p, 0, nullptr);
  const int64_t r = pixel.exists ? pixel.r : 0;
  const KnownRow<T, FULL> known(p, r);
  if (pixel.exists && !known.unread) pixel.set_label(p, known.label(call, r));
  const T* log_q = static_cast<const T*>(call.log_q);
  const T z_y = pixel.y >= 0 ? widen(pixel.logits[pixel.y * pixel.sk]) : T(0);  // in place, another group overwrites it
  EntropyRow<T> entropy = {};
  if (log_q) {
    entropy = EntropyRow<T>::begin(known.gradient.max, known.inv_sum, *static_cast<const T*>(call.entropy_scale));
    entropy.set_center(pixel.entropy_sums(entropy, log_q, scratch));
    entropy.set_lost(pixel.entropy_sums(entropy, log_q, scratch));
  }
  by_parts<FULL>(call.program, [&](auto parts) {
    pixel.store(p, [&](int64_t k, T z) {
      const bool target = k == pixel.y;
      const T value = target ? known.gradient.row.target : known.gradient.template at<decltype(parts)::value>(z);
      return log_q && !known.unread ? value + entropy.at(target ? z_y : z, log_q[k]) : value;
    });
  });
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  const size_t bytes = size_t(p.plan.shared_bytes);
  if (p.call.op == Op::GRAD)
    return ANL_LAUNCH((spatial_gradient_kernel<S, FULL>), grid, block, NO_CLUSTER, bytes, stream, p);
  if constexpr (sizeof(S) < 8)
    if (p.plan.spatial.staged_bytes)
      return ANL_LAUNCH((spatial_kernel<S, FULL, true>), grid, block, NO_CLUSTER, bytes, stream, p);
  return ANL_LAUNCH((spatial_kernel<S, FULL, false>), grid, block, NO_CLUSTER, bytes, stream, p);
}

// What groups of lanes tell one another, in bytes per thread.
template <class T>
int64_t exchanged_bytes(bool full) {
  const size_t first = full ? sizeof(AnchoredSums<T, true>) : sizeof(AnchoredSums<T, false>);
  const size_t second = full ? sizeof(SecondSums<Scalar<T>, true>) : sizeof(SecondSums<Scalar<T>, false>);
  return int64_t(std::max(first, second));
}

// Groups: enough threads for a multiprocessor although its shared memory holds few pixels, or there are few at all.
int64_t groups_for(const Call& call, const Limits& limits, int64_t pixel_bytes, int64_t room, int64_t threads) {
  const int64_t held = std::max<int64_t>(WARP, room / pixel_bytes);
  const int64_t wanted = std::max(ceil_div(1024, held), ceil_div(256 * int64_t(limits.num_sms), rows_of(call)));
  int64_t groups = power_of_two(std::max<int64_t>(1, std::min(wanted, call.num_classes / 8)));
  while (groups > 1 && groups * WARP > threads) groups /= 2;
  return groups;
}

}  // namespace

Plan plan_spatial(const Call& call, const Limits& limits) {
  const bool wide = call.dtype == FLOAT64;
  const int64_t N = rows_of(call), pixel_bytes = call.num_classes * logit_bytes(call);
  const int64_t room = limits.shared_bytes - STATIC_SHARED;
  const int64_t threads = std::min(limits.max_threads, wide ? MAX_THREADS<double> : MAX_THREADS<float>);
  const int64_t groups = groups_for(call, limits, pixel_bytes, room, threads);
  int64_t pixels = std::min<int64_t>(4 * WARP, threads / groups / WARP * WARP);
  while (pixels > WARP && (N < 2 * pixels * limits.num_sms || pixels * pixel_bytes > room / 4)) pixels /= 2;
  Plan plan = {};
  plan.kernel = Kernel::SPATIAL;
  plan.cluster = 1;
  plan.threads = int(pixels * groups);
  const bool full = takes_full(call);
  const int64_t scratch = plan.threads * (wide ? exchanged_bytes<double>(full) : exchanged_bytes<float>(full));
  const int64_t used = groups > 1 ? scratch : 0;
  const bool staged = call.op != Op::GRAD && !wide && used + pixels * pixel_bytes <= room;
  const int64_t tiles = ceil_div(N, pixels), many = call.op == Op::LOSS ? ceil_div(tiles, LOSS_PARTS) : 1;
  plan.spatial = {int(pixels), pixels * many, staged ? pixels * pixel_bytes : 0};
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
