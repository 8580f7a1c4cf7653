// Any strides: (N, K, d1, ...), transposed matrices, classes with gaps. Lanes run across rows ("pixels").
//
// A CTA takes a tile of pixels, one lane a pixel, and several groups of lanes share a tile's classes where there are
// many: group g has classes g, g + groups, ... A tile that fits is staged in shared memory, in the logits' own format,
// and read from there by every sweep; a thread sees only what it staged itself. A longer one is read again.
#include <algorithm>
#include <type_traits>

#include "entropy.cuh"
#include "row_common.cuh"

namespace anl {
namespace gpu {
namespace {

template <class S>
constexpr int MAX_THREADS = sizeof(S) == 8 ? 256 : 512;
constexpr int UNROLL = 8;
constexpr int FOLD = 64;  // so many classes are added in float, then on in double
constexpr int64_t STATIC_SHARED = 3 << 10;
constexpr int64_t LOSS_PARTS = 16 << 10;  // beyond, a CTA takes more tiles

// A pixel, and a thread's share of its classes.
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
    pixels = p.plan.lanes;
    groups = int(blockDim.x) / pixels;
    group = int(threadIdx.x) / pixels;
    lane = int(threadIdx.x) % pixels;
    r = int64_t(blockIdx.x) * p.plan.rows + tile * pixels + lane;
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

  ANL_DEVICE void open(const Params& p, int64_t label) {
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

  // Every group gets the sums of all: `scratch` has room for one X a thread. All threads of the CTA call this.
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

  ANL_DEVICE FirstSums<T> first_sums(void* scratch) const {
    FirstSums<T> part = FirstSums<T>::none();
    const T max = combine(stage(), Largest<T>(), scratch);
    FirstSums<double> total = FirstSums<double>::none();
    part.max = max;
    total.max = double(max);
    const T anchor = part.anchor();
    const FirstSums<T> nothing = part;
    each([&](Index, T x) { part.add(x, anchor); },
         [&] {
           total = MergeFirst<double>()(total, convert<double>(part));
           part = nothing;
         });
    return combine(convert<T>(total), MergeFirst<T>(), scratch);
  }

  template <bool FOCAL>
  ANL_DEVICE SecondSums<T> second_sums(const SecondSweep<T>& sweep, bool wanted, void* scratch) const {
    SecondSums<T> part = SecondSums<T>::none();
    SecondSums<double> total = SecondSums<double>::none();
    if (wanted) {
      each([&](Index, T x) { sweep.template add<FOCAL>(part, x); },
           [&] {
             total = MergeSecond<double>()(total, convert<double>(part));
             part = SecondSums<T>::none();
           });
    }
    return combine(convert<T>(total), MergeSecond<T>(), scratch);
  }

  ANL_DEVICE EntropySums<T> entropy_sums(const EntropyRow<T>& row, const T* log_q, void* scratch) const {
    EntropySums<T> part = {T(0), T(0)};
    EntropySums<double> total = {0.0, 0.0};
    each([&](Index k, T x) { row.add(part, k == y ? widen(logits[k * sk]) : x, log_q[k]); },
         [&] {
           total = {total.mass + double(part.mass), total.moment + double(part.moment)};
           part = {T(0), T(0)};
         });
    return combine(EntropySums<T>{T(total.mass), T(total.moment)}, MergeEntropy<T>(), scratch);
  }

  // value(k, z_k) to every class of the thread's; of a row that is not read, z_k is 0.
  template <class F>
  ANL_DEVICE void store(const Params& p, const F& value) const {
    if (!exists) return;
    const int64_t step = p.call.grad_strides.sk;
#pragma unroll 4
    for (Index k = group; k < Index(p.call.num_classes); k += groups)
      grad[k * step] = narrow<S>(value(k, num_classes ? at(k) : T(0)));
  }
};

template <class S, bool FOCAL, bool STAGED>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) spatial_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, memory);  // scratch, then the tile
  ANL_STATIC_SHARED(double[WARP], shared);
  S* staged = reinterpret_cast<S*>(memory + p.plan.shared_bytes - p.plan.tile * p.plan.lanes * int64_t(sizeof(S)));
  const Call& call = p.call;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  for (int tile = 0; tile < int(p.plan.rows) / p.plan.lanes; ++tile) {
    Pixel<S, STAGED> pixel(p, tile, staged);
    const int64_t r = pixel.r, y = pixel.exists ? label_at(call, r) : call.ignore_index;
    const Label kind = label_kind(call, y);
    const bool live = kind == Label::LIVE, writes = pixel.exists && pixel.group == 0;
    if (live) pixel.open(p, y);
    const T z_y = live ? widen(pixel.logits[y * pixel.sk]) : T(0);
    Row<T> row;
    row.begin(call.program, pixel.first_sums(memory), z_y);
    const bool second = live && row.second;
    if (pixel.groups == 1 ? second : __syncthreads_or(second)) {
      const SecondSums<T> sums = pixel.template second_sums<FOCAL>(row.sweep(call.program), second, memory);
      if (second) row.take(sums, FOCAL);
    }
    GradientRow<T> gradient;
    total += double(finish_any_row<T, FOCAL>(p, r, y, kind, row, denominator, writes, gradient));
    if (call.grad)
      pixel.store(p, [&](auto k, T x) { return k == pixel.y ? gradient.target : gradient.template at<FOCAL>(x); });
  }
  if (p.loss) finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), shared), denominator);
}

