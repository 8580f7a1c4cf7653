// Rows whose classes lie side by side: (N, K), strided rows, channels-last. Lanes run across classes.
//
// Short rows go in batches of one row a lane of doubles, so that the scalar mathematics between two sweeps is done for
// all of them at once; a batch stays in the second-level cache, so its later sweeps do not read memory. Where there are
// few long rows, the blocks of one row are spread over the threads instead.
#include "row_sweeps.h"

namespace anl {
namespace ANL_ISA {
namespace {

using M = LaneMath<double>;
constexpr int LANES = Traits<double>::width;
constexpr int64_t CACHE_BYTES = 256 << 10;      // a batch's share of the second-level cache
constexpr int64_t GROUP_ELEMENTS = 32 << 10;    // rows are handed to threads in groups of about this many logits
constexpr int64_t KEPT_BYTES = 256 << 10;       // exps of a batch that go to scratch memory
constexpr int64_t SPLIT_ELEMENTS = 128 << 10;   // a row this long is worth spreading over threads

// One field of up to LANES rows, as a vector.
struct Lane {
  double x[LANES];
  M::V get() const { return Storage<double>::load(x); }
  void set(M::V v) { Storage<double>::store(x, v); }
};

template <class S>
class Rows {
  using T = typename Storage<S>::Acc;
  using Sw = Sweep<S>;

 public:
  Rows(const Call& call, Block* blocks, T* kept, bool split)
      : call_(call), prog_(call.program), K_(call.num_classes), num_blocks_(ceil_div(K_, BLOCK)),
        num_rows_(call.outer * call.inner), blocks_(blocks), kept_(kept), split_(split) {}

  static int batch_size(const Call& call) {
    const int64_t bytes = call.num_classes * int64_t(sizeof(S)) * (call.grad && call.grad != call.logits ? 2 : 1);
    return int(max_of<int64_t>(1, min_of<int64_t>(LANES, CACHE_BYTES / bytes)));
  }
  // Scratch for the exps of a batch: none if nothing reads them, or too many for the cache; the gradient's own memory
  // serves if it has the right type and is not the logits'.
  static int64_t kept_size(const Call& call) {
    const int64_t size = call.num_classes * batch_size(call);
    const bool wanted = call.op == Op::LOSS && call.grad && size * int64_t(sizeof(T)) <= KEPT_BYTES;
    return wanted && !keeps_in_grad(call) ? size : 0;
  }
  static bool keeps_in_grad(const Call& call) {
    return sizeof(S) == sizeof(T) && call.op == Op::LOSS && call.grad && call.grad != call.logits;
  }

  // Rows [begin, end); the sum of their losses, in order.
  double run(int64_t begin, int64_t end) {
    const int batch = batch_size(call_);
    double total = 0.0;
    n_ = 0;
    for (int64_t r = begin; r < end; ++r) {
      if (call_.op == Op::GRAD) {
        gradient_from_coefs(r);
        continue;
      }
      if (call_.op == Op::SLICE_STATS) {
        slice_sums(r);
        continue;
      }
      const int64_t y = label_at(call_, r);
      if (y == call_.ignore_index || !is_class(call_, y)) {
        total += unread(r, y == call_.ignore_index);
        continue;
      }
      row_[n_] = r;
      y_[n_] = y;
      if (++n_ == batch) total += flush();
    }
    return total + flush();
  }

 private:
  const S* logits(int64_t r) const { return static_cast<const S*>(call_.logits) + row_offset(call_, call_.logits_strides, r); }
  S* grad(int64_t r) const { return static_cast<S*>(call_.grad) + row_offset(call_, call_.grad_strides, r); }

  // f(block, first class, number of classes) for every block: over the threads, or here from the last to the first
  // (the cache holds what the sweep before touched last).
  template <class F>
  void each_block(bool backwards, const F& f) const {
    const auto range = [&](int64_t b0, int64_t b1) {
      for (int64_t i = b0; i < b1; ++i) {
        const int64_t b = backwards ? b1 - 1 - (i - b0) : i;
        f(b, b * BLOCK, int(min_of(BLOCK, K_ - b * BLOCK)));
      }
    };
    if (split_)
      parallel_for(num_blocks_, 8, range);
    else
      range(0, num_blocks_);
  }

