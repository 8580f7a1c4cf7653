// Any strides: (N, K, d1, ...), transposed matrices, and rows of few classes. Lanes run across rows ("pixels").
//
// Every sweep runs over a tile in scratch memory, which ends up holding the gradient. Rows of the tile never meet: a
// vector is so many rows, and all of a row's mathematics, the loss included, is done in its lane.
#include "tile.h"

namespace anl {
namespace ANL_ISA {
namespace {

constexpr int64_t TASK_ELEMENTS = 32 << 10;  // a thread gets at least about as many logits
constexpr int SUM_CLASSES = 16;  // summed plainly, then added to the row's compensated sum

// Sums of many classes: what each addition rounds off is added up too.
template <class V, int SIZE>
struct CompensatedSums {
  V sum[SIZE] = {}, lost[SIZE] = {};

  // Adds a part, which starts anew.
  ANL_INLINE void take(V (&part)[SIZE]) {
#pragma GCC unroll 16
    for (int i = 0; i < SIZE; ++i) {
      const V next = sum[i] + part[i];
      lost[i] += (sum[i] - next) + part[i];
      sum[i] = next;
      part[i] = V{};
    }
  }
  ANL_INLINE void totals(V (&out)[SIZE]) const {
#pragma GCC unroll 16
    for (int i = 0; i < SIZE; ++i) out[i] = sum[i] + (lost[i] == lost[i] ? lost[i] : V{});  // NaN: the sum overflows
  }
};

template <class T>
class Tiles {
  using M = LaneMath<T>;
  using V = typename M::V;
  using I = typename M::I;
  using Int = typename Traits<T>::Int;
  static constexpr int W = Traits<T>::width;
  static constexpr Int IGNORED = -1, NO_CLASS = -2;  // labels: see load_labels

 public:
  Tiles(const Call& call, T* scratch)
      : call_(call), prog_(call.program), K_(call.num_classes), num_rows_(call.outer * call.inner),
        tile_{K_, Tile<T>::width_for(K_), scratch} {}

  // Pixels [i, i + n) of outer index o; the sum of their losses, or (COLUMN_SUMS) adds their p_ij to sums.
  double run(int64_t o, int64_t i, int n, double* sums) {
    as_stored([&](auto stored) {
      using S = typename decltype(stored)::type;
      const Strides& from = call_.logits_strides;
      tile_.load(static_cast<const S*>(call_.logits) + o * from.so + i * from.si, from, n);
    });
    double total = 0.0;
    for (int u = 0; u < n; u += W) {
      column_ = tile_.data + u;
      row_ = o * call_.inner + i + u;
      n_ = min_of(W, n - u);
      switch (call_.op) {
        case Op::COLUMN_SUMS: add_columns(sums); break;
        case Op::GRAD: gradient_from_coefs(); break;
        case Op::SLICE_STATS: slice_sums(); break;
        default: total += forward();
      }
    }
    if (!call_.grad) return total;
    as_stored([&](auto stored) {
      using S = typename decltype(stored)::type;
      const Strides& to = call_.grad_strides;
      tile_.store(static_cast<S*>(call_.grad) + o * to.so + i * to.si, to, n);
    });
    return total;
  }

 private:
  // f(Stored<S>()) for the type of the logits, which T is the arithmetic type of.
  template <class F>
  void as_stored(const F& f) const {
    by_storage<half_t, bfloat16_t>(call_.dtype, [&](auto stored) {
      if constexpr (std::is_same_v<typename Storage<typename decltype(stored)::type>::Acc, T>) f(stored);
    });
  }
  V at(int64_t k) const { return Storage<T>::load(column_ + k * tile_.width); }
  void put(int64_t k, V v) const { Storage<T>::store(column_ + k * tile_.width, v); }
  V load_field(const void* table, int field) const {
    return load_part(static_cast<const T*>(table) + field * num_rows_ + row_, n_, V{});
  }

  // Labels: IGNORED where the row is ignored (or not there); the logits of such lanes become zeros, whatever they were.
  // NO_CLASS where the target is none of these: SLICE_STATS, or a label that makes its row NaN.
  I load_labels() const {
    I y;
    bool dead = false;
    for (int j = 0; j < W; ++j) {
      const int64_t label = j < n_ ? label_at(call_, row_ + j) : call_.ignore_index;
      const bool live = j < n_ && label != call_.ignore_index;
      y[j] = !live ? IGNORED : !is_class(call_, label) ? NO_CLASS : Int(label);
      dead |= !live;
    }
    if (dead) clear(y == IGNORED);
    return y;
  }
  void clear(I dead) const {
    for (int64_t k = 0; k < K_; ++k) put(k, dead ? V{} : at(k));
  }

