// Rows whose classes lie side by side: (N, K), strided rows, channels-last. Lanes run across classes.
//
// Short rows go in batches of one row per lane of doubles, so that the mathematics between two sweeps is done for all
// of them at once; a batch stays in the second-level cache, so its later sweeps do not read memory. Where there are few
// long rows, the blocks of one row are spread over the threads instead.
#include "column_sums.h"
#include "row_gradient.h"

namespace anl {
namespace ANL_ISA {
namespace {

using M = LaneMath<double>;
constexpr int LANES = Traits<double>::width;
constexpr int64_t CACHE_BYTES = 256 << 10;      // a batch's part of the second-level cache
constexpr int64_t GROUP_ELEMENTS = 32 << 10;    // rows are handed to threads in groups of about this many logits
constexpr int64_t KEPT_BYTES = 256 << 10;       // exps of a batch that go to scratch memory
constexpr int64_t SPLIT_ELEMENTS = 128 << 10;   // a row this long is worth spreading over threads

// One number per row of a batch, as a vector: f(i) is that of row i.
template <class F>
ANL_INLINE M::V lanes_of(const F& f) {
  double x[LANES];
  for (int i = 0; i < LANES; ++i) x[i] = f(i);
  return Storage<double>::load(x);
}
// The same number of each row, out of vectors.
template <int SIZE>
struct Lanes {
  double of[SIZE][LANES];
  explicit Lanes(const M::V (&v)[SIZE]) {
    for (int j = 0; j < SIZE; ++j) Storage<double>::store(of[j], v[j]);
  }
};

// What a row's later sweeps know from the earlier ones. The sums are about max, and leave the target out.
struct RowState {
  double max, min, x_y, log_sum, inv_sum;
  FirstSums<ScalarMath, true> first;
  SecondSums<ScalarMath, true> second;

  // Of no class. Unrolled, as g++ makes a slow string instruction of a loop that clears memory.
  void clear() {
    max = min = x_y = log_sum = inv_sum = 0.0;
#pragma GCC unroll 16
    for (double& sum : first.of) sum = 0.0;
#pragma GCC unroll 16
    for (double& sum : second.of) sum = 0.0;
  }
};

class Rows {
 public:
  Rows(const Call& call, Block* blocks, char* kept, bool split)
      : call_(call), prog_(call.program), rows_(call, split), gradients_(rows_, blocks), blocks_(blocks), kept_(kept) {}

  static int batch_size(const Call& call) {
    const int64_t bytes = call.num_classes * logit_bytes(call) * (call.grad && call.grad != call.logits ? 2 : 1);
    return int(max_of<int64_t>(1, min_of<int64_t>(LANES, CACHE_BYTES / bytes)));
  }
  // Scratch for the exps of a batch: none if nothing reads them, or too many for the cache; the gradient's own memory
  // serves if it has the right type and is not the logits'.
  static int64_t kept_bytes(const Call& call) {
    const int64_t bytes = call.num_classes * batch_size(call) * real_bytes(call);
    return reads_kept(call) && !keeps_in_grad(call) && bytes <= KEPT_BYTES ? bytes : 0;
  }
  static bool keeps_in_grad(const Call& call) {
    return logit_bytes(call) == real_bytes(call) && reads_kept(call) && call.grad != call.logits;
  }
  static bool reads_kept(const Call& call) { return call.op == Op::LOSS && call.grad && !needs_focal(call.program); }

  // Rows [begin, end); the sum of their losses, in order.
  double run(int64_t begin, int64_t end) {
    const int batch = batch_size(call_);
    double total = 0.0;
    n_ = 0;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t y = label_at(call_, r);
      if (call_.op == Op::GRAD) {
        gradient_from_coefs(r, y);
      } else if (call_.op == Op::SLICE_STATS) {
        slice_sums(r, y);
      } else if (y == call_.ignore_index || !is_class(call_, y)) {
        total += unread(r, y == call_.ignore_index);
      } else {
        row_[n_] = r;
        y_[n_] = y;
        if (++n_ == batch) total += flush();
      }
    }
    return total + flush();
  }

 private:
  Block* blocks(int i) const { return blocks_ + i * rows_.num_blocks; }

  void write_coefs(int64_t r, const Coefs& coefs) const {
    if (!call_.grad_coefs) return;
    for (int i = 0; i < NUM_COEFS; ++i) set_real(call_, call_.grad_coefs, i * rows_.num_rows + r, coefs[i]);
  }

  void fill_grad(int64_t r, double value) const {
    if (call_.grad) rows_.loops.fill(rows_.grad(r), rows_.K, value);
  }

  // A row whose logits are not read: ignored, or NaN by a label that is no class. Returns its loss.
  double unread(int64_t r, bool ignored) const {
    const double value = ignored ? 0.0 : NaN;
    if (call_.op == Op::STATS) {
      write_unread_statistics(call_, r, ignored);
      return value;
    }
    if (call_.row_loss) set_real(call_, call_.row_loss, r, value);
    Coefs coefs = {};
    coefs[COEF_INV_SUM] = value;
    write_coefs(r, coefs);
    fill_grad(r, value);
    return value;
  }

