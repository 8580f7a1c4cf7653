// What module.cpp asks of the CUDA kernels: how a call is to run (Plan), its arguments (Params), one entry per family.
#pragma once

#include "call.h"

#if !defined(ANL_CUDA_ON_HOST)
#include <cuda_runtime_api.h>
#endif

namespace anl {
namespace gpu {

// What the CTAs of one launch may do to one another: anl_kernels/trust.py says where each is verified. Without it the same
// phases are launches of their own.
enum Protocol : unsigned {
  TICKETS = 1,    // the last CTA to finish adds up the loss; a kernel starts while its mean's denominator is made
  SPLIT_ROWS = 2, // CTAs that share a row wait for one another
  CLUSTERS = 4,   // clusters, distributed shared memory and bulk copies
  ALL_PROTOCOLS = 7,
};

// What a device allows, read once per device, and the protocols that a call may use. The plan of a call depends on nothing
// else but its shapes and strides.
struct Limits {
  int arch;            // 90: compute capability 9.0
  int num_sms;
  int max_threads;     // per CTA
  int shared_bytes;    // per CTA, if asked for
  int registers;       // per CTA
  int64_t l2_bytes;
  int max_cluster;     // 1: no clusters
  unsigned protocols;  // bits of Protocol
  bool early_starts;   // a launch may start before the one ahead of it has ended
};

enum class Kernel : int { SMALL, BLOCK, CLUSTER, SPLIT, GRADIENT, SPATIAL, COLUMN_SUMS };

// What each kernel has to know besides the fields of Plan. packs: every row's gradient is aligned as its logits are, so that
// 16 bytes go in and the same 16 come out.
struct SmallPlan {
  int lane_bits;         // 2^lane_bits lanes share a row, a warp at most; a CTA's threads over that are its rows at a time
  int rounds;            // so many times as many rows are a batch, which comes and goes as one: 1 where lanes share a row
  int unit_bytes;        // of a row, that a lane reads at a time
  int pitch;             // elements between two rows of a batch in shared memory
  bool contiguous;       // logits: so are a batch's rows there, without gaps
  bool contiguous_grad;  // likewise, and aligned as the logits are
  int64_t rows_per_cta;
};
struct BlockPlan {
  bool packs;
};
struct ClusterPlan {
  int64_t packs_per_cta;  // the part of a row that each CTA of a cluster holds
  int chunk_packs;        // packs per bulk copy
  int slots;              // chunks that a warp's ring holds
  bool held;              // besides, every warp has one in its threads' registers
  bool packs;
};
struct SplitPlan {
  int64_t packs_per_part;  // the part of a row that a CTA takes at a time
  int64_t parts_per_row;
  int64_t rows_per_group;  // rows whose logits L2 holds
  bool separate_launches;  // one per phase and per merge, where CTAs may not wait for one another
  bool packs;
};
struct GradientPlan {
  int lanes;             // that take a row's part at a time: a power of two, a warp at most
  int rows_at_once;      // in a warp
  int rows_per_warp;
  int classes_per_part;  // of a row that a warp takes: whole packs
  int parts_per_row;
  bool packs;
};
struct SpatialPlan {
  int pixels;            // rows that a CTA takes at a time: the threads of a column share their classes
  int word;              // of them that a thread takes: 2, or 1
  bool aligned;          // whether the logits of two neighbouring pixels are always one aligned word
  int column_bits;       // 2^column_bits threads have pixels of their own, the next so many share their classes
  int words_per_lane;    // classes that a thread takes at most
  int64_t rows_per_cta;  // a multiple of that
  int64_t staged_bytes;  // shared memory for the logits of those pixels; 0: every sweep reads them again
};
struct ColumnSumsPlan {
  bool across_classes;       // neighbouring lanes have neighbouring classes, else neighbouring rows
  int64_t classes_per_tile;  // a CTA adds up so many classes
  int64_t rows_per_chunk;    // over so many rows
  bool packs;                // a thread's classes are 16 aligned bytes
};

struct Plan {
  Kernel kernel;
  int64_t blocks;         // CTAs of the grid
  int threads;            // per CTA
  int cluster;            // CTAs that share a row's shared memory; 1: each has its own rows
  int64_t shared_bytes;   // dynamic
  int64_t loss_parts;     // how many partial sums of losses finish_loss gets; 1: it is the loss
  int64_t num_tickets;    // counters of the kernel's own, which it zeroes itself
  int64_t scratch_bytes;  // more memory, uninitialised
  union {                 // by kernel
    SmallPlan small;
    BlockPlan block;
    ClusterPlan ring;
    SplitPlan split;
    GradientPlan gradient;
    SpatialPlan spatial;
    ColumnSumsPlan column_sums;
  };
};

// The plans of a call: the first is to be taken, and each that follows where the device refuses the one before.
struct Plans {
  static constexpr int MOST = 4;
  Plan plan[MOST];
  int count = 0;
  void add(const Plan& next) { plan[count++] = next; }
  bool has(Kernel kernel) const {
    for (int i = 0; i < count; ++i)
      if (plan[i].kernel == kernel) return true;
    return false;
  }
};

constexpr int WEIGHT_PARTS = 128;
constexpr int COUNT_BITS = 16;  // of a word that counts, below the call's mark (tickets.cuh)
constexpr int64_t MOST_COUNTED = (1 << COUNT_BITS) - 1;

// By value to every kernel.
struct Params {
  Call call;
  Plan plan;
  int64_t num_rows;
  Reduction reduction;   // LOSS
  void* loss;            // MEAN, SUM: one number of the arithmetic type; else null
  double* loss_parts;    // (plan.loss_parts,)
  double* weight_parts;  // MEAN: (WEIGHT_PARTS,), whose sum is the denominator; null: the only CTA adds it up
  bool starts_early;     // while launch_prepare fills them
  uint64_t mark;         // the call's own (tickets.cuh)
  uint64_t* loss_ticket; // null: launch_finish adds up the loss, where it has several parts
  uint64_t* claim;       // of the tickets
  unsigned* tickets;     // (plan.num_tickets,)
  char* scratch;         // (plan.scratch_bytes,), 256-byte aligned
  double ignored[NUM_STATS];  // STATS: what is written of an ignored row
};

inline bool starts_early(const Params& p) { return p.starts_early; }

// Plans, one per kernel, each beside its kernel; `select` chooses among them.
Plans select(const Call& call, const Limits& limits);
Plan plan_small(const Call& call, const Limits& limits);
Plan plan_block(const Call& call, const Limits& limits);
Plan plan_cluster(const Call& call, const Limits& limits);
Plan plan_split(const Call& call, const Limits& limits);
Plan plan_gradient(const Call& call, const Limits& limits);
Plan plan_spatial(const Call& call, const Limits& limits);
Plan plan_column_sums(const Call& call, const Limits& limits);

bool fits_small(const Call& call, const Limits& limits);
// Whether a multiprocessor holds rows_block's memory for so many CTAs.
bool fits_block(const Call& call, const Limits& limits, int ctas = 1);
bool fits_cluster(const Call& call, const Limits& limits);

// The widest cluster of rows_cluster's that the current device, which has these limits, can hold; 1: none.
cudaError_t widest_rows_cluster(const Limits& limits, int& cluster);

// Whether the kernels' machine code on the current device can start early, and the driver as well.
cudaError_t can_start_early(bool& can);

// Fills weight_parts.
cudaError_t launch_prepare(const Params& p, const Limits& limits, cudaStream_t stream);
// Adds up the parts of the loss.
cudaError_t launch_finish(const Params& p, cudaStream_t stream);
cudaError_t launch_small(const Params& p, cudaStream_t stream);
cudaError_t launch_block(const Params& p, cudaStream_t stream);
cudaError_t launch_cluster(Params& p, cudaStream_t stream);  // lowers plan.loss_parts to the clusters that run at a time
cudaError_t launch_split(const Params& p, cudaStream_t stream);
cudaError_t launch_gradient(const Params& p, cudaStream_t stream);
cudaError_t launch_spatial(const Params& p, cudaStream_t stream);
cudaError_t launch_column_sums(const Params& p, cudaStream_t stream);

// grad (any strides) times the factor, unless that is 1.
struct Scaling {
  void* grad;
  DType dtype;
  int64_t size[3];
  int64_t strides[3];
  const void* factor;  // of the arithmetic type
};
cudaError_t launch_scale(const Scaling& s, const Limits& limits, cudaStream_t stream);

}  // namespace gpu
}  // namespace anl