  static bool any(I mask) {
    Int x = 0;
    for (int j = 0; j < W; ++j) x |= mask[j];
    return x != 0;
  }

  // Compensated sums over all classes of what f(part, k) adds to part.
  template <class Sums, class F>
  ANL_INLINE void sum_classes(Sums& out, const F& f) const {
    CompensatedSums<V, Sums::SIZE> sums;
    Sums part = {};
    for (int64_t k0 = 0; k0 < K_; k0 += SUM_CLASSES) {
      const int64_t stop = min_of(K_, k0 + SUM_CLASSES);
      for (int64_t k = k0; k < stop; ++k) f(part, k);
      sums.take(part.of);
    }
    sums.totals(out.of);
  }

  struct First {
    V max, min, x_y;
    bool missing;  // some class does not exist for some row
    FirstSums<M, true> sums;
  };

  template <bool MASKED, bool FULL>
  ANL_INLINE void exp_sums(I y, First& f) const {
    // No class exists: -inf - -inf would be NaN.
    const V anchor = MASKED ? (f.max == T(-INF) ? V{} : f.max) : f.max;
    FirstSums<M, FULL> sums;
    sum_classes(sums, [&](FirstSums<M, FULL>& part, int64_t k) __attribute__((always_inline)) {
      const V x = at(k) - anchor, e = M::class_exp(x);
      const auto target = y == Int(k);
      f.x_y = target ? x : f.x_y;
      if (MASKED)
        part.template add<true>(target ? set1(T(-INF)) : x, target ? V{} : e);
      else
        part.template add<false>(target ? V{} : x, target ? V{} : e);  // zeros change no sum
    });
    for (int j = 0; j < sums.SIZE; ++j) f.sums.of[j] = sums.of[j];
    if (!MASKED) f.sums.of[COUNT] = y < 0 ? set1(T(K_)) : set1(T(K_ - 1));
  }

  ANL_NOINLINE First first_sums(I y) const {
    First f;
    f.max = f.min = at(0);
    f.x_y = f.sums.of[SQUARES] = V{};
    for (int64_t k = 1; k < K_; ++k) {
      const V v = at(k);
      f.max = vmax(v, f.max);
      f.min = vmin(v, f.min);
    }
    f.missing = any(f.min == T(-INF));
    by_first_sums<T>(call_, [&](auto full) {
      if (f.missing)
        exp_sums<true, full.value>(y, f);
      else
        exp_sums<false, full.value>(y, f);
    });
    return f;
  }

  ANL_NOINLINE SecondSums<M, true> second_sums(I y, V max, const SecondSweep<M>& sweep) const {
    SecondSums<M, true> sums;
    sums.clear_focal();
    by_second_sums(prog_, [&](auto mass, auto focal) {
      SecondSums<M, focal.value> found;
      sum_classes(found, [&](SecondSums<M, focal.value>& part, int64_t k) __attribute__((always_inline)) {
        const V x = y == Int(k) ? set1(T(-INF)) : at(k) - max;
        sweep.template add_as<mass.value, focal.value>(part, x);
      });
      for (int j = 0; j < found.SIZE; ++j) sums.of[j] = found.of[j];
    });
    return sums;
  }

  // f(j, sums of row j, in double) for every row.
  template <int SIZE, class F>
  void each_row(const V (&sums)[SIZE], const F& f) const {
    for (int j = 0; j < n_; ++j) {
      double row[SIZE];
      for (int i = 0; i < SIZE; ++i) row[i] = double(sums[i][j]);
      f(j, row);
    }
  }

  // The sums of rows whose other classes lie elsewhere.
  void slice_sums() const {
    const I y = load_labels();
    if (!call_.lse) {
      const First f = first_sums(y);
      return each_row(f.sums.of, [&](int j, const auto& sums) { write_slice_first(call_, row_ + j, f.max[j], sums); });
    }
    V max = {}, log_sum = {};
    for (int j = 0; j < n_; ++j) {
      max[j] = T(call_.lse[row_ + j]);
      log_sum[j] = T(call_.lse[num_rows_ + row_ + j]);
    }
    const V inv_sum = vexp<T>(-log_sum);
    const auto found = second_sums(y, max, SecondSweep<M>::of_row(prog_, log_sum));
    each_row(found.of, [&](int j, const auto& sums) {
      write_slice_second(call_, row_ + j, sums, needs_focal(prog_) ? 1.0 : double(inv_sum[j]));
    });
  }