  static double exp_of_gap(double gap) { return gap == 0.0 ? 1.0 : exp(-gap); }  // most rows are one block

  static int target_in_block(int64_t y, int64_t k0, int n) { return y >= k0 && y < k0 + n ? int(y - k0) : -1; }

  void fill(int64_t r, T value) const {
    if (!call_.grad) return;
    S* g = grad(r);
    S bits;
    store_one(&bits, value);
    for (int64_t k = 0; k < K_; ++k) g[k] = bits;
  }

  void write_coefs(int64_t r, const RowState& s, double inv_sum) const {
    if (!call_.coefs) return;
    const double values[NUM_COEFS] = {s.max, inv_sum,  s.a,  s.b,      s.a_above,
                                      s.c,   s.bw,     s.cw, s.target, s.log_sum};
    for (int i = 0; i < NUM_COEFS; ++i) static_cast<T*>(call_.coefs)[i * num_rows_ + r] = T(values[i]);
  }

  // A row whose logits are not read: ignored, or NaN by a label that is no class. Returns its loss.
  double unread(int64_t r, bool ignored) const {
    const double value = ignored ? 0.0 : NaN;
    if (call_.op == Op::STATS) {
      if (ignored)
        write_ignored_statistics(call_, r, num_rows_);
      else
        write_bad_statistics(call_, r, num_rows_);
      return value;
    }
    if (call_.row_loss) static_cast<T*>(call_.row_loss)[r] = T(value);
    write_coefs(r, RowState{}, value);
    fill(r, T(value));
    return value;
  }

  // Where the exps of the row in slot i are, or null.
  T* kept_row(int i) const {
    return keeps_in_grad(call_) ? reinterpret_cast<T*>(grad(row_[i])) : kept_ ? kept_ + i * K_ : nullptr;
  }

  // First sweep of the row in slot i, merged over its blocks.
  void first_sums(int i) {
    const S* z = logits(row_[i]);
    Block* blocks = blocks_ + i * num_blocks_;
    const int64_t y = y_[i];
    T* kept = kept_row(i);
    each_block(false, [&](int64_t b, int64_t k0, int n) {
      Sw::first(z + k0, n, target_in_block(y, k0, n), kept ? kept + k0 : nullptr, blocks[b]);
    });
    RowState& s = state_[i];
    s = RowState{};
    s.max = -INF;
    s.min = INF;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      s.max = max_of(s.max, blocks[b].max);
      s.min = min_of(s.min, blocks[b].min);
    }
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const Block& k = blocks[b];
      if (k.max == -INF) {
        s.gap += k.gap;  // 0 or NaN
        continue;
      }
      const double below = s.max - k.max;
      s.tail += k.tail * exp_of_gap(below);
      s.gap += k.gap + k.count * below;
      s.count += k.count;
    }
  }

  void first_sweep(int i) {
    first_sums(i);
    const RowState& s = state_[i];
    const double z_y = double(load_one(logits(row_[i]) + y_[i]));
    // NaN and +inf leave a NaN gap; a row whose target does not exist is NaN by definition.
    const bool bad = s.gap != s.gap || z_y == -INF || z_y != z_y;
    x_y_.x[i] = bad ? NaN : z_y - s.max;
    tail_.x[i] = bad ? NaN : s.tail;
  }

  // The sums of a row whose other classes lie elsewhere.
  void slice_sums(int64_t r) {
    double first[NUM_SLICE_FIRST] = {}, second[NUM_SLICE_SECOND] = {};
    RowState& s = state_[0];
    row_[0] = r;
    y_[0] = label_at(call_, r);
    if (y_[0] == call_.ignore_index) {
    } else if (!call_.lse) {
      first_sums(0);
      const double found[] = {s.max, s.tail, s.gap, s.count};
      memcpy(first, found, sizeof(first));
    } else {
      s = RowState{};
      s.max = call_.lse[r];
      s.log_sum = call_.lse[num_rows_ + r];
      s.inv_sum = exp(-s.log_sum);
      slice_second(s, second);
    }
    const int n = call_.lse ? int(NUM_SLICE_SECOND) : int(NUM_SLICE_FIRST);
    for (int j = 0; j < n; ++j) call_.stats[j * num_rows_ + r] = (call_.lse ? second : first)[j];
  }

