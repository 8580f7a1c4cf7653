// Sums down the rows: of p (the batch entropy), of the rows' weights (the mean's denominator); and grad times a number.
//
// Every sum has a fixed order: a thread adds its own numbers in order, a CTA its threads', and the last step the CTAs'.
#include <algorithm>

#include "row_common.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int THREADS = 256;
constexpr int FOLD = 32;          // so many rows are added in float, then on in double
constexpr int CLASSES = 8;        // of a thread that goes through rows with several classes
constexpr int64_t WANTED = 1024;  // CTAs

ANL_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- before a kernel: tickets and the parts of the denominator ------------------------------------------------------

template <class T>
__global__ void prepare_kernel(const __grid_constant__ Params p) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.num_tickets;
       i += int64_t(gridDim.x) * blockDim.x)
    p.tickets[i] = 0;
  if (!p.weight_parts) return;
  ANL_STATIC_SHARED(double[WARP], shared);
  const int64_t rows = ceil_div(p.num_rows, WEIGHT_PARTS), stop = smaller(p.num_rows, (blockIdx.x + 1) * rows);
  double sum = 0.0;
  for (int64_t r = blockIdx.x * rows + threadIdx.x; r < stop; r += blockDim.x) {
    const int64_t y = label_at(p.call, r);
    sum += double(row_weight<T>(p.call, y, label_kind(p.call, y)));
  }
  sum = block_reduce(sum, Add<double>(), shared);
  if (threadIdx.x == 0) p.weight_parts[blockIdx.x] = sum;
}

// ---- after a kernel that takes no tickets -----------------------------------------------------------------------------

template <class T>
__global__ void finish_kernel(const __grid_constant__ Params p) {
  add_loss_parts<T>(p, loss_denominator<T>(p));
}

// ---- column sums ------------------------------------------------------------------------------------------------------

// p_ij / exp(z_ij), as it were: of an ignored row nothing, whatever its logits.
template <class T>
struct RowMass {
  T max, inv_sum;
  ANL_DEVICE RowMass(const Params& p, int64_t r) {
    const T* coefs = static_cast<const T*>(p.call.coefs) + r;
    max = coefs[COEF_MAX * p.num_rows];
    inv_sum = coefs[COEF_INV_SUM * p.num_rows];
  }
  ANL_DEVICE T at(T x) const { return inv_sum == T(0) ? T(0) : exp_approx(x - max) * inv_sum; }
};

// Where the sums of a chunk of rows go: the result itself if there is only one.
ANL_DEVICE double* chunk_sums(const Params& p, int64_t chunk) {
  return p.plan.scratch_bytes ? reinterpret_cast<double*>(p.scratch) + chunk * p.call.num_classes : p.call.sums;
}

// Lanes across classes that lie side by side: a thread has a pack of them (or, where rows are not aligned, as many a
// CTA's width apart) and goes down a chunk of rows.
template <class S>
__global__ void __launch_bounds__(THREADS) column_sums_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  constexpr int P = PACK<S>;
  const int64_t K = p.call.num_classes, tiles = ceil_div(K, p.plan.tile), chunk = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x % tiles * p.plan.tile;
  const int64_t first = tile + (p.plan.packs ? int64_t(threadIdx.x) * P : threadIdx.x);
  const int64_t step = p.plan.packs ? 1 : blockDim.x;
  const bool whole = p.plan.packs && first + P <= K;
  const int64_t stop = smaller(p.num_rows, (chunk + 1) * p.plan.rows);
  const Strides& strides = p.call.logits_strides;
  int64_t o = chunk * p.plan.rows / p.call.inner, i = chunk * p.plan.rows % p.call.inner;
  double total[P] = {};
  for (int64_t r0 = chunk * p.plan.rows; r0 < stop; r0 += FOLD) {
    const int64_t r1 = smaller(stop, r0 + FOLD);
    T part[P] = {};
#pragma unroll 4
    for (int64_t r = r0; r < r1; ++r) {
      const RowMass<T> row(p, r);
      const S* z = static_cast<const S*>(p.call.logits) + o * strides.so + i * strides.si;
      if (++i == p.call.inner) i = 0, ++o;
      T x[P];
      if (whole) {
        widen_pack<S>(load16<Cache::STREAM>(z + first), x);
      } else {
#pragma unroll
        for (int v = 0; v < P; ++v) x[v] = first + v * step < K ? widen(z[first + v * step]) : T(0);
      }
#pragma unroll
      for (int v = 0; v < P; ++v) part[v] += row.at(x[v]);
    }
#pragma unroll
    for (int v = 0; v < P; ++v) total[v] += double(part[v]);
  }
  double* sums = chunk_sums(p, chunk);
#pragma unroll
  for (int v = 0; v < P; ++v)
    if (first + v * step < K) sums[first + v * step] = total[v];
}

