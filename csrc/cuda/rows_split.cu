// Rows of any length, on any architecture: every row is cut into parts, each of which a CTA takes.
//
// A row passes through up to three phases: first sweep, second sweep, gradient. In one launch, CTAs take parts by tickets.
// These go through groups of rows whose logits the L2 cache holds, phase after phase, a group ahead of the other, in an
// order in which nothing waits for a larger ticket than its own. Whoever brings the last part of a phase merges all of
// them, in order, and does the row's mathematics. Where CTAs may not wait for one another (plan.separate), every phase and
// every merge is a launch of its own: the same functions, the same bits.
#include "long_rows.cuh"

namespace anl {
namespace gpu {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int CTAS = 2;        // a multiprocessor's
constexpr int FEW = 4, MANY = 16;  // packs of a thread in a part: fewer than FEW where rows are few and short

enum Phase : int { FIRST, SECOND, GRADIENT, NO_PHASE };

bool ANL_HD has_second(const Call& call) { return call.program.needs != 0; }
int ANL_HD num_phases(const Call& call) { return 1 + has_second(call) + (call.grad != nullptr); }

// What a launch does: everything, by tickets; or one phase of all rows; or the merge after that phase.
enum class Step : int { ALL, PHASE, MERGE };

struct Item {
  Phase phase;
  int part;
  int64_t row;
};

// Item of ticket t. Step s of the order is phase f of group s - f for every f there is.
ANL_DEVICE Item item_of(const Params& p, unsigned t) {
  const int64_t parts = p.plan.lanes, block = p.plan.rows * parts, groups = ceil_div(p.num_rows, p.plan.rows);
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
  const Phase phase = f == 0 ? FIRST : f == 1 && has_second(p.call) ? SECOND : GRADIENT;
  return {phase, int(i % parts), (step - f) * p.plan.rows + i / parts};
}

// What a row's later phases know of its first.
template <class T>
struct RowState {
  SecondSweep<T> sweep;
  GradientRow<T> gradient;
  bool all_exist, sweeps_again;
};

// In p.scratch.
template <class T>
struct Scratch {
  FirstSums<double>* first;    // (rows, parts)
  SecondSums<double>* second;  // likewise
  RowState<T>* rows;

  static ANL_HD int64_t bytes(int64_t num_rows, int64_t parts) {
    return num_rows * (parts * int64_t(sizeof(FirstSums<double>) + sizeof(SecondSums<double>)) + int64_t(sizeof(RowState<T>)));
  }
  ANL_DEVICE explicit Scratch(const Params& p) {
    const int64_t n = p.num_rows * p.plan.lanes;
    first = reinterpret_cast<FirstSums<double>*>(p.scratch);
    second = reinterpret_cast<SecondSums<double>*>(first + n);
    rows = reinterpret_cast<RowState<T>*>(second + n);
  }
};

template <class T>
struct Shared {
  Item item;
  unsigned state;
  bool last, finished;
  double loss;
  FirstSums<double> first[MAX_THREADS / WARP];
  SecondSums<double> second[MAX_THREADS / WARP];
};

template <class S, bool FOCAL>
struct SplitRows {
  using T = acc_t<S>;
  static constexpr int P = PACK<S>;

  const Params& p;
  Shared<T>& shared;
  const Scratch<T> scratch;
  const double denominator;

  ANL_DEVICE unsigned* next_item() const { return p.tickets; }
  ANL_DEVICE unsigned* arrived(int64_t r) const { return p.tickets + 1 + r; }             // parts of both sweeps
  ANL_DEVICE unsigned* state(int64_t r) const { return p.tickets + 1 + p.num_rows + r; }  // the last phase that may begin

  ANL_DEVICE const S* logits(int64_t r) const {
    return static_cast<const S*>(p.call.logits) + row_offset(p.call, p.call.logits_strides, r);
  }
  ANL_DEVICE Share<S> share_of(const Item& item, int64_t y) const {
    S* grad = p.call.grad ? static_cast<S*>(p.call.grad) + row_offset(p.call, p.call.grad_strides, item.row) : nullptr;
    const int64_t packs = p.plan.tile / P;
    return Share<S>(logits(item.row), grad, p.call.num_classes, y, item.part * packs, packs, item.part == 0);
  }

  // The sums over all parts, in every lane of warp 0.
  template <class Sums, class Merge>
  ANL_DEVICE Sums merged(const Sums* parts, Sums* places, const Merge& merge) const {
    Sums s = Sums::none();
    for (int i = threadIdx.x; i < p.plan.lanes; i += blockDim.x) s = merge(s, parts[i]);
    return block_merge(s, places);
  }