  void slice_second(const RowState& s, double (&out)[NUM_SLICE_SECOND]) {
    const S* z = logits(row_[0]);
    const int64_t y = y_[0];
    const bool focal = prog_.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE), mass = prog_.needs & NEED_ABOVE_MASS;
    each_block(true, [&](int64_t b, int64_t k0, int n) {
      const int yb = target_in_block(y, k0, n);
      if (focal)
        Sw::template second<true, true>(z + k0, n, yb, s, prog_, blocks_[b]);
      else if (mass)
        Sw::template second<true, false>(z + k0, n, yb, s, prog_, blocks_[b]);
      else
        Sw::template second<false, false>(z + k0, n, yb, s, prog_, blocks_[b]);
    });
    for (int64_t b = 0; b < num_blocks_; ++b) {
      const Block& k = blocks_[b];
      const double sums[] = {k.above_sum,    k.above_count,     k.below_mass,        k.focal_sum,
                             k.focal_weight, k.focal_above_sum, k.focal_above_weight};
      for (int j = 0; j < NUM_SLICE_SECOND; ++j) out[j] += sums[j];
    }
  }

  // above_sum and the other statistics that need the final lse, into lane i.
  void second_sweep(int i, unsigned needs) {
    const RowState& s = state_[i];
    const double T = prog_.log_floor_neg, thr = s.log_sum - T, lse_gap = T - s.log_sum;
    const bool focal = needs & (NEED_FOCAL | NEED_FOCAL_ABOVE);
    double above_sum = 0, below_mass = 0, above_count = 0, focal_sum = 0, weight = 0, focal_above = 0, weight_above = 0;
    if (!needs || s.log_sum != s.log_sum) {
    } else if (!focal && s.min - s.max > thr) {  // every class above the clamp: closed form
      above_count = s.count;
      above_sum = s.count * lse_gap - s.gap;
    } else {
      const S* z = logits(row_[i]);
      Block* blocks = blocks_ + i * num_blocks_;
      const int64_t y = y_[i];
      each_block(true, [&](int64_t b, int64_t k0, int n) {
        Block& k = blocks[b];
        const int yb = target_in_block(y, k0, n);
        const double below = s.max - k.max;
        if (focal) {
          Sw::template second<true, true>(z + k0, n, yb, s, prog_, k);
        } else if (-below <= thr) {
          k.above_sum = k.above_count = 0.0;
          k.below_mass = k.tail * exp_of_gap(below) * s.inv_sum;
        } else if (k.min - s.max > thr) {
          k.above_count = k.count;
          k.above_sum = k.count * (lse_gap - below) - k.gap;
          k.below_mass = 0.0;
        } else if (needs & NEED_ABOVE_MASS) {
          Sw::template second<true, false>(z + k0, n, yb, s, prog_, k);
        } else {
          Sw::template second<false, false>(z + k0, n, yb, s, prog_, k);
        }
      });
      for (int64_t b = 0; b < num_blocks_; ++b) {
        const Block& k = blocks[b];
        above_sum += k.above_sum;
        above_count += k.above_count;
        below_mass += k.below_mass;
        if (!focal) continue;
        focal_sum += k.focal_sum;
        weight += k.focal_weight;
        focal_above += k.focal_above_sum;
        weight_above += k.focal_above_weight;
      }
    }
    const double values[] = {above_sum, below_mass, above_count, focal_sum, weight, focal_above, weight_above};
    for (int j = 0; j < 7; ++j) second_[j].x[i] = values[j];
  }