// Lanes across rows: for any strides, and few classes.
template <class S>
__global__ void __launch_bounds__(THREADS) pixel_sums_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  ANL_STATIC_SHARED(double[WARP], shared);
  const int64_t K = p.call.num_classes, tiles = ceil_div(K, p.plan.tile), chunk = blockIdx.x / tiles;
  const int64_t k0 = blockIdx.x % tiles * p.plan.tile, sk = p.call.logits_strides.sk;
  const int64_t stop = smaller(p.num_rows, (chunk + 1) * p.plan.rows);
  double total[CLASSES] = {};
  for (int64_t r0 = chunk * p.plan.rows; r0 < stop; r0 += FOLD * blockDim.x) {
    const int64_t r1 = smaller(stop, r0 + FOLD * blockDim.x);
    T part[CLASSES] = {};
    for (int64_t r = r0 + threadIdx.x; r < r1; r += blockDim.x) {
      const RowMass<T> row(p, r);
      const S* z = static_cast<const S*>(p.call.logits) + row_offset(p.call, p.call.logits_strides, r) + k0 * sk;
#pragma unroll
      for (int c = 0; c < CLASSES; ++c)
        if (k0 + c < K) part[c] += row.at(widen(z[c * sk]));
    }
#pragma unroll
    for (int c = 0; c < CLASSES; ++c) total[c] += double(part[c]);
  }
  double* sums = chunk_sums(p, chunk);
#pragma unroll
  for (int c = 0; c < CLASSES; ++c) {
    const double sum = block_reduce(total[c], Add<double>(), shared);
    __syncthreads();
    if (threadIdx.x == 0 && k0 + c < K) sums[k0 + c] = sum;
  }
}

__global__ void __launch_bounds__(THREADS) chunk_sums_kernel(const __grid_constant__ Params p) {
  const int64_t K = p.call.num_classes, k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= K) return;
  const double* parts = reinterpret_cast<const double*>(p.scratch);
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < ceil_div(p.num_rows, p.plan.rows); ++chunk) sum += parts[chunk * K + k];
  p.call.sums[k] = sum;
}

template <class S>
cudaError_t launch_column_sums(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  const cudaError_t error = p.plan.lanes == 1
                                ? ANL_LAUNCH((pixel_sums_kernel<S>), grid, block, NO_CLUSTER, 0, stream, p)
                                : ANL_LAUNCH((column_sums_kernel<S>), grid, block, NO_CLUSTER, 0, stream, p);
  if (error != cudaSuccess || !p.plan.scratch_bytes) return error;
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.call.num_classes, p.plan.threads));
  return ANL_LAUNCH(chunk_sums_kernel, dim3(blocks), block, NO_CLUSTER, 0, stream, p);
}

bool rows_aligned(const Call& call) {
  const int64_t size = size_of(call.dtype);
  const uintptr_t bytes = reinterpret_cast<uintptr_t>(call.logits) | uintptr_t(call.logits_strides.so * size) |
                          uintptr_t(call.logits_strides.si * size);
  return bytes % 16 == 0;
}

// ---- grad times a number ------------------------------------------------------------------------------------------------