  // Where the exps of the row in slot i are, or null.
  char* kept_row(int i) const {
    return keeps_in_grad(call_) ? rows_.grad(row_[i]) : kept_ ? kept_ + i * rows_.K * rows_.real_size : nullptr;
  }

  // First sweep of the row in slot i, merged over its blocks.
  ANL_NOINLINE void first_sums(int i) {
    const Loops& loops = rows_.loops;
    const char* z = rows_.logits(row_[i]);
    const int64_t y = y_[i];
    char* kept = kept_row(i);
    rows_.each_block(false, [&](int64_t b, int64_t k0, int n) {
      char* kept_block = kept ? kept + k0 * rows_.real_size : nullptr;
      loops.first(z + k0 * rows_.size, n, rows_.target_in_block(y, k0, n), kept_block, blocks(i)[b]);
    });
    RowState& s = state_[i];
    s.max = -INF;
    s.min = INF;
    for (int64_t b = 0; b < rows_.num_blocks; ++b) {
      s.max = max_of(s.max, blocks(i)[b].max);
      s.min = min_of(s.min, blocks(i)[b].min);
    }
    for (int64_t b = 0; b < rows_.num_blocks; ++b) {
      const Block& block = blocks(i)[b];
      auto first = block.first;
      if (block.max != -INF) first.rebase(s.max - block.max);  // else no class exists: zeros, or NaN
      s.first.add(first);
    }
  }

  void first_sweep(int i) {
    first_sums(i);
    RowState& s = state_[i];
    const double z_y = blocks(i)[y_[i] / BLOCK].z_y;
    // A row whose target does not exist is NaN by definition; one with a NaN or +inf is by its TAIL.
    s.x_y = z_y == -INF ? NaN : z_y - s.max;
  }

  // Second sweep of the row in slot i: of blocks with classes on both sides of the clamp, and for the focal sums.
  ANL_NOINLINE void second_sweep(int i) {
    RowState& s = state_[i];
    const auto sweep = SecondSweep<ScalarMath>::of_row(prog_, s.log_sum);
    if (!needs_second(prog_) || s.log_sum != s.log_sum) return;
    if (!sweep.focal && s.min - s.max > sweep.threshold)
      return s.second.set_all_above(s.first.of[COUNT], s.first.of[GAP], -sweep.threshold);
    const char* z = rows_.logits(row_[i]);
    const int64_t y = y_[i];
    rows_.each_block(true, [&](int64_t b, int64_t k0, int n) {
      Block& block = blocks(i)[b];
      const double x_max = block.max - s.max;
      block.second = {};
      if (!sweep.focal && x_max <= sweep.threshold) {
        auto first = block.first;
        first.rebase(-x_max);
        block.second.set_all_below(first.of[TAIL]);
      } else if (!sweep.focal && block.min - s.max > sweep.threshold) {
        block.second.set_all_above(block.first.of[COUNT], block.first.of[GAP], x_max - sweep.threshold);
      } else {
        const int yb = rows_.target_in_block(y, k0, n);
        rows_.loops.second(z + k0 * rows_.size, n, yb, s.max, sweep, block.second.of);
      }
    });
    for (int64_t b = 0; b < rows_.num_blocks; ++b) s.second.add(blocks(i)[b].second);
  }

  // The sums of a row whose other classes lie elsewhere; zeros if it is ignored.
  void slice_sums(int64_t r, int64_t y) {
    RowState& s = state_[0];
    s.clear();
    row_[0] = r;
    y_[0] = y;
    const bool live = y != call_.ignore_index;
    if (live && !call_.lse) first_sums(0);
    if (live && call_.lse) {
      s.max = call_.lse[r];
      s.log_sum = call_.lse[rows_.num_rows + r];
      s.min = -INF;
      for (int64_t b = 0; b < rows_.num_blocks; ++b) {  // nothing is known of the blocks
        blocks_[b].max = INF;
        blocks_[b].min = -INF;
      }
      second_sweep(0);
    }
    if (call_.lse)
      write_slice_second(call_, r, s.second.of, needs_focal(prog_) ? 1.0 : exp(-s.log_sum));
    else
      write_slice_first(call_, r, s.max, s.first.of);
  }

