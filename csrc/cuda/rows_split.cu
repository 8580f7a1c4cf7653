// Rows of any length, on any architecture: every row is cut into parts, each of which a CTA takes.
//
// A row passes through up to three phases: first sweep, second sweep, gradient. In one launch, CTAs take parts by tickets.
// These go through groups of rows whose logits the L2 cache holds, phase after phase, a group ahead of the other, in an
// order in which nothing waits for a larger ticket than its own. Whoever brings the last part of a phase merges all of
// them, in order, and does the row's mathematics. Where CTAs may not wait for one another (separate_launches), every phase
// and every merge is a launch of its own: the same functions, the same bits.
#include "long_rows.cuh"
#include "plans.h"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 192;
constexpr int CTAS = 2;        // per multiprocessor
constexpr int FEW = 4, MANY = 24;  // packs per thread in a part: fewer than FEW where rows are few and short
constexpr int64_t STATIC_SHARED = 2 << 10;  // what the kernel has besides a part

enum Phase : int { FIRST, SECOND, GRADIENT, NO_PHASE };

ANL_HD int num_phases(const Call& call) { return 1 + needs_second(call.program) + (call.grad != nullptr); }

// What a launch does: everything, by tickets; or one phase of all rows; or the merge after that phase.
enum class Step : int { ALL, PHASE, MERGE };

struct Item {
  Phase phase;
  int part;
  int64_t row;
};

// Item of ticket t. Step s of the order is phase f of group s - f for every f there is.
ANL_DEVICE Item item_of(const Params& p, unsigned t) {
  const int64_t rows = p.plan.split.rows_per_group, parts = p.plan.split.parts_per_row;
  const int64_t block = rows * parts, groups = ceil_div(p.num_rows, rows);
  const int phases = num_phases(p.call);
  int64_t b = t / block, step = 0;
  const auto begin = [&](int64_t s) { return s < groups ? int64_t(0) : s - groups + 1; };
  const auto blocks = [&](int64_t s) { return (s < phases ? s + 1 : phases) - begin(s); };
  const int64_t full = groups > phases ? groups - phases : 0;  // steps, from phases - 1 on, besides those counted one by one
  while (step < groups + phases - 1 && b >= blocks(step)) {
    b -= blocks(step++);
    if (step == phases - 1 && full > 0) {
      const int64_t skipped = b / phases < full ? b / phases : full;
      step += skipped;
      b -= skipped * phases;
    }
  }
  if (step == groups + phases - 1) return {NO_PHASE, 0, 0};
  const int f = int(begin(step) + b);
  const int64_t i = t % block;
  const Phase phase = f == 0 ? FIRST : f == 1 && needs_second(p.call.program) ? SECOND : GRADIENT;
  return {phase, int(i % parts), (step - f) * rows + i / parts};
}

// What a row's later phases know of its first.
template <class T, bool FULL>
struct RowState {
  RowSweep<T, FULL> sweep;
  RowGradient<T, FULL> gradient;
  bool all_exist, sweeps_again;
};

// What p.scratch holds.
template <class T, bool FULL>
struct Scratch {
  using First = AnchoredSums<double, FULL>;
  using Second = SecondSums<Scalar<double>, FULL>;

  First* first;    // (rows, parts)
  Second* second;  // likewise
  RowState<T, FULL>* rows;

  static int64_t bytes(int64_t num_rows, int64_t parts) {
    return num_rows * (parts * int64_t(sizeof(First) + sizeof(Second)) + int64_t(sizeof(RowState<T, FULL>)));
  }
  ANL_DEVICE explicit Scratch(const Params& p) {
    const int64_t n = p.num_rows * p.plan.split.parts_per_row;
    first = reinterpret_cast<First*>(p.scratch);
    second = reinterpret_cast<Second*>(first + n);
    rows = reinterpret_cast<RowState<T, FULL>*>(second + n);
  }
};

template <class T, bool FULL>
struct Shared {
  Item item;
  int64_t dealt;  // thread 0's
  unsigned state;
  bool last, finished;
  double loss;
  union {  // by warp: of a part
    AnchoredSums<T, FULL> first[MAX_THREADS / WARP];
    SecondSums<Scalar<T>, FULL> second[MAX_THREADS / WARP];
  };
};

// A walk over packs in global memory (PlainWalk says what such has). A thread asks for all of its packs at once, so that some
// are on their way while it sweeps others. staged: room for `count` packs in shared memory.
template <class S, Cache C>
struct StagedWalk : PlainWalk<GlobalPacks<S>> {
  uint4* const staged;