  // The rows gathered so far: sweeps, the mathematics of all of them at once, results. Returns their losses' sum.
  double flush() {
    if (n_ == 0) return 0.0;
    Lane gap, count, log_sum, prob;
    for (int i = 0; i < LANES; ++i) {
      if (i < n_) {
        first_sweep(i);
      } else {  // idle lanes compute something harmless
        x_y_.x[i] = tail_.x[i] = 0.0;
        state_[i] = RowState{};
      }
      gap.x[i] = state_[i].gap;
      count.x[i] = state_[i].count;
    }
    RowStatistics<M> s;
    target_statistics<M>(s, x_y_.get(), tail_.get());
    s.classes = count.get();
    s.neg_log_sum = s.classes * s.log_sum + gap.get();
    log_sum.set(s.log_sum);
    prob.set(M::exp(-s.log_sum));
    target_tail_.set(s.target_tail);
    for (int i = 0; i < LANES; ++i) {
      state_[i].log_sum = log_sum.x[i];
      state_[i].inv_sum = log_sum.x[i] != log_sum.x[i] ? NaN : prob.x[i];
      if (i < n_)
        second_sweep(i, prog_.needs);
      else
        for (Lane& lane : second_) lane.x[i] = 1.0;
    }
    s.above_sum = second_[0].get();
    s.below_mass = second_[1].get();
    s.above_count = second_[2].get();
    s.focal_sum = second_[3].get();
    s.focal_weight = second_[4].get();
    s.focal_above_sum = second_[5].get();
    s.focal_above_weight = second_[6].get();
    const int n = n_;
    n_ = 0;
    if (call_.op == Op::STATS) {
      write_statistics(s, n);
      return 0.0;
    }
    return finish(s, n);
  }

  double finish(const RowStatistics<M>& s, int n) {
    Coefficients<M> g;
    Lane loss, target, fields[6];
    loss.set(evaluate<M>(prog_, s, g));
    target.set(g.target);
    const M::V values[6] = {g.a, g.b, g.a_above, g.c, g.bw, g.cw};
    for (int j = 0; j < 6; ++j) fields[j].set(values[j]);
    double total = 0.0;
    for (int i = 0; i < n; ++i) {
      const int64_t r = row_[i];
      const double weight = class_weight<T>(call_, y_[i]), scale = weight * call_.loss_scale;
      RowState& row = state_[i];
      total += loss.x[i] * weight;
      if (call_.row_loss) static_cast<T*>(call_.row_loss)[r] = T(loss.x[i] * weight);
      double* out[6] = {&row.a, &row.b, &row.a_above, &row.c, &row.bw, &row.cw};
      for (int j = 0; j < 6; ++j) *out[j] = fields[j].x[i] * scale;
      row.target = target.x[i] * scale;
      write_coefs(r, row, row.inv_sum);
      if (call_.grad) write_gradient(r, row, y_[i], blocks_ + i * num_blocks_, kept_row(i));
    }
    return total;
  }

  void write_statistics(const RowStatistics<M>& s, int n) const {
    Lane max, lane;
    for (int i = 0; i < LANES; ++i) max.x[i] = state_[i].max;
    M::V values[NUM_STATS];
    all_statistics<M>(prog_, s, max.get(), values);
    for (int j = 0; j < NUM_STATS; ++j) {
      lane.set(values[j]);
      for (int i = 0; i < n; ++i) call_.stats[j * num_rows_ + row_[i]] = lane.x[i];
    }
  }

  // sum_k p_k log_q_k as center + sum_k p_k (log_q_k - center): the nearer the center, the fewer digits cancel where the
  // gradient takes the mean from log_q_j.
  double mean_log_q(const S* z, const T* log_q, const RowState& s, double center) {
    const T c = T(center);
    each_block(false, [&](int64_t b, int64_t k0, int n) { Sw::dot(z + k0, n, log_q + k0, c, s.max, blocks_[b]); });
    double mass = 0.0, moment = 0.0;
    for (int64_t b = 0; b < num_blocks_; ++b) {
      mass += blocks_[b].mass;
      moment += blocks_[b].dot;
    }
    return double(c) + moment / mass;
  }

