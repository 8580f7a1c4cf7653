// Rows of few classes (K <= 1024), in registers: a group of 1 to 32 lanes per row, several rows per warp.
//
// Logits are read once and the gradient is written once. All sums of a row stay in its warp; lanes of a group compute
// the row's scalar mathematics together, each the whole of it. A batch that one CTA holds is a single launch.
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

template <class S>
constexpr int MAX_ELEMENTS = sizeof(S) == 8 ? 16 : 32;
template <class S>
constexpr int MAX_THREADS = sizeof(S) == 8 ? 256 : 512;

// Every lane gets the reduction over its aligned group of `lanes`, a power of two.
struct GroupReduce {
  int lanes;

  template <class A, class Merge>
  ANL_DEVICE A operator()(A x, const Merge& merge) const {
    for (int offset = 1; offset < lanes; offset *= 2) {
      const A other = shuffle_xor(x, offset);
      x = lane_index() & unsigned(offset) ? merge(other, x) : merge(x, other);
    }
    return x;
  }
};

// A lane's classes of one row. Element v of chunk c is class first + c chunk_step + v element_step: with packs a chunk is
// 16 aligned bytes, and the row may begin and end within one; without, neighbouring lanes have neighbouring classes.
template <class S, int E>
struct RegisterRow {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>, CHUNKS = E / P;

  T x[E];
  int first, chunk_step, element_step, num_classes, used;
  bool packs;

  ANL_DEVICE void place(const Params& p, const S* row) {
    packs = p.plan.small.packs;
    const int lanes = p.plan.small.lanes, lane = int(lane_index()) % lanes;
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

  template <bool FULL>
  ANL_DEVICE AnchoredSums<T, FULL> first_sums(const GroupReduce& group) {
    auto s = none<AnchoredSums<T, FULL>>();
    each([&](T z) { s.max = z > s.max ? z : s.max; });
    s.max = group(s.max, Largest<T>());
    const T anchor = s.anchor();
    each([&](T z) { s.add(z, anchor); });
    reduce_each(s, group);
    return s;
  }

  template <bool FULL>
  ANL_DEVICE SecondSums<Scalar<T>, FULL> second_sums(const RowSweep<T, FULL>& sweep, const GroupReduce& group) {
    auto s = none<SecondSums<Scalar<T>, FULL>>();
    sweep.run(s, [&](const auto& add) { each(add); });
    reduce_each(s, group);
    return s;
  }
};

template <class S, int E, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS<S>, 1) rows_small_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  const Call& call = p.call;
  const int lanes = p.plan.small.lanes, groups = int(blockDim.x) / lanes;
  const int64_t rows = p.plan.small.rows_per_cta;
  const bool leader = lane_index() % unsigned(lanes) == 0;
  const double denominator = loss_denominator<T>(p);
  double total = 0.0;
  for (int64_t i = 0; i < rows; i += groups) {
    const int64_t r = blockIdx.x * rows + i + threadIdx.x / lanes;
    const bool exists = r < p.num_rows;
    const int64_t y = exists ? label_at(call, r) : call.ignore_index;
    const Label kind = label_kind(call, y);
    const bool live = kind == Label::LIVE;
    const int64_t offset = exists ? row_offset(call, call.logits_strides, r) : 0;
    const S* logits = static_cast<const S*>(call.logits) + offset;
    RegisterRow<S, E> own;
    own.place(p, logits);
    own.load(logits, live);
    const T z_y = live ? widen(logits[y]) : T(0);
    if (live) own.put(int(y), minus_inf<T>());

    Row<T> row;
    row.set_first_sums(call.program, own.template first_sums<FULL>({lanes}), z_y);
    if (__any_sync(ALL_LANES, row.second)) {
      const auto sums = own.template second_sums<FULL>(row.template sweep<FULL>(call.program), {lanes});
      if (row.second) row.set_second_sums(call.program, sums);
    }
    const bool writes = leader && exists;
    RowGradient<T, FULL> gradient;
    total += double(finish_any_row<T, FULL>(p, r, y, kind, row, denominator, writes, gradient));
    __syncwarp();  // in place, a lane overwrites the target's logit, which others have read
    if (call.grad && exists) {
      by_parts<FULL>(call.program, [&](auto parts) {
        own.each([&](T& z) { z = gradient.template at<decltype(parts)::value>(z); });
      });
      if (live) own.put(int(y), gradient.row.target);
      own.store(static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r));
    }
  }
  if (!p.loss) return;
  ANL_STATIC_SHARED(double[WARP], shared);
  finish_loss<T>(p, blockIdx.x, block_reduce(total, Add<double>(), shared), denominator);
}

template <class S, bool FULL, int E>
cudaError_t launch_elements(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_small_kernel<S, E, FULL>), grid, block, NO_CLUSTER, 0, stream, p);
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  if constexpr (MAX_ELEMENTS<S> > 16) {
    if (p.plan.small.elements == 8) return launch_elements<S, FULL, 8>(p, stream);
    if (p.plan.small.elements == 16) return launch_elements<S, FULL, 16>(p, stream);
  }
  return launch_elements<S, FULL, MAX_ELEMENTS<S>>(p, stream);
}

}  // namespace

// 1024 classes, float64 512, where a CTA has the 64K registers that every GPU gives it.
bool fits_small(const Call& call, const Limits& limits) {
  return call.num_classes <= limits.registers / (call.dtype == FLOAT64 ? 128 : 64);
}

// Lanes and elements: as many lanes per row as one CTA has for a small batch, all of a warp where rows are few, and else
// so many that whole sectors are read, but no more: all of them do a row's mathematics.
Plan plan_small(const Call& call, const Limits& limits) {
  const bool wide = call.dtype == FLOAT64;
  const int64_t N = rows_of(call), K = call.num_classes, most = wide ? MAX_ELEMENTS<double> : MAX_ELEMENTS<float>;
  const int pack = pack_of(call), max_shift = rows_aligned(call) ? 0 : pack - 1;
  SmallPlan small = {};
  small.packs = equally_aligned(call) && K >= 4 * pack && K + max_shift <= WARP * most;
  const int64_t room = small.packs ? K + max_shift : K;
  const auto lanes_for = [&](int64_t elements) { return power_of_two(ceil_div(room, elements)); };
  const int64_t single = std::min(wide ? MAX_THREADS<double> : MAX_THREADS<float>, limits.max_threads);
  const bool one_cta = N * lanes_for(most) <= 2 * single;
  const bool few = N * lanes_for(most) < int64_t(limits.num_sms) * 256;
  const int64_t wanted = one_cta ? single / N : few ? WARP : small.packs ? 4 : 2;
  int64_t elements = most;
  while (elements > most / 4 && lanes_for(elements / 2) <= std::min<int64_t>(WARP, std::max(wanted, lanes_for(elements))))
    elements /= 2;
  small.elements = int(elements);
  small.lanes = int(lanes_for(elements));
  const int threads = one_cta ? threads_for(N * small.lanes, int(single), limits) : threads_for(128, 128, limits);
  const int64_t groups = threads / small.lanes;
  small.rows_per_cta = one_cta ? N : groups * ceil_div(N, groups * LOSS_PARTS);
  Plan plan = plan_of_rows(Kernel::SMALL, call, threads, small.rows_per_cta);
  plan.small = small;
  return plan;
}

cudaError_t launch_small(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