  template <int U, class F>
  ANL_DEVICE void tiles(const F& f) const {
    constexpr int GROUPS = U > 1 ? MANY / U : 0;  // of copies: each has a whole tile or is empty, and what is left is the last
    int groups = GROUPS;
    const PlainWalk<SharedPacks<S>> walk = {{SharedPlace(staged)}, this->count};
    walk.template tiles<U>([&](auto n, int i, bool inside, const auto&) {
      constexpr int N = decltype(n)::value;
      if (!inside) return;
#pragma unroll
      for (int u = 0; u < N; ++u)
        copy_async16<C>(staged + i + u * WARP, this->packs.data + int64_t(i + u * WARP) * PACK<S>);
      if (U == 1 || N < U) return;
      copy_async_commit();
      --groups;
    });
    for (; groups >= 0; --groups) copy_async_commit();
    walk.template tiles<U>([&](auto n, int i, bool inside, const auto& packs) {
      const bool is_group = U > 1 && decltype(n)::value == U;
      is_group ? copy_async_wait<GROUPS>() : copy_async_wait<0>();
      f(n, i, inside, packs);
      if (is_group) copy_async_commit();  // one more, so that as many follow the next
    });
    copy_async_wait<0>();
  }
};

template <class S, bool FULL>
struct SplitRows {
  using T = acc_t<S>;
  using Part = GlobalRowPart<S>;
  const Params& p;
  Shared<T, FULL>& shared;
  uint4* const staged;
  const Scratch<T, FULL> scratch;
  const double denominator;

  ANL_DEVICE unsigned* next_item() const { return p.tickets; }
  ANL_DEVICE unsigned* left() const { return p.tickets + 1 + 2 * p.num_rows; }  // CTAs that need no ticket any more
  ANL_DEVICE unsigned* arrived(int64_t r) const { return p.tickets + 1 + r; }             // parts of both sweeps
  ANL_DEVICE unsigned* state(int64_t r) const { return p.tickets + 1 + p.num_rows + r; }  // the last phase that may begin

  ANL_DEVICE const S* logits(int64_t r) const {
    return static_cast<const S*>(p.call.logits) + row_offset(p.call, p.call.logits_strides, r);
  }
  ANL_DEVICE Part part_of(const Item& item, int64_t y) const {
    S* grad = p.call.grad ? static_cast<S*>(p.call.grad) + row_offset(p.call, p.call.grad_strides, item.row) : nullptr;
    const int64_t packs = p.plan.split.packs_per_part;
    const int first = int(item.part * packs), classes = p.call.num_classes;
    return Part({logits(item.row), grad, classes, y, first, int(packs)}, classes, item.part == 0);
  }

  // Where row r's parts put their sums.
  ANL_DEVICE int64_t first_part(int64_t r) const { return r * p.plan.split.parts_per_row; }

  // A warp: the sums over all parts, in every lane.
  template <class Sums>
  ANL_DEVICE Sums merged(const Sums* parts) const {
    Sums s = none<Sums>();
    for (int i = int(lane_index()); i < int(p.plan.split.parts_per_row); i += WARP) s = Merge()(s, parts[i]);
    return merge_lanes<Sums>(s);
  }

  // Thread 0 has written a part of row r: whether it was the last of its phase.
  ANL_DEVICE bool bring_part(int64_t r, Phase phase) const {
    if (threadIdx.x == 0) {
      const unsigned parts = unsigned(p.plan.split.parts_per_row), all = phase == FIRST ? parts : 2 * parts;
      shared.last = add_acq_rel(arrived(r), 1) == all - 1;
    }
    __syncthreads();
    return shared.last;
  }

  // Thread 0: tells who waits for row r which phase may begin; it counts up from 0.
  ANL_DEVICE void announce(int64_t r, Phase finished, Phase next) const {
    if (!p.plan.split.separate_launches) add_release(state(r), unsigned(next) - unsigned(finished));
  }

  // All parts of a sweep are there.
  ANL_DEVICE void merge_and_finish(int64_t r, int64_t y, Phase phase) const {
    const Program& program = p.call.program;
    if (threadIdx.x < WARP) {
      const bool writes = threadIdx.x == 0;
      const auto first = merged(scratch.first + first_part(r));
      Row<T> row;
      row.set_first_sums(program, first, widen(logits(r)[y]));
      if (phase == SECOND) row.set_second_sums(program, merged(scratch.second + first_part(r)));
      const bool again = phase == FIRST && row.second;
      T loss = T(0);
      auto gradient = RowGradient<T, FULL>::constant(T(0));
      if (!again && p.call.op == Op::STATS) {
        if (writes) write_statistics<FULL>(p, r, row);
      } else if (!again) {
        const T weight = row_weight<T>(p.call, y, Label::LIVE);
        loss = finish_row<T, FULL>(p, r, row, weight, inverse(denominator), writes, gradient);
      }
      __syncwarp();  // all lanes have read the target's logit, where its gradient may now go
      if (writes) {
        shared.finished = !again;
        shared.loss = double(loss);
        RowState<T, FULL>& known = scratch.rows[r];
        known.all_exist = first.sums.of[COUNT] == double(p.call.num_classes - 1);
        known.sweeps_again = again;
        if (again)
          known.sweep = row.template sweep<FULL>(program);
        else
          known.gradient = gradient;
        announce(r, phase, again ? SECOND : GRADIENT);
      }
    }
    __syncthreads();
    if (shared.finished) finish_loss<T>(p, r, shared.loss, denominator);
  }