  // blocks: the first sweep's (whole blocks above or below the clamp then take the short loop), or null.
  void write_gradient(int64_t r, const RowState& s, int64_t y, const Block* blocks, const T* kept) {
    if (s.inv_sum != s.inv_sum) return fill(r, T(NaN));
    const S* z = logits(r);
    S* g = grad(r);
    const T* log_q = static_cast<const T*>(call_.log_q);
    const double es = entropy_scale<T>(call_), thr = s.log_sum - prog_.log_floor_neg;
    double mean = 0.0, target = s.target;
    if (log_q) {
      mean = mean_log_q(z, log_q, s, 0.0);
      mean = mean_log_q(z, log_q, s, mean);
      target += es * exp(double(load_one(z + y)) - s.max) * s.inv_sum * (double(log_q[y]) - mean);
    }
    const bool focal = s.bw != 0.0 || s.cw != 0.0, clamped = s.a_above != s.a || s.c != 0.0;
    RowState all = s;  // of a block wholly above the clamp
    all.a = s.a_above;
    all.b += s.c;
    each_block(!log_q, [&](int64_t b, int64_t k0, int n) {
      const S* zb = z + k0;
      S* gb = g + k0;
      const bool above = blocks && blocks[b].min - s.max > thr, below = blocks && blocks[b].max - s.max <= thr;
      const bool mixed = clamped && !above && !below, exist = blocks && blocks[b].min != -INF;
      const RowState& k = above ? all : s;
      const T* e = kept && exist && !focal ? kept + k0 : nullptr;
      const double e_scale = e ? exp_of_gap(s.max - blocks[b].max) : 1.0;
      const auto run = [&](auto gradient, const RowState& coefs) {
        gradient(zb, gb, n, coefs, prog_, e, e_scale, log_q ? log_q + k0 : nullptr, es, mean);
      };
      if (log_q)
        run(Sw::template gradient<true, true, true, false, true>, s);
      else if (focal)
        run(Sw::template gradient<true, true, true, false, false>, s);
      else if (mixed && e)
        run(Sw::template gradient<true, false, false, true, false>, s);
      else if (mixed)
        run(Sw::template gradient<true, false, true, false, false>, s);
      else if (e)
        run(Sw::template gradient<false, false, false, true, false>, k);
      else if (exist || k.b == 0.0)
        run(Sw::template gradient<false, false, false, false, false>, k);
      else
        run(Sw::template gradient<false, false, true, false, false>, k);
    });
    store_one(g + y, T(target));
  }

  void gradient_from_coefs(int64_t r) {
    const T* coefs = static_cast<const T*>(call_.coefs) + r;
    const double go = grad_output<T>(call_, r);
    double x[NUM_COEFS];
    for (int i = 0; i < NUM_COEFS; ++i) x[i] = double(coefs[i * num_rows_]);
    if (x[COEF_INV_SUM] == 0.0) return fill(r, T(0));
    RowState s = {};
    s.max = x[COEF_MAX];
    s.inv_sum = x[COEF_INV_SUM];
    s.log_sum = x[COEF_LOG_SUM];
    s.a = x[COEF_A] * go;
    s.b = x[COEF_B] * go;
    s.a_above = x[COEF_A_ABOVE] * go;
    s.c = x[COEF_C] * go;
    s.bw = x[COEF_BW] * go;
    s.cw = x[COEF_CW] * go;
    s.target = x[COEF_TARGET] * go;
    const int64_t y = label_at(call_, r);
    if (!is_class(call_, y)) return fill(r, T(NaN));
    write_gradient(r, s, y, nullptr, nullptr);
  }

  const Call& call_;
  const Program& prog_;
  const int64_t K_, num_blocks_, num_rows_;
  Block* blocks_;
  T* kept_;
  const bool split_;
  int n_ = 0;
  int64_t row_[LANES], y_[LANES];
  RowState state_[LANES];
  Lane x_y_, tail_, target_tail_, second_[7];
};