  // Statistics, and 1 over the sum of exp(z_j - max), NaN in a NaN row.
  RowStatistics<M> statistics(I y, const First& f, V& inv_sum) const {
    RowStatistics<M> s;
    // NaN and +inf leave a NaN gap; a row whose target does not exist is NaN by definition.
    const V gap = f.sums.of[GAP];
    const I bad = (gap != gap) | (f.x_y == T(-INF)) | (f.x_y != f.x_y) | (y == NO_CLASS);
    set_first_sums(s, bad ? set1(T(NaN)) : f.x_y, f.sums.of);
    inv_sum = vexp<T>(-s.log_sum) + (s.log_sum - s.log_sum);
    if (!needs_second(prog_)) return s;
    const auto sweep = SecondSweep<M>::of_row(prog_, s.log_sum);
    SecondSums<M, true> second;
    if (sweep.focal || any(f.min - f.max <= sweep.threshold)) {
      second = second_sums(y, f.max, sweep);
    } else {
      second.set_all_above(f.sums.of[COUNT], f.sums.of[GAP], -sweep.threshold);
      second.clear_focal();
    }
    set_second_sums(s, second.of, sweep.focal ? set1(T(1)) : inv_sum);
    return s;
  }

  double forward() {
    const I y = load_labels(), live = y != IGNORED;
    const First f = first_sums(y);
    V inv_sum;
    const RowStatistics<M> s = statistics(y, f, inv_sum);
    if (call_.op == Op::STATS) {
      write_statistics(y, f.max, s);
      return 0.0;
    }
    V weight = {}, coefs[NUM_COEFS];
    for (int j = 0; j < n_; ++j) weight[j] = y[j] < 0 ? T(1) : T(class_weight(call_, y[j]));
    V loss = loss_of<M>(prog_, s, coefs);
    loss = live ? loss * weight : V{};
    const V scale = weight * T(call_.loss_scale);
    for (int j = COEF_A; j <= COEF_TARGET; ++j) coefs[j] = live ? coefs[j] * scale : V{};
    coefs[COEF_MAX] = f.max;
    coefs[COEF_INV_SUM] = live ? inv_sum : V{};
    coefs[COEF_LOG_SUM] = s.log_sum;
    if (call_.row_loss) store_part(static_cast<T*>(call_.row_loss) + row_, n_, loss);
    for (int j = 0; j < NUM_COEFS && call_.grad_coefs; ++j)
      store_part(static_cast<T*>(call_.grad_coefs) + j * num_rows_ + row_, n_, coefs[j]);
    if (call_.grad) write_gradient(y, coefs, set1(T(1)), f.missing);
    return lane_sum(loss);
  }

  void gradient_from_coefs() const {
    const I y = load_labels();
    V coefs[NUM_COEFS], factor = {};
    for (int j = 0; j < NUM_COEFS; ++j) coefs[j] = load_field(call_.grad_coefs, j);
    for (int j = 0; j < n_; ++j) factor[j] = T(grad_output(call_, row_ + j));
    const I live = coefs[COEF_INV_SUM] != T(0), bad = live & (y == NO_CLASS);
    if (any(~live)) clear(~live);
    factor = live ? factor : V{};
    for (int j = COEF_A; j <= COEF_TARGET; ++j) coefs[j] = live ? coefs[j] : V{};
    coefs[COEF_INV_SUM] = bad ? set1(T(NaN)) : coefs[COEF_INV_SUM];
    write_gradient(y, coefs, factor, true);
    if (call_.log_q && any(~live)) clear(~live);  // log_q may be NaN: no row was valid
  }

  void write_gradient(I y, const V (&coefs)[NUM_COEFS], V factor, bool missing) const {
    const V norm = needs_focal(prog_) ? set1(T(1)) : coefs[COEF_INV_SUM];
    const auto row = gradient_row<M>(prog_, coefs, factor, norm);
    if (call_.log_q) return entropy_gradient(y, row, coefs, norm);
    const auto nothing = [](int64_t) __attribute__((always_inline)) { return V{}; };
    by_gradient_parts<T>(call_, missing, [&](auto parts) {
      each_gradient<parts.value>(y, coefs[COEF_MAX], row, row.target, nothing);
    });
  }

  // extra_slope(k): read with EXTRA_SLOPE.
  template <unsigned PARTS, class Extra>
  ANL_NOINLINE void each_gradient(I y, V max, const GradientRow<M>& row, V target, const Extra& extra_slope) const {
    for (int64_t k = 0; k < K_; ++k) {
      const V x = at(k) - max, e = PARTS & FOCAL_OFFSET ? V{} : M::class_exp(x);
      put(k, y == Int(k) ? target : row.template at<PARTS>(x, e, extra_slope(k)));
    }
  }

  struct Moments {  // sums of exp(z_k - max), and of the same times log_q_k - center
    static constexpr int SIZE = 2;
    V of[SIZE];
  };