  // The state of row r, when that is `phase` or more.
  ANL_DEVICE unsigned wait(int64_t r, Phase phase) const {
    if (threadIdx.x == 0) {
      unsigned x = load_acquire(state(r));
      while (x < unsigned(phase)) {
        wait_a_little();
        x = load_acquire(state(r));
      }
      shared.state = x;
    }
    __syncthreads();
    return shared.state;
  }

  // A part's sums, or its gradient.
  ANL_DEVICE void run_part(const Item& item, int64_t y) const {
    const int64_t r = item.row, at = first_part(r) + item.part;
    const Part part = part_of(item, y);
    const StagedWalk<S, Cache::KEEP> kept = {{{part.logits}, part.packs}, staged};
    if (item.phase == FIRST) {
      auto sums = none<AnchoredSums<T, FULL>>();
      part.first_sweep(p.call.program, sums, kept);
      add_edge(sums, part.edge_logit());
      const auto all = block_merge<typename Scratch<T, FULL>::First>(sums, shared.first);
      if (threadIdx.x == 0) scratch.first[at] = all;
    } else if (item.phase == SECOND) {
      auto sums = none<SecondSums<Scalar<T>, FULL>>();
      const RowSweep<T, FULL> sweep = scratch.rows[r].sweep;
      part.second_sweep(sums, sweep, scratch.rows[r].all_exist, kept);
      add_edge(sums, sweep, part.edge_logit());
      const auto all = block_merge<typename Scratch<T, FULL>::Second>(sums, shared.second);
      if (threadIdx.x == 0) scratch.second[at] = all;
    } else {
      write_gradient(part, scratch.rows[r]);
    }
  }

  ANL_DEVICE void run_live(const Item& item, int64_t y, Step step) const {
    const int64_t r = item.row;
    const bool all = step == Step::ALL;
    if (item.phase == SECOND && (all ? wait(r, SECOND) >= GRADIENT : !scratch.rows[r].sweeps_again)) return;  // closed form
    if (item.phase == GRADIENT && all) wait(r, GRADIENT);
    if (step != Step::MERGE)
      run_part(item, y);
    else
      __syncthreads();  // all have read whether the row sweeps again, which the merge may change
    const bool is_last = all ? item.phase != GRADIENT && bring_part(r, item.phase) : step == Step::MERGE;
    if (is_last) merge_and_finish(r, y, item.phase);
  }

  ANL_DEVICE void write_gradient(const Part& part, const RowState<T, FULL>& row) const {
    const Program& program = p.call.program;
    const RowGradient<T, FULL> gradient = row.gradient;
    const T edge = part.edge_logit();
    const StagedWalk<S, Cache::STREAM> once = {{{part.logits}, part.packs}, staged};
    part.template write_gradient<FULL, Cache::STREAM>(program, gradient, row.all_exist, p.plan.split.packs, once);
    part.template write_edge<FULL>(program, gradient, edge);
  }

  ANL_DEVICE void run_unread(const Item& item, int64_t y, Label kind) const {
    if (item.phase == FIRST && item.part == 0) {
      double loss = 0.0;
      if (threadIdx.x == 0) loss = double(write_unread_row<T>(p, item.row, kind));
      finish_loss<T>(p, item.row, loss, denominator);
    }
    if (item.phase == GRADIENT) part_of(item, y).fill(unread_value<T>(kind), p.plan.split.packs);
  }
};

// The i-th item of a launch of one step: a part, or, for a merge, a row.
ANL_DEVICE Item dealt_item(const Params& p, Step step, Phase phase, int64_t i) {
  const int64_t parts = step == Step::MERGE ? 1 : p.plan.split.parts_per_row;
  if (i >= p.num_rows * parts) return {NO_PHASE, 0, 0};
  return {phase, int(i % parts), i / parts};
}

