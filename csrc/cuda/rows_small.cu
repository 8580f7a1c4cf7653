// Rows of few classes (K <= 1024), in registers: a group of 1 to 32 lanes a row, several rows a warp.
//
// Logits are read once and the gradient is written once. All sums of a row stay in its warp; lanes of a group compute
// the row's scalar mathematics together, each the whole of it. A batch that one CTA holds is a single launch.
#include "row_common.cuh"

namespace anl {
namespace gpu {
namespace {

template <class S>
constexpr int MAX_ELEMENTS = sizeof(S) == 8 ? 16 : 32;
template <class S>
constexpr int MAX_THREADS = sizeof(S) == 8 ? 256 : 512;

// Every lane gets the reduction over its aligned group of `lanes`, a power of two.
template <class X, class Merge>
ANL_DEVICE X group_reduce(X x, int lanes, const Merge& merge) {
  for (int offset = 1; offset < lanes; offset *= 2) {
    const X other = shuffle_xor(x, offset);
    x = lane_index() & unsigned(offset) ? merge(other, x) : merge(x, other);
  }
  return x;
}

// One row's share of a lane. Element v of chunk c is class first + c chunk_step + v element_step: with packs a chunk is
// 16 aligned bytes, and the row may begin and end within one; without, neighbouring lanes have neighbouring classes.
template <class S, int E>
struct LaneRow {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>, CHUNKS = E / P;

  T x[E];
  int first, chunk_step, element_step, num_classes, used;
  bool packs;

  ANL_DEVICE void place(const Params& p, const S* row) {
    packs = p.plan.packs;
    const int lanes = p.plan.lanes, lane = int(lane_index()) % lanes;
    const int shift = packs ? int(reinterpret_cast<uintptr_t>(row) / sizeof(S) % P) : 0;
    num_classes = int(p.call.num_classes);
    first = packs ? lane * P - shift : lane;
    element_step = packs ? 1 : lanes;
    chunk_step = lanes * P;
    used = (num_classes + shift + chunk_step - 1) / chunk_step;
  }

  ANL_DEVICE bool whole(int k0) const { return packs && k0 >= 0 && k0 + P <= num_classes; }

  ANL_DEVICE void load(const S* row, bool live) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      T pack[P];
#pragma unroll
      for (T& value : pack) value = live ? minus_inf<T>() : T(0);
      const int k0 = first + c * chunk_step;
      if (live && c < used) {
        if (whole(k0)) {
          widen_pack<S>(load16(row + k0), pack);
        } else {
#pragma unroll
          for (int v = 0; v < P; ++v) {
            const int k = k0 + v * element_step;
            if (unsigned(k) < unsigned(num_classes)) pack[v] = widen(row[k]);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < P; ++v) x[c * P + v] = pack[v];
    }
  }

  ANL_DEVICE void store(S* row) const {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      T pack[P];
#pragma unroll
      for (int v = 0; v < P; ++v) pack[v] = x[c * P + v];
      const int k0 = first + c * chunk_step;
      if (c >= used) continue;
      if (whole(k0)) {
        store16(row + k0, narrow_pack<S>(pack));
      } else {
#pragma unroll
        for (int v = 0; v < P; ++v) {
          const int k = k0 + v * element_step;
          if (unsigned(k) < unsigned(num_classes)) row[k] = narrow<S>(pack[v]);
        }
      }
    }
  }

  // Class y's element, in the lane that has it.
  ANL_DEVICE void put(int y, T value) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int k0 = first + c * chunk_step;
      if (y < k0 || y >= k0 + chunk_step) continue;
#pragma unroll
      for (int v = 0; v < P; ++v)
        if (k0 + v * element_step == y) x[c * P + v] = value;
    }
  }

  // f(element) for the chunks in use.
  template <class F>
  ANL_DEVICE void each(const F& f) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (c >= used) continue;
#pragma unroll
      for (int v = 0; v < P; ++v) f(x[c * P + v]);
    }
  }

  ANL_DEVICE FirstSums<T> first_sums(int lanes) {
    FirstSums<T> s = FirstSums<T>::none();
    each([&](T v) { s.max = v > s.max ? v : s.max; });
    s.max = group_reduce(s.max, lanes, Largest<T>());
    const T anchor = s.anchor();
    each([&](T v) { s.add(v, anchor); });
    s.min = group_reduce(s.min, lanes, Smallest<T>());
    s.tail = group_reduce(s.tail, lanes, Add<T>());
    s.gap = group_reduce(s.gap, lanes, Add<T>());
    s.count = group_reduce(s.count, lanes, Add<T>());
    return s;
  }

  template <bool FOCAL>
  ANL_DEVICE SecondSums<T> second_sums(const SecondSweep<T>& sweep, int lanes) {
    SecondSums<T> s = SecondSums<T>::none();
    each([&](T v) { sweep.template add<FOCAL>(s, v); });
    return group_reduce(s, lanes, MergeSecond<T>());
  }
};

template <class S, int E, bool FOCAL>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) rows_small_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  const Call& call = p.call;
  const int lanes = p.plan.lanes, groups = int(blockDim.x) / lanes;
  const bool leader = lane_index() % unsigned(lanes) == 0;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  for (int64_t i = 0; i < p.plan.rows; i += groups) {
    const int64_t r = blockIdx.x * p.plan.rows + i + threadIdx.x / lanes;
    const bool exists = r < p.num_rows;
    const int64_t y = exists ? label_at(call, r) : call.ignore_index;
    const Label kind = label_kind(call, y);
    const bool live = kind == Label::LIVE;
    const int64_t offset = exists ? row_offset(call, call.logits_strides, r) : 0;
    const S* logits = static_cast<const S*>(call.logits) + offset;
    LaneRow<S, E> lane;
    lane.place(p, logits);
    lane.load(logits, live);
    const T z_y = live ? widen(logits[y]) : T(0);
    if (live) lane.put(int(y), minus_inf<T>());

    Row<T> row;
    row.begin(call.program, lane.first_sums(lanes), z_y);
    if (__any_sync(ALL_LANES, row.second)) {
      const SecondSums<T> sums = lane.template second_sums<FOCAL>(row.sweep(call.program), lanes);
      if (row.second) row.take(sums, FOCAL);
    }
    const bool writes = leader && exists;
    GradientRow<T> gradient;
    total += double(finish_any_row<T, FOCAL>(p, r, y, kind, row, denominator, writes, gradient));
    __syncwarp();  // in place, a lane overwrites the target's logit, which others have read
    if (call.grad && exists) {
      lane.each([&](T& v) { v = gradient.template at<FOCAL>(v); });
      if (live) lane.put(int(y), gradient.target);
      lane.store(static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r));
    }
  }
  if (!p.loss) return;
  ANL_STATIC_SHARED(double[WARP], shared);
  finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), shared), denominator);
}

template <class S, bool FOCAL, int E>
cudaError_t launch_elements(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_small_kernel<S, E, FOCAL>), grid, block, NO_CLUSTER, 0, stream, p);
}

template <class S, bool FOCAL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  if constexpr (MAX_ELEMENTS<S> > 16) {
    if (p.plan.elements == 8) return launch_elements<S, FOCAL, 8>(p, stream);
    if (p.plan.elements == 16) return launch_elements<S, FOCAL, 16>(p, stream);
  }
  return launch_elements<S, FOCAL, MAX_ELEMENTS<S>>(p, stream);
}

}  // namespace

cudaError_t launch_small(const Params& p, cudaStream_t stream) {
  return by_variant(p.call, [&](auto s, auto focal) {
    return launch_variant<typename decltype(s)::type, decltype(focal)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