  // sum_k p_k (log_q_k - center).
  V mean_log_q(V max, const T* log_q, V center) const {
    Moments moments;
    sum_classes(moments, [&](Moments& part, int64_t k) __attribute__((always_inline)) {
      const V e = M::class_exp(at(k) - max);
      part.of[0] += e;
      part.of[1] += e * (log_q[k] - center);
    });
    return moments.of[1] / moments.of[0];
  }

  void entropy_gradient(I y, const GradientRow<M>& row, const V (&coefs)[NUM_COEFS], V norm) const {
    const T* log_q = static_cast<const T*>(call_.log_q);
    const V max = coefs[COEF_MAX], scale = set1(T(entropy_scale(call_)));
    // The mean is taken about (nearly) itself, so that its digits do not cancel.
    const V center = mean_log_q(max, log_q, V{}), lost = mean_log_q(max, log_q, center);
    V x_y = max - max, log_q_y = {};
    for (int j = 0; j < n_; ++j) {
      if (y[j] < 0) continue;
      x_y[j] = column_[y[j] * tile_.width + j] - max[j];
      log_q_y[j] = log_q[y[j]];
    }
    const V p_y = vexp<T>(x_y) * coefs[COEF_INV_SUM];
    const V target = row.target + scale * p_y * ((log_q_y - center) - lost);
    const auto slope = [&](int64_t k) __attribute__((always_inline)) {
      return scale * norm * ((log_q[k] - center) - lost);
    };
    by_gradient_parts<T>(call_, true, [&](auto parts) {
      each_gradient<parts.value | CLAMPED | EXTRA_SLOPE>(y, max, row, target, slope);
    });
  }

  void write_statistics(I y, V max, const RowStatistics<M>& s) const {
    V values[NUM_STATS];
    statistics_of<M>(prog_, s, max, values);
    each_row(values, [&](int j, const auto& fields) {
      if (y[j] == IGNORED)
        write_unread_statistics(call_, row_ + j, true);
      else
        write_fields(call_, row_ + j, fields);
    });
  }

  void add_columns(double* sums) const {
    const V inv_sum = load_field(call_.grad_coefs, COEF_INV_SUM), max = load_field(call_.grad_coefs, COEF_MAX);
    const I dead = inv_sum == T(0);
    for (int64_t k = 0; k < K_; ++k) sums[k] += lane_sum(dead ? V{} : vexp<T>(at(k) - max) * inv_sum);
  }

  const Call& call_;
  const Program& prog_;
  const int64_t K_, num_rows_;
  const Tile<T> tile_;
  T* column_ = nullptr;  // the current vector of rows
  int64_t row_ = 0;      // its first row
  int n_ = 0;            // how many of its lanes are rows
};

template <class T>
double run(const Call& call) {
  const int64_t K = call.num_classes, width = Tile<T>::width_for(K), per_outer = ceil_div(call.inner, width);
  const int64_t num_tiles = call.outer * per_outer;
  const bool columns = call.op == Op::COLUMN_SUMS;
  // Tasks are tiles, or for column sums a fixed number of runs of tiles, so that no order depends on the threads.
  const int64_t run_length = columns ? ceil_div(num_tiles, 16) : 1, num_tasks = ceil_div(num_tiles, run_length);
  const int64_t grain = max_of<int64_t>(1, TASK_ELEMENTS / (run_length * width * K));
  Scratch<double> partial(columns ? num_tasks * K : num_tasks);
  parallel_for(num_tasks, grain, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(K * width);
    Tiles<T> tiles(call, scratch.data);
    for (int64_t task = begin; task < end; ++task) {
      double* sums = columns ? partial.data + task * K : nullptr;
      for (int64_t k = 0; k < K && columns; ++k) sums[k] = 0.0;
      double total = 0.0;
      for (int64_t t = task * run_length; t < min_of(num_tiles, (task + 1) * run_length); ++t) {
        const int64_t i = t % per_outer * width;
        total += tiles.run(t / per_outer, i, int(min_of(width, call.inner - i)), sums);
      }
      if (!columns) partial.data[task] = total;
    }
  });
  double total = 0.0;
  for (int64_t task = 0; task < num_tasks && !columns; ++task) total += partial.data[task];
  for (int64_t k = 0; k < K && columns; ++k) {
    call.sums[k] = 0.0;
    for (int64_t task = 0; task < num_tasks; ++task) call.sums[k] += partial.data[task * K + k];
  }
  return total;
}

}  // namespace

double spatial_entry(const Call& call) {
  return call.dtype == FLOAT64 ? run<double>(call) : run<float>(call);
}

}  // namespace ANL_ISA
}  // namespace anl