// Runs of side-by-side elements, a CTA's share of one at a time.
template <class S>
__global__ void __launch_bounds__(THREADS) scale_runs_kernel(const __grid_constant__ Scaling s) {
  using T = acc_t<S>;
  constexpr int P = PACK<S>;
  const T factor = *static_cast<const T*>(s.factor);
  if (factor == T(1)) return;
  const int64_t share = int64_t(blockDim.x) * P, n = s.size[2];
  const int64_t shares = ceil_div(n + P - 1, share), total = s.size[0] * s.size[1] * shares;
  for (int64_t i = blockIdx.x; i < total; i += gridDim.x) {
    const int64_t run = i / shares;
    S* g = static_cast<S*>(s.grad) + run / s.size[1] * s.strides[0] + run % s.size[1] * s.strides[1];
    const int64_t shift = int64_t(reinterpret_cast<uintptr_t>(g) / sizeof(S) % P);
    const int64_t k = i % shares * share + int64_t(threadIdx.x) * P - shift;
    if (k >= 0 && k + P <= n) {
      T x[P];
      widen_pack<S>(load16<Cache::STREAM>(g + k), x);
#pragma unroll
      for (T& v : x) v *= factor;
      store16<Cache::STREAM>(g + k, narrow_pack<S>(x));
    } else {
      for (int64_t j = k < 0 ? 0 : k; j < smaller(n, k + P); ++j) g[j] = narrow<S>(widen(g[j]) * factor);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(THREADS) scale_elements_kernel(const __grid_constant__ Scaling s) {
  using T = acc_t<S>;
  const T factor = *static_cast<const T*>(s.factor);
  if (factor == T(1)) return;
  const int64_t total = s.size[0] * s.size[1] * s.size[2];
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t run = i / s.size[2];
    S* g = static_cast<S*>(s.grad) + run / s.size[1] * s.strides[0] + run % s.size[1] * s.strides[1] +
           i % s.size[2] * s.strides[2];
    *g = narrow<S>(widen(*g) * factor);
  }
}

// The smallest stride last, and dimensions that are one run of memory as one.
Scaling in_order(const Scaling& given) {
  int order[3] = {0, 1, 2};
  std::sort(order, order + 3, [&](int a, int b) { return given.strides[a] < given.strides[b]; });
  Scaling s = given;
  for (int i = 0; i < 3; ++i) s.size[i] = s.strides[i] = 1;
  int at = 3;
  for (int i : order) {
    const int64_t size = given.size[i], stride = given.strides[i];
    if (size == 1) continue;
    if (at < 3 && stride == s.strides[at] * s.size[at]) {
      s.size[at] *= size;
    } else {
      s.size[--at] = size;
      s.strides[at] = stride;
    }
  }
  return s;
}

template <class S>
cudaError_t launch_scaling(const Scaling& s, const Limits& limits, cudaStream_t stream) {
  const int threads = limits.max_threads < THREADS ? limits.max_threads : THREADS;
  const int64_t total = s.size[0] * s.size[1] * s.size[2], share = int64_t(threads) * PACK<S>;
  const int64_t wanted = ceil_div(total, share), most = 8 * int64_t(limits.num_sms);
  const dim3 grid(unsigned(wanted < most ? wanted : most)), block(threads);
  if (s.strides[2] == 1 && 2 * s.size[2] > share)
    return ANL_LAUNCH((scale_runs_kernel<S>), grid, block, NO_CLUSTER, 0, stream, s);
  return ANL_LAUNCH((scale_elements_kernel<S>), grid, block, NO_CLUSTER, 0, stream, s);
}

}  // namespace

cudaError_t launch_prepare(const Params& p, cudaStream_t stream) {
  if (!p.num_tickets && !p.weight_parts) return cudaSuccess;
  const dim3 grid(p.weight_parts ? WEIGHT_PARTS : 1), block(p.plan.threads < THREADS ? p.plan.threads : THREADS);
  if (p.call.dtype == FLOAT64) return ANL_LAUNCH((prepare_kernel<double>), grid, block, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((prepare_kernel<float>), grid, block, NO_CLUSTER, 0, stream, p);
}

// With as many threads as the kernel itself has: the sum's order is that of its last CTA.
cudaError_t launch_finish(const Params& p, cudaStream_t stream) {
  if (p.call.dtype == FLOAT64) return ANL_LAUNCH((finish_kernel<double>), 1, p.plan.threads, NO_CLUSTER, 0, stream, p);
  return ANL_LAUNCH((finish_kernel<float>), 1, p.plan.threads, NO_CLUSTER, 0, stream, p);
}

Plan plan_columns(const Call& call, const Limits& limits) {
  const int64_t N = call.outer * call.inner, K = call.num_classes;
  Plan plan = {};
  plan.kernel = Kernel::COLUMNS;
  plan.cluster = 1;
  plan.threads = limits.max_threads < THREADS ? limits.max_threads : THREADS;
  plan.lanes = call.logits_strides.sk == 1 && K >= 2 * WARP ? WARP : 1;
  plan.packs = plan.lanes > 1 && rows_aligned(call);
  plan.tile = plan.lanes > 1 ? plan.threads * (16 / size_of(call.dtype)) : CLASSES;
  const int64_t tiles = ceil_div(K, plan.tile), least = FOLD * (plan.lanes > 1 ? 1 : plan.threads);
  int64_t chunks = ceil_div(WANTED, tiles);
  if (chunks > ceil_div(N, least)) chunks = ceil_div(N, least);
  plan.rows = ceil_div(N, chunks);
  chunks = ceil_div(N, plan.rows);
  plan.blocks = tiles * chunks;
  plan.scratch_bytes = chunks > 1 ? chunks * K * int64_t(sizeof(double)) : 0;
  return plan;
}

cudaError_t launch_columns(const Params& p, cudaStream_t stream) {
  return by_storage<half_t, bfloat16_t>(
      p.call.dtype, [&](auto s) { return launch_column_sums<typename decltype(s)::type>(p, stream); });
}

cudaError_t launch_scale(const Scaling& scaling, const Limits& limits, cudaStream_t stream) {
  const Scaling s = in_order(scaling);
  return by_storage<half_t, bfloat16_t>(
      s.dtype, [&](auto x) { return launch_scaling<typename decltype(x)::type>(s, limits, stream); });
}

}  // namespace gpu
}  // namespace anl