// Items come by tickets (Step::ALL), or are dealt to the CTAs beforehand.
template <class S, bool FULL>
__global__ void __launch_bounds__(MAX_THREADS, sizeof(S) == 8 ? 1 : CTAS)
    rows_split_kernel(const __grid_constant__ Params p, const Step step, const Phase phase) {
  using T = acc_t<S>;
  using Memory = Shared<T, FULL>;
  ANL_SHARED(uint4, staged);
  ANL_STATIC_SHARED(Memory, shared);
  static_assert(sizeof(Memory) <= STATIC_SHARED);
  const SplitRows<S, FULL> rows = {p, shared, staged, Scratch<T, FULL>(p), loss_denominator<T>(p)};
  const bool by_tickets = step == Step::ALL;
  unsigned ticket = 0;
  if (by_tickets) zero_tickets(p.claim, p.mark, p.tickets, p.plan.num_tickets);
  if (threadIdx.x == 0 && by_tickets) ticket = atomicAdd(rows.next_item(), 1u);
  if (threadIdx.x == 0) shared.dealt = blockIdx.x;
  for (;;) {
    if (threadIdx.x == 0) {
      shared.item = by_tickets ? item_of(p, ticket) : dealt_item(p, step, phase, shared.dealt);
      shared.dealt += gridDim.x;
      if (by_tickets && shared.item.phase != NO_PHASE)
        ticket = atomicAdd(rows.next_item(), 1u);  // comes while this item is worked on
    }
    __syncthreads();
    const Item item = shared.item;
    if (item.phase == NO_PHASE) break;
    if (item.row < p.num_rows) {
      const int64_t y = label_at(p.call, item.row);
      const Label kind = label_kind(p.call, y);
      if (kind == Label::LIVE)
        rows.run_live(item, y, step);
      else if (step != Step::MERGE)
        rows.run_unread(item, y, kind);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && by_tickets && add_acq_rel(rows.left(), 1) == gridDim.x - 1) give_back(p.claim);
}

template <class S, bool FULL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const auto launch_step = [&](Step step, Phase phase) {
    const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
    return ANL_LAUNCH((rows_split_kernel<S, FULL>), grid, block, NO_CLUSTER, p.plan.shared_bytes, stream, p, step, phase);
  };
  if (!p.plan.split.separate_launches) return launch_step(Step::ALL, NO_PHASE);
  for (const Phase phase : {FIRST, SECOND}) {
    if (phase == SECOND && !needs_second(p.call.program)) continue;
    if (const cudaError_t error = launch_step(Step::PHASE, phase)) return error;
    if (const cudaError_t error = launch_step(Step::MERGE, phase)) return error;
  }
  return p.call.grad ? launch_step(Step::PHASE, GRADIENT) : cudaSuccess;
}

template <class T>
int64_t scratch_bytes(const Call& call, int64_t parts) {
  const int64_t rows = rows_of(call);
  return takes_full(call) ? Scratch<T, true>::bytes(rows, parts) : Scratch<T, false>::bytes(rows, parts);
}

}  // namespace

// Parts as long as give every CTA a few; groups so that those in flight, one per phase, fill half of L2.
Plan plan_split(const Call& call, const Limits& limits) {
  const int64_t num_rows = rows_of(call), elements = pack_of(call);
  const int64_t packs = ceil_div(call.num_classes, elements), row_bytes = call.num_classes * logit_bytes(call);
  Plan plan = {};
  plan.kernel = Kernel::SPLIT;
  plan.threads = most_threads(MAX_THREADS, limits);
  plan.cluster = 1;
  const int64_t ctas = int64_t(limits.num_sms) * CTAS;
  int64_t each = ceil_div(num_rows * packs, ctas * 4 * plan.threads);  // packs per thread
  const int64_t room = (limits.shared_bytes + RESERVED_SHARED) / CTAS - RESERVED_SHARED - STATIC_SHARED;
  const int64_t most = std::clamp<int64_t>(room / (PACK_BYTES * plan.threads), 1, MANY);
  each = std::min(each, most);
  if (each > FEW) each = std::min(ceil_div(each, FEW), most / FEW) * FEW;
  plan.shared_bytes = each * plan.threads * PACK_BYTES;
  SplitPlan split = {};
  split.packs_per_part = each * plan.threads;
  split.parts_per_row = ceil_div(packs, split.packs_per_part);
  const int phases = num_phases(call);
  split.rows_per_group = std::clamp<int64_t>(limits.l2_bytes / (2 * phases * row_bytes), 1, num_rows);
  split.packs = equally_aligned(call);
  split.separate_launches = !(limits.protocols & SPLIT_ROWS);
  const int64_t items = num_rows * split.parts_per_row * phases;
  plan.blocks = std::min(items, ctas);
  plan.loss_parts = num_rows;
  plan.num_tickets = split.separate_launches ? 0 : 2 + 2 * num_rows;
  plan.scratch_bytes = call.dtype == FLOAT64 ? scratch_bytes<double>(call, split.parts_per_row)
                                             : scratch_bytes<float>(call, split.parts_per_row);
  plan.split = split;
  return plan;
}

cudaError_t launch_split(const Params& p, cudaStream_t stream) {
  return by_variant<half_t, bfloat16_t>(p.call, [&](auto s, auto full) {
    return launch_variant<typename decltype(s)::type, decltype(full)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