  // The rows gathered so far: sweeps, the mathematics of all of them at once, results. Returns their losses' sum.
  ANL_NOINLINE double flush() {
    const int n = n_;
    if (n == 0) return 0.0;
    n_ = 0;
    for (int i = 0; i < LANES; ++i) {
      state_[i].clear();  // idle lanes compute something harmless
      if (i < n) first_sweep(i);
    }
    RowStatistics<M> s;
    M::V first[NUM_FIRST_SUMS], second[NUM_SECOND_SUMS];
    for (int j = 0; j < NUM_FIRST_SUMS; ++j) first[j] = lanes_of([&](int i) { return state_[i].first.of[j]; });
    set_first_sums(s, lanes_of([&](int i) { return state_[i].x_y; }), first);
    const M::V inv_sum = M::exp(-s.log_sum) + (s.log_sum - s.log_sum);  // NaN in a NaN row
    const Lanes<2> sums({s.log_sum, inv_sum});
    for (int i = 0; i < n; ++i) {
      state_[i].log_sum = sums.of[0][i];
      state_[i].inv_sum = sums.of[1][i];
      second_sweep(i);
    }
    for (int j = 0; j < NUM_SECOND_SUMS; ++j) second[j] = lanes_of([&](int i) { return state_[i].second.of[j]; });
    set_second_sums(s, second, needs_focal(prog_) ? set1(1.0) : inv_sum);
    if (call_.op != Op::STATS) return finish(s, n);
    write_statistics(s, n);
    return 0.0;
  }

  double finish(const RowStatistics<M>& s, int n) {
    M::V values[NUM_COEFS];
    const Lanes<1> loss({loss_of<M>(prog_, s, values)});
    values[COEF_MAX] = values[COEF_INV_SUM] = values[COEF_LOG_SUM] = M::V{};
    const Lanes<NUM_COEFS> coefs_of(values);
    double total = 0.0;
    for (int i = 0; i < n; ++i) {
      const int64_t r = row_[i];
      const double weight = class_weight(call_, y_[i]);
      total += loss.of[0][i] * weight;
      if (call_.row_loss) set_real(call_, call_.row_loss, r, loss.of[0][i] * weight);
      Coefs coefs;
      for (int j = 0; j < NUM_COEFS; ++j) coefs[j] = coefs_of.of[j][i] * (weight * call_.loss_scale);
      coefs[COEF_MAX] = state_[i].max;
      coefs[COEF_INV_SUM] = state_[i].inv_sum;
      coefs[COEF_LOG_SUM] = state_[i].log_sum;
      write_coefs(r, coefs);
      if (call_.grad) gradients_.write({r, y_[i], coefs, 1.0, blocks(i), kept_row(i)});
    }
    return total;
  }

  void write_statistics(const RowStatistics<M>& s, int n) const {
    M::V values[NUM_STATS];
    statistics_of<M>(prog_, s, lanes_of([&](int i) { return state_[i].max; }), values);
    const Lanes<NUM_STATS> stats(values);
    for (int j = 0; j < NUM_STATS; ++j)
      for (int i = 0; i < n; ++i) call_.stats[j * rows_.num_rows + row_[i]] = stats.of[j][i];
  }

  void gradient_from_coefs(int64_t r, int64_t y) const {
    Coefs coefs;
    for (int i = 0; i < NUM_COEFS; ++i) coefs[i] = real_at(call_, call_.grad_coefs, i * rows_.num_rows + r);
    if (coefs[COEF_INV_SUM] == 0.0) return fill_grad(r, 0.0);
    if (!is_class(call_, y)) return fill_grad(r, NaN);
    gradients_.write({r, y, coefs, grad_output(call_, r), nullptr, nullptr});
  }

  const Call& call_;
  const Program& prog_;
  const RowLayout rows_;
  const RowGradients gradients_;
  Block* blocks_;
  char* kept_;
  int n_ = 0;  // how many rows are gathered
  int64_t row_[LANES], y_[LANES];
  RowState state_[LANES];
};

double run(const Call& call) {
  const int64_t N = call.outer * call.inner, K = call.num_classes, num_blocks = ceil_div(K, BLOCK);
  if (K >= SPLIT_ELEMENTS && N < 4 * num_threads() && num_threads() > 1) {
    Scratch<Block> blocks(num_blocks * LANES);
    return Rows(call, blocks.data, nullptr, true).run(0, N);
  }
  // A group's size depends on K alone, so that the order of the sum does not depend on the number of threads.
  const int64_t group = max_of<int64_t>(1, min_of<int64_t>(64, GROUP_ELEMENTS / K / LANES * LANES));
  const int64_t num_groups = ceil_div(N, group);
  Scratch<double> partial(num_groups);
  parallel_for(num_groups, max_of<int64_t>(1, GROUP_ELEMENTS / (group * K)), [&](int64_t begin, int64_t end) {
    Scratch<Block> blocks(num_blocks * LANES);
    const int64_t kept_bytes = Rows::kept_bytes(call);
    Scratch<char> kept(kept_bytes);
    Rows rows(call, blocks.data, kept_bytes ? kept.data : nullptr, false);
    for (int64_t i = begin; i < end; ++i) partial.data[i] = rows.run(i * group, min_of(N, (i + 1) * group));
  });
  double total = 0.0;
  for (int64_t i = 0; i < num_groups; ++i) total += partial.data[i];
  return total;
}

}  // namespace

double rows_entry(const Call& call) {
  if (call.op != Op::COLUMN_SUMS) return run(call);
  by_storage<half_t, bfloat16_t>(call.dtype, [&](auto stored) { column_sums<typename decltype(stored)::type>(call); });
  return 0.0;
}

}  // namespace ANL_ISA
}  // namespace anl
