// A row in one CTA's shared memory: read once, swept there, its gradient written once.
//
// Several CTAs share a multiprocessor, so that one computes while another loads.
#include "chip_rows.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

// Of logits of `size` bytes. Two CTAs fit a multiprocessor, of float64 one.
constexpr int max_threads(bool full, int size) { return full && size == 2 ? 192 : 256; }
constexpr int max_registers(bool full, int size) { return size == 8 ? 256 : full && size == 2 ? 168 : 128; }
constexpr int MAX_WARPS = 256 / WARP;
constexpr int PACKS_PER_THREAD = 24;        // at most, and half as many at least: what every warp does per row, few do
constexpr int64_t MOST_CTAS = 32;           // that a multiprocessor holds
constexpr int64_t STATIC_SHARED = 2 << 10;  // what the kernel has besides the row

template <class S>
struct BlockChip {
  uint4* const packs;

  ANL_DEVICE void load(const GlobalRowPart<S>& part) const {
    for (int i = threadIdx.x; i < part.packs; i += blockDim.x) copy_async16(packs + i, part.logits + int64_t(i) * PACK<S>);
    copy_async_commit();
  }
  ANL_DEVICE PlainWalk<SharedPacks<S>> walk(const GlobalRowPart<S>& part, Pass) const {
    return {{SharedPlace(packs)}, part.packs};
  }
  template <class Wide, class Sums>
  ANL_DEVICE Wide merge_first(const Sums& own, Sums* by_warp) const {
    return block_merge<Wide>(own, by_warp);
  }
  template <class Wide, class Sums>
  ANL_DEVICE Wide merge_second(const Sums& own, Sums* by_warp) const {
    return block_merge<Wide>(own, by_warp);
  }
};

template <class S, bool FULL>
__global__ void __launch_bounds__(max_threads(FULL, sizeof(S)), sizeof(S) == 8 ? 1 : 2)
    rows_block_kernel(const __grid_constant__ Params p) {
  using T = acc_t<S>;
  using Memory = RowMemory<S, FULL, MAX_WARPS>;
  ANL_SHARED(uint4, packs);
  ANL_STATIC_SHARED(Memory, shared);
  const Call& call = p.call;
  shared.start(loss_denominator<T>(p));
  BlockChip<S> chip = {packs};
  for (int64_t r = blockIdx.x; r < p.num_rows; r += gridDim.x) {
    const int64_t y = label_at(call, r);
    const Label kind = label_kind(call, y);
    const S* logits = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r);
    S* grad = call.grad ? static_cast<S*>(call.grad) + row_offset(call, call.grad_strides, r) : nullptr;
    const GlobalRowPart<S> part({logits, grad, int(call.num_classes), y, 0, INT32_MAX}, int(call.num_classes), true);
    if (kind == Label::LIVE) {
      __syncthreads();  // the row before has been swept
      chip.load(part);
      copy_async_wait<0>();
      __syncthreads();
      const ChipRow live = {r, y, p.plan.block.packs, true};
      run_chip_row<S, FULL>(p, live, part, chip, shared);
    } else {
      if (threadIdx.x == 0) shared.loss += double(write_unread_row<T>(p, r, kind));
      if (grad) part.fill(unread_value<T>(kind), p.plan.block.packs);
    }
  }
  __syncthreads();  // thread 0 has brought its last row
  finish_loss<T>(p, blockIdx.x, shared.loss, shared.denominator);
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
  return ANL_LAUNCH((rows_block_kernel<S, FULL>), grid, block, NO_CLUSTER, p.plan.shared_bytes, stream, p);
}

// How many CTAs with a row each a multiprocessor has shared memory for.
int64_t ctas_for(const Call& call, const Limits& limits) {
  return (limits.shared_bytes + RESERVED_SHARED) / (row_bytes(call) + STATIC_SHARED + RESERVED_SHARED);
}

}  // namespace

bool fits_block(const Call& call, const Limits& limits, int ctas) { return ctas_for(call, limits) >= ctas; }

// No more CTAs than run at a time: each takes every so many rows.
Plan plan_block(const Call& call, const Limits& limits) {
  Plan plan = {};
  plan.kernel = Kernel::BLOCK;
  const bool full = takes_full(call);
  const int size = int(logit_bytes(call));
  plan.threads = threads_for(row_bytes(call) / PACK_BYTES / PACKS_PER_THREAD, max_threads(full, size), limits);
  plan.cluster = 1;
  plan.shared_bytes = row_bytes(call);
  const int64_t registers = plan.threads * max_registers(full, size);
  const int64_t ctas = std::min({ctas_for(call, limits), MOST_CTAS, limits.registers / registers});
  plan.blocks = plan.loss_parts = std::min(rows_of(call), limits.num_sms * std::max<int64_t>(1, ctas));
  plan.block = {equally_aligned(call)};
  return plan;
}

cudaError_t launch_block(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