template <class S, bool FOCAL>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) spatial_gradient_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_SHARED(char, scratch);
  const Call& call = p.call;
  Pixel<S, false> pixel(p, 0, nullptr);
  const int64_t r = pixel.exists ? pixel.r : 0;
  const KnownRow<T, FOCAL> known(p, r);
  if (pixel.exists && !known.unread) pixel.open(p, known.label(call, r));
  const T* log_q = static_cast<const T*>(call.log_q);
  const T z_y = pixel.y >= 0 ? widen(pixel.logits[pixel.y * pixel.sk]) : T(0);  // in place, another group overwrites it
  EntropyRow<T> entropy = {};
  if (log_q) {
    entropy = EntropyRow<T>::begin(known.gradient.max, known.inv_sum, *static_cast<const T*>(call.entropy_scale));
    entropy.take_center(pixel.entropy_sums(entropy, log_q, scratch));
    entropy.take_lost(pixel.entropy_sums(entropy, log_q, scratch));
  }
  pixel.store(p, [&](int64_t k, T x) {
    const bool target = k == pixel.y;
    const T value = target ? known.gradient.target : known.gradient.template at<FOCAL>(x);
    return log_q && !known.unread ? value + entropy.at(target ? z_y : x, log_q[k]) : value;
  });
}

template <class S, bool FOCAL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  const size_t bytes = size_t(p.plan.shared_bytes);
  if (p.call.op == Op::GRAD) return ANL_LAUNCH((spatial_gradient_kernel<S, FOCAL>), grid, block, NO_CLUSTER, bytes, stream, p);
  if constexpr (sizeof(S) < 8)
    if (p.plan.tile) return ANL_LAUNCH((spatial_kernel<S, FOCAL, true>), grid, block, NO_CLUSTER, bytes, stream, p);
  return ANL_LAUNCH((spatial_kernel<S, FOCAL, false>), grid, block, NO_CLUSTER, bytes, stream, p);
}

int64_t power_of_two(int64_t n) {
  int64_t x = 1;
  while (x < n) x *= 2;
  return x;
}

}  // namespace

Plan plan_spatial(const Call& call, const Limits& limits) {
  const int64_t N = call.outer * call.inner, K = call.num_classes, pixel_bytes = K * size_of(call.dtype);
  const int64_t room = limits.shared_bytes - STATIC_SHARED;
  const int64_t threads = std::min(limits.max_threads, call.dtype == FLOAT64 ? MAX_THREADS<double> : MAX_THREADS<float>);
  // Groups: enough threads for a multiprocessor although its shared memory holds few pixels, or there are few at all.
  const int64_t held = std::max<int64_t>(WARP, room / pixel_bytes);
  const int64_t wanted = std::max(ceil_div(1024, held), ceil_div(256 * int64_t(limits.num_sms), N));
  int64_t groups = power_of_two(std::max<int64_t>(1, std::min(wanted, K / 8)));
  while (groups > 1 && groups * WARP > threads) groups /= 2;
  int64_t pixels = std::min<int64_t>(4 * WARP, threads / groups / WARP * WARP);
  while (pixels > WARP && (N < 2 * pixels * limits.num_sms || pixels * pixel_bytes > room / 4)) pixels /= 2;
  Plan plan = {};
  plan.kernel = Kernel::SPATIAL;
  plan.cluster = 1;
  plan.lanes = int(pixels);
  plan.threads = int(pixels * groups);
  const int64_t sums = call.dtype == FLOAT64 ? sizeof(SecondSums<double>) : sizeof(SecondSums<float>);
  const int64_t scratch = groups > 1 ? plan.threads * sums : 0;
  const bool staged = call.op != Op::GRAD && call.dtype != FLOAT64 && scratch + pixels * pixel_bytes <= room;
  plan.tile = staged ? K : 0;
  plan.shared_bytes = scratch + (staged ? pixels * pixel_bytes : 0);
  const int64_t tiles = ceil_div(N, pixels), many = call.op == Op::LOSS ? std::max<int64_t>(1, tiles / LOSS_PARTS) : 1;
  plan.rows = pixels * many;
  plan.blocks = ceil_div(tiles, many);
  plan.loss_parts = plan.blocks;
  return plan;
}

cudaError_t launch_spatial(const Params& p, cudaStream_t stream) {
  return by_variant(p.call, [&](auto s, auto focal) {
    return launch_variant<typename decltype(s)::type, decltype(focal)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