  // Thread 0 has written a part of row r: whether it was the last of its phase.
  ANL_DEVICE bool arrive(int64_t r, Phase phase) const {
    if (threadIdx.x == 0) {
      const unsigned parts = unsigned(p.plan.lanes), all = phase == FIRST ? parts : 2 * parts;
      shared.last = add_acq_rel(arrived(r), 1) == all - 1;
    }
    __syncthreads();
    return shared.last;
  }

  // All parts of a sweep are there.
  ANL_DEVICE void conclude(int64_t r, int64_t y, Phase phase) const {
    const Program& program = p.call.program;
    const int64_t at = r * p.plan.lanes;
    const FirstSums<double> first = merged(scratch.first + at, shared.first, MergeFirst<double>());
    SecondSums<double> second = SecondSums<double>::none();
    if (phase == SECOND) second = merged(scratch.second + at, shared.second, MergeSecond<double>());
    if (threadIdx.x < WARP) {
      const bool writes = threadIdx.x == 0;
      Row<T> row;
      row.begin(program, first, widen(logits(r)[y]));
      if (phase == SECOND) row.take(second, FOCAL);
      const bool again = phase == FIRST && row.second;
      T loss = T(0);
      GradientRow<T> gradient = GradientRow<T>::constant(T(0));
      if (!again && p.call.op == Op::STATS) {
        if (writes) write_statistics(p, r, row);
      } else if (!again) {
        loss = finish_row<T, FOCAL>(p, r, row, row_weight<T>(p.call, y, Label::LIVE), denominator, writes, gradient);
      }
      __syncwarp();  // all lanes have read the target's logit, where its gradient may now go
      if (writes) {
        shared.finished = !again;
        shared.loss = double(loss);
        RowState<T>& state_of_row = scratch.rows[r];
        state_of_row.all_exist = first.count == double(p.call.num_classes - 1);
        state_of_row.sweeps_again = again;
        if (again)
          state_of_row.sweep = row.sweep(program);
        else
          state_of_row.gradient = gradient;
        if (!p.plan.separate) add_release(state(r), unsigned(again ? SECOND : GRADIENT) - (phase == SECOND ? SECOND : 0));
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
    const int64_t r = item.row, at = r * p.plan.lanes + item.part;
    const Share<S> share = share_of(item, y);
    const auto keep = [&](int i) { return load16<Cache::KEEP>(share.logits + int64_t(i) * P); };
    if (item.phase == FIRST) {
      FirstSums<T> sums = FirstSums<T>::none();
      share.first_sweep(sums, 0, share.packs, keep);
      add_edge(sums, share.edge_logit());
      const FirstSums<double> all = block_merge(sums, shared.first);
      if (threadIdx.x == 0) scratch.first[at] = all;
    } else if (item.phase == SECOND) {
      SecondSums<T> sums = SecondSums<T>::none();
      const SecondSweep<T> sweep = scratch.rows[r].sweep;
      share.template second_sweep<FOCAL>(sums, sweep, 0, share.packs, keep);
      sweep.template add<FOCAL>(sums, share.edge_logit());
      const SecondSums<double> all = block_merge(sums, shared.second);
      if (threadIdx.x == 0) scratch.second[at] = all;
    } else {
      write_gradient(share, scratch.rows[r]);
    }
  }

  ANL_DEVICE void run_live(const Item& item, int64_t y, Step step) const {
    const int64_t r = item.row;
    const bool all = step == Step::ALL;
    if (item.phase == SECOND && (all ? wait(r, SECOND) >= GRADIENT : !scratch.rows[r].sweeps_again)) return;  // closed form
    if (item.phase == GRADIENT && all) wait(r, GRADIENT);
    if (step != Step::MERGE) run_part(item, y);
    if (all ? item.phase != GRADIENT && arrive(r, item.phase) : step == Step::MERGE) conclude(r, y, item.phase);
  }

  ANL_DEVICE void write_gradient(const Share<S>& share, const RowState<T>& row) const {
    const GradientRow<T> gradient = row.gradient;
    const T edge = share.edge_logit();
    if (p.plan.packs) {
      share.template write_gradient<FOCAL, Cache::STREAM>(
          gradient, row.all_exist, 0, share.packs, [&](int i) { return load16<Cache::STREAM>(share.logits + int64_t(i) * P); });
    } else {
      share.template write_elements<FOCAL>(gradient, 0, share.packs, [&](int j) { return share.logits[j]; });
    }
    share.template write_edge<FOCAL>(gradient, edge);
  }

  ANL_DEVICE void run_unread(const Item& item, int64_t y, Label kind) const {
    if (item.phase == FIRST && item.part == 0) {
      double loss = 0.0;
      if (threadIdx.x == 0) loss = double(write_unread_row<T>(p, item.row, kind));
      finish_loss<T>(p, item.row, loss, denominator);
    }
    if (item.phase == GRADIENT) share_of(item, y).fill(unread_value<T>(kind), p.plan.packs);
  }
};

// The i-th item of a launch of one step: a part, or for a merge a row.
ANL_DEVICE Item dealt_item(const Params& p, Step step, Phase phase, int64_t i) {
  const int64_t parts = step == Step::MERGE ? 1 : p.plan.lanes;
  if (i >= p.num_rows * parts) return {NO_PHASE, 0, 0};
  return {phase, int(i % parts), i / parts};
}

// Items come by tickets (Step::ALL), or are dealt to the CTAs beforehand.
template <class S, bool FOCAL>
__global__ void __launch_bounds__(MAX_THREADS, CTAS)
    rows_split_kernel(const __grid_constant__ Params p, const Step step, const Phase phase) {
  using T = acc_t<S>;
  ANL_STATIC_SHARED(Shared<T>, shared);
  const SplitRows<S, FOCAL> rows = {p, shared, Scratch<T>(p), loss_denominator<T>(p)};
  const bool by_tickets = step == Step::ALL;
  unsigned ticket = 0;
  if (threadIdx.x == 0 && by_tickets) ticket = atomicAdd(rows.next_item(), 1u);
  for (int64_t i = blockIdx.x;; i += gridDim.x) {
    if (threadIdx.x == 0) {
      shared.item = by_tickets ? item_of(p, ticket) : dealt_item(p, step, phase, i);
      if (by_tickets && shared.item.phase != NO_PHASE)
        ticket = atomicAdd(rows.next_item(), 1u);  // comes while this item is worked on
    }
    __syncthreads();
    const Item item = shared.item;
    if (item.phase == NO_PHASE) return;
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
}

template <class S, bool FOCAL>
cudaError_t launch_variant(const Params& p, cudaStream_t stream) {
  const auto launch_step = [&](Step step, Phase phase) {
    const dim3 grid(static_cast<unsigned>(p.plan.blocks)), block(p.plan.threads);
    return ANL_LAUNCH((rows_split_kernel<S, FOCAL>), grid, block, NO_CLUSTER, 0, stream, p, step, phase);
  };
  if (!p.plan.separate) return launch_step(Step::ALL, NO_PHASE);
  for (const Phase phase : {FIRST, SECOND}) {
    if (phase == SECOND && !has_second(p.call)) continue;
    if (const cudaError_t error = launch_step(Step::PHASE, phase)) return error;
    if (const cudaError_t error = launch_step(Step::MERGE, phase)) return error;
  }
  return p.call.grad ? launch_step(Step::PHASE, GRADIENT) : cudaSuccess;
}

}  // namespace

// Parts as long as give every CTA a few; groups so that those in flight, one a phase, fill half of L2.
Plan plan_split(const Call& call, const Limits& limits) {
  const int64_t num_rows = call.outer * call.inner, size = size_of(call.dtype), elements = 16 / size;
  const int64_t packs = ceil_div(call.num_classes, elements), row_bytes = call.num_classes * size;
  Plan plan = {};
  plan.kernel = Kernel::SPLIT;
  plan.threads = limits.max_threads < MAX_THREADS ? limits.max_threads / WARP * WARP : MAX_THREADS;
  plan.cluster = 1;
  const int64_t ctas = int64_t(limits.num_sms) * CTAS;
  int64_t each = ceil_div(num_rows * packs, ctas * 4 * plan.threads);  // packs a thread
  if (each > FEW) each = each < MANY ? ceil_div(each, FEW) * FEW : MANY;
  const int64_t parts = ceil_div(packs, each * plan.threads);
  plan.tile = each * plan.threads * elements;
  plan.lanes = int(parts);
  const int phases = num_phases(call);
  const int64_t rows = limits.l2_bytes / (2 * phases * row_bytes);
  plan.rows = rows < 1 ? 1 : rows < num_rows ? rows : num_rows;
  const int64_t items = num_rows * parts * phases;
  plan.blocks = items < ctas ? items : ctas;
  plan.packs = equally_aligned(call);
  plan.loss_parts = num_rows;
  plan.separate = !(limits.protocols & SPLIT_ROWS);
  plan.num_tickets = plan.separate ? 0 : 1 + 2 * num_rows;
  plan.scratch_bytes = call.dtype == FLOAT64 ? Scratch<double>::bytes(num_rows, parts) : Scratch<float>::bytes(num_rows, parts);
  return plan;
}

cudaError_t launch_split(const Params& p, cudaStream_t stream) {
  return by_variant(p.call, [&](auto s, auto focal) {
    return launch_variant<typename decltype(s)::type, decltype(focal)::value>(p, stream);
  });
}

}  // namespace gpu
}  // namespace anl