// sum over rows of p_ij: a thread owns a range of classes (and, where these are few, one of a fixed number of row
// chunks); within it rows are added in order.
template <class S>
void column_sums(const Call& call) {
  using T = typename Storage<S>::Acc;
  constexpr int W = Traits<T>::width;
  const int64_t K = call.num_classes, N = call.outer * call.inner, num_blocks = ceil_div(K, BLOCK);
  const int64_t chunks = max_of<int64_t>(1, min_of<int64_t>(min_of<int64_t>(16, 64 / num_blocks), ceil_div(N, 64)));
  const int64_t rows = ceil_div(N, chunks);
  Scratch<double> partial(chunks * K);
  parallel_for(chunks * num_blocks, max_of<int64_t>(1, GROUP_ELEMENTS / (rows * min_of(K, BLOCK) + 1)),
               [&](int64_t begin, int64_t end) {
    T sums[BLOCK + W];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / num_blocks, k0 = task % num_blocks * BLOCK, n = min_of(BLOCK, K - k0);
      double* out = partial.data + chunk * K + k0;
      for (int64_t k = 0; k < n; ++k) out[k] = 0.0;
      const int64_t stop = min_of(N, (chunk + 1) * rows);
      for (int64_t r0 = chunk * rows; r0 < stop; r0 += 32) {  // a few rows in T, then on in double
        memset(sums, 0, sizeof(sums));
        for (int64_t r = r0; r < min_of(stop, r0 + 32); ++r) {
          const T* coefs = static_cast<const T*>(call.coefs) + r;
          const T high = coefs[COEF_MAX * N], inv_sum = coefs[COEF_INV_SUM * N];
          if (inv_sum == T(0)) continue;
          const S* z = static_cast<const S*>(call.logits) + row_offset(call, call.logits_strides, r) + k0;
          for (int64_t k = 0; k < n; k += W) {
            const auto v = n - k >= W ? Storage<S>::load(z + k) : load_part(z + k, int(n - k), set1(T(-INF)));
            Storage<T>::store(sums + k, Storage<T>::load(sums + k) + vexp<T>(v - high) * inv_sum);
          }
        }
        for (int64_t k = 0; k < n; ++k) out[k] += double(sums[k]);
      }
    }
  });
  for (int64_t k = 0; k < K; ++k) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial.data[chunk * K + k];
    call.sums[k] = total;
  }
}

template <class S>
double run(const Call& call) {
  if (call.op == Op::COLUMN_SUMS) {
    column_sums<S>(call);
    return 0.0;
  }
  const int64_t N = call.outer * call.inner, K = call.num_classes, num_blocks = ceil_div(K, BLOCK);
  if (K >= SPLIT_ELEMENTS && N < 4 * num_threads() && num_threads() > 1) {
    Scratch<Block> blocks(num_blocks * LANES);
    return Rows<S>(call, blocks.data, nullptr, true).run(0, N);
  }
  // A group's size depends on K alone, so that the order of the sum does not depend on the number of threads.
  const int64_t group = max_of<int64_t>(1, min_of<int64_t>(64, GROUP_ELEMENTS / K / LANES * LANES));
  const int64_t num_groups = ceil_div(N, group);
  Scratch<double> partial(num_groups);
  parallel_for(num_groups, max_of<int64_t>(1, GROUP_ELEMENTS / (group * K)), [&](int64_t begin, int64_t end) {
    Scratch<Block> blocks(num_blocks * LANES);
    const int64_t num_kept = Rows<S>::kept_size(call);
    Scratch<typename Storage<S>::Acc> kept(num_kept);
    Rows<S> rows(call, blocks.data, num_kept ? kept.data : nullptr, false);
    for (int64_t i = begin; i < end; ++i) partial.data[i] = rows.run(i * group, min_of(N, (i + 1) * group));
  });
  double total = 0.0;
  for (int64_t i = 0; i < num_groups; ++i) total += partial.data[i];
  return total;
}

}  // namespace

double rows_entry(const Call& call) {
  return by_storage<half_t, bfloat16_t>(call.dtype, [&](auto s) { return run<typename decltype(s)::type>(call); });
}

}  // namespace ANL_ISA
}  // namespace anl
