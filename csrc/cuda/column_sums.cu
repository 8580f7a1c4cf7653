// Sums of p down the rows, for the batch entropy.
//
// Every sum has a fixed order: a thread adds its own rows in order, a CTA its threads', and the last step the CTAs'.
#include "plans.h"
#include "results.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int THREADS = 256;
constexpr int FOLD = 32;          // so many rows are added in float, then on in double
constexpr int CLASSES = 8;        // per thread, where lanes run across rows
constexpr int64_t WANTED = 1024;  // CTAs

ANL_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A row's p_j from its coefficients: 0 in an ignored row, whatever its logits.
template <class T>
struct RowMass {
  T max, inv_sum;
  ANL_DEVICE RowMass(const Params& p, int64_t r) {
    const T* coefs = static_cast<const T*>(p.call.grad_coefs) + r;
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
  const ColumnSumsPlan& plan = p.plan.column_sums;
  const int64_t K = p.call.num_classes, tiles = ceil_div(K, plan.classes_per_tile), chunk = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x % tiles * plan.classes_per_tile;
  const int64_t first = tile + (plan.packs ? int64_t(threadIdx.x) * P : threadIdx.x);
  const int64_t step = plan.packs ? 1 : blockDim.x;
  const bool whole = plan.packs && first + P <= K;
  const int64_t stop = smaller(p.num_rows, (chunk + 1) * plan.rows_per_chunk);
  const Strides& strides = p.call.logits_strides;
  int64_t o = chunk * plan.rows_per_chunk / p.call.inner, i = chunk * plan.rows_per_chunk % p.call.inner;
  double total[P] = {};
  for (int64_t r0 = chunk * plan.rows_per_chunk; r0 < stop; r0 += FOLD) {
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
  const ColumnSumsPlan& plan = p.plan.column_sums;
  const int64_t K = p.call.num_classes, tiles = ceil_div(K, plan.classes_per_tile), chunk = blockIdx.x / tiles;
  const int64_t k0 = blockIdx.x % tiles * plan.classes_per_tile, sk = p.call.logits_strides.sk;
  const int64_t stop = smaller(p.num_rows, (chunk + 1) * plan.rows_per_chunk);
  double total[CLASSES] = {};
  for (int64_t r0 = chunk * plan.rows_per_chunk; r0 < stop; r0 += FOLD * blockDim.x) {
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
  const int64_t chunks = ceil_div(p.num_rows, p.plan.column_sums.rows_per_chunk);
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * K + k];
  p.call.sums[k] = sum;
}

template <class S>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  const cudaError_t error = p.plan.column_sums.across_classes
                                ? ANL_LAUNCH((column_sums_kernel<S>), grid, block, NO_CLUSTER, 0, stream, p)
                                : ANL_LAUNCH((pixel_sums_kernel<S>), grid, block, NO_CLUSTER, 0, stream, p);
  if (error != cudaSuccess || !p.plan.scratch_bytes) return error;
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.call.num_classes, p.plan.threads));
  return ANL_LAUNCH(chunk_sums_kernel, dim3(blocks), block, NO_CLUSTER, 0, stream, p);
}

}  // namespace

Plan plan_column_sums(const Call& call, const Limits& limits) {
  const int64_t N = rows_of(call), K = call.num_classes;
  Plan plan = {};
  plan.kernel = Kernel::COLUMN_SUMS;
  plan.cluster = 1;
  plan.threads = std::min(limits.max_threads, THREADS);
  ColumnSumsPlan sums = {};
  sums.across_classes = call.logits_strides.sk == 1 && K >= 2 * WARP;
  sums.packs = sums.across_classes && rows_aligned(call);
  sums.classes_per_tile = sums.across_classes ? plan.threads * pack_of(call) : CLASSES;
  const int64_t tiles = ceil_div(K, sums.classes_per_tile), fewest = FOLD * (sums.across_classes ? 1 : plan.threads);
  sums.rows_per_chunk = ceil_div(N, std::min(ceil_div(WANTED, tiles), ceil_div(N, fewest)));
  const int64_t chunks = ceil_div(N, sums.rows_per_chunk);
  plan.blocks = tiles * chunks;
  plan.scratch_bytes = chunks > 1 ? chunks * K * int64_t(sizeof(double)) : 0;
  plan.column_sums = sums;
  return plan;
}

cudaError_t launch_column_sums(const Params& p, cudaStream_t stream) {
  return by_storage<half_t, bfloat16_t>(
      p.call.dtype, [&](auto s) { return launch_variant<typename decltype(s)::type>(p, stream); });
}

}  // namespace gpu
}  // namespace anl
