// Any strides: (N, K, d1, ...), transposed matrices, and rows of few classes. Lanes run across rows ("pixels").
//
// A tile of pixels is copied, converted, into scratch memory that the caches hold, [class][pixel]; every later sweep
// runs over the scratch, which ends up holding the gradient. Rows of the tile never meet: a vector is so many rows, and
// all of a row's mathematics, the loss included, is done in its lane.
#include "common.h"

namespace anl {
namespace ANL_ISA {
namespace {

constexpr int64_t TILE_BYTES = 192 << 10;
constexpr int64_t TILE_VECTORS = 16;
constexpr int64_t TASK_ELEMENTS = 32 << 10;
constexpr int SUM_CLASSES = 16;  // summed plainly, then added to the row's compensated sum

template <class S>
class Tiles {
  using T = typename Storage<S>::Acc;
  using M = LaneMath<T>;
  using V = typename Traits<T>::V;
  using I = typename Traits<T>::I;
  static constexpr int W = Traits<T>::width;

 public:
  static int64_t tile_width(int64_t K) {
    return W * max_of<int64_t>(1, min_of<int64_t>(TILE_VECTORS, TILE_BYTES / (K * W * int64_t(sizeof(T)))));
  }

  Tiles(const Call& call, T* scratch)
      : call_(call), prog_(call.program), K_(call.num_classes), num_rows_(call.outer * call.inner),
        width_(tile_width(K_)), scratch_(scratch) {}

  // Pixels [i, i + n) of outer index o; the sum of their losses, or (COLUMN_SUMS) adds their p_ij to sums.
  double run(int64_t o, int64_t i, int n, double* sums) {
    load(static_cast<const S*>(call_.logits) + o * call_.logits_strides.so + i * call_.logits_strides.si, n);
    double total = 0.0;
    for (int u = 0; u < n; u += W) {
      s_ = scratch_ + u;
      row_ = o * call_.inner + i + u;
      n_ = min_of(W, n - u);
      if (call_.op == Op::COLUMN_SUMS)
        add_columns(sums);
      else
        total += call_.op == Op::GRAD ? from_coefs() : call_.op == Op::SLICE_STATS ? slice_sums() : forward();
    }
    if (call_.grad)
      store(static_cast<S*>(call_.grad) + o * call_.grad_strides.so + i * call_.grad_strides.si, n);
    return total;
  }

 private:
  V at(int64_t k) const { return Storage<T>::load(s_ + k * width_); }
  void put(int64_t k, V v) const { Storage<T>::store(s_ + k * width_, v); }

  // Logits into scratch; lanes past the last pixel hold zeros.
  void load(const S* z, int n) const {
    const int64_t sk = call_.logits_strides.sk, si = call_.logits_strides.si;
    const int whole = n / W * W;
    for (int64_t k = 0; k < K_ && si == 1; ++k) {
      T* out = scratch_ + k * width_;
      for (int j = 0; j < whole; j += W) Storage<T>::store(out + j, Storage<S>::load(z + k * sk + j));
      if (whole < n) Storage<T>::store(out + whole, load_part(z + k * sk + whole, n - whole, V{}));
    }
    if (si == 1) return;
    for (int64_t k = 0; k < K_ && whole < n; ++k) Storage<T>::store(scratch_ + k * width_ + whole, V{});
    for (int j = 0; j < n; ++j) {
      const S* row = z + j * si;
      T* out = scratch_ + j;
      for (int64_t k = 0; k < K_; k += W) {
        T values[W];
        const int m = int(min_of<int64_t>(W, K_ - k));
        if (sk == 1) {
          Storage<T>::store(values, m == W ? Storage<S>::load(row + k) : load_part(row + k, m, V{}));
        } else {
          for (int t = 0; t < m; ++t) values[t] = load_one(row + (k + t) * sk);
        }
        for (int t = 0; t < m; ++t) out[(k + t) * width_] = values[t];
      }
    }
  }

  void store(S* g, int n) const {
    const int64_t sk = call_.grad_strides.sk, si = call_.grad_strides.si;
    const int whole = n / W * W;
    for (int64_t k = 0; k < K_ && si == 1; ++k) {
      const T* in = scratch_ + k * width_;
      for (int j = 0; j < whole; j += W) Storage<S>::store(g + k * sk + j, Storage<T>::load(in + j));
      if (whole < n) store_part(g + k * sk + whole, n - whole, Storage<T>::load(in + whole));
    }
    if (si == 1) return;
    for (int j = 0; j < n; ++j) {
      const T* in = scratch_ + j;
      for (int64_t k = 0; k < K_; k += W) {
        T values[W];
        S bits[W];
        const int m = int(min_of<int64_t>(W, K_ - k));
        for (int t = 0; t < m; ++t) values[t] = in[(k + t) * width_];
        for (int t = m; t < W; ++t) values[t] = T(0);
        Storage<S>::store(bits, Storage<T>::load(values));
        if (sk == 1) {
          memcpy(g + j * si + k, bits, m * sizeof(S));
        } else {
          for (int t = 0; t < m; ++t) g[j * si + (k + t) * sk] = bits[t];
        }
      }
    }
  }

  // Labels, -1 where the row is ignored (or not there); the logits of such lanes become zeros, whatever they were.
  // A target that is no class of these is -2: SLICE_STATS, or a label that makes its row NaN.
  I load_labels() const {
    I y;
    bool dead = false;
    for (int j = 0; j < W; ++j) {
      const int64_t label = j < n_ ? label_at(call_, row_ + j) : call_.ignore_index;
      const bool live = j < n_ && label != call_.ignore_index;
      y[j] = !live ? -1 : !is_class(call_, label) ? -2 : typename Traits<T>::Int(label);
      dead |= !live;
    }
    if (dead) clear(y == -1);
    return y;
  }
  void clear(I dead) const {
    for (int64_t k = 0; k < K_; ++k) put(k, dead ? V{} : at(k));
  }

  static bool any(I mask) {
    typename Traits<T>::Int x = 0;
    for (int j = 0; j < W; ++j) x |= mask[j];
    return x != 0;
  }

  // total += part by compensated summation; part starts anew.
  static ANL_INLINE void add(V& total, V& lost, V& part) {
    const V sum = total + part;
    lost += (total - sum) + part;
    total = sum;
    part = V{};
  }

  // f(k) over all classes, and fold() after every SUM_CLASSES of them.
  template <class F, class Fold>
  ANL_INLINE void each_class(const F& f, const Fold& fold) const {
    for (int64_t k0 = 0; k0 < K_; k0 += SUM_CLASSES) {
      const int64_t stop = min_of(K_, k0 + SUM_CLASSES);
      for (int64_t k = k0; k < stop; ++k) f(k);
      fold();
    }
  }

  struct First {
    V max, x_y, tail, gap, count;
    bool missing;  // some class does not exist for some row
    V min;
  };

  template <bool MASKED>
  ANL_INLINE void exp_sums(I y, First& f) const {
    V tail = {}, gap = {}, missing = {}, tail_part = {}, gap_part = {}, tail_lost = {}, gap_lost = {};
    each_class(
        [&](int64_t k) __attribute__((always_inline)) {
          const V v = at(k), x = v - f.max;
          const auto target = y == typename Traits<T>::Int(k);
          tail_part += target ? V{} : vexp<T>(x);
          f.x_y = target ? x : f.x_y;
          if (MASKED) {
            const auto absent = v == T(-INF);
            gap_part -= (absent | target) ? V{} : x;
            missing += absent ? V{} + T(1) : V{};
          } else {
            gap_part -= target ? V{} : x;
          }
        },
        [&]() __attribute__((always_inline)) {
          add(tail, tail_lost, tail_part);
          add(gap, gap_lost, gap_part);
        });
    f.tail = tail + tail_lost;
    f.gap = gap + (gap_lost == gap_lost ? gap_lost : V{});  // inf - inf where the gap itself overflows
    f.count = T(K_ - 1) - missing;
  }

  First first_sums(I y) const {
    First f = {};
    f.max = f.min = at(0);
    for (int64_t k = 1; k < K_; ++k) {
      const V v = at(k);
      f.max = vmax(v, f.max);
      f.min = vmin(v, f.min);
    }
    f.missing = any(f.min == T(-INF));
    if (!f.missing) {
      exp_sums<false>(y, f);
      return f;
    }
    const V high = f.max;
    f.max = high == T(-INF) ? V{} : high;  // no class exists: -inf - -inf would be NaN
    exp_sums<true>(y, f);
    f.max = high;
    return f;
  }

  // The sums of rows whose other classes lie elsewhere.
  double slice_sums() const {
    const I y = load_labels();
    if (!call_.lse) {
      const First f = first_sums(y);
      const V values[NUM_SLICE_FIRST] = {f.max, f.tail, f.gap, f.count + (y == -2 ? V{} + T(1) : V{})};
      write_slice(values);
      return 0.0;
    }
    First f = {};
    RowStatistics<M> s = {};
    for (int j = 0; j < n_; ++j) {
      f.max[j] = T(call_.lse[row_ + j]);
      s.log_sum[j] = T(call_.lse[num_rows_ + row_ + j]);
    }
    const V inv_sum = vexp<T>(-s.log_sum);
    if (prog_.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE)) {
      second_sums<true>(y, f, inv_sum, s);
    } else {
      second_sums<false>(y, f, inv_sum, s);
    }
    const V values[NUM_SLICE_SECOND] = {s.above_sum,    s.above_count,     s.below_mass,        s.focal_sum,
                                        s.focal_weight, s.focal_above_sum, s.focal_above_weight};
    write_slice(values);
    return 0.0;
  }

  template <int FIELDS>
  void write_slice(const V (&values)[FIELDS]) const {
    for (int i = 0; i < FIELDS; ++i)
      for (int j = 0; j < n_; ++j) call_.stats[i * num_rows_ + row_ + j] = double(values[i][j]);
  }

  First first_sweep(I y) const {
    First f = first_sums(y);
    // NaN and +inf leave a NaN gap; a row whose target does not exist is NaN by definition.
    const I bad = (f.gap != f.gap) | (f.x_y == T(-INF)) | (f.x_y != f.x_y) | (y == -2);
    f.x_y = bad ? set1(T(NaN)) : f.x_y;
    f.tail = bad ? set1(T(NaN)) : f.tail;
    return f;
  }

  template <bool FOCAL>
  ANL_INLINE void second_sums(I y, const First& f, V inv_sum, RowStatistics<M>& s) const {
    const V floor = T(prog_.log_floor_neg) - s.log_sum;
    V part[6] = {}, lost[6] = {};
    V* total[6] = {&s.above_sum, &s.below_mass, &s.focal_sum, &s.focal_weight, &s.focal_above_sum, &s.focal_above_weight};
    V count = {};
    for (V* t : total) *t = V{};
    each_class(
        [&](int64_t k) __attribute__((always_inline)) {
          const V v = at(k), x = v - f.max;
          const auto above = x > -floor;
          const auto other = y != typename Traits<T>::Int(k), counted = above & other, rest = ~above & other;
          part[0] += counted ? x + floor : V{};
          part[1] += rest ? vexp<T>(x) * inv_sum : V{};
          count += counted ? V{} + T(1) : V{};
          if (FOCAL) {
            const V l = x - s.log_sum;
            V others;
            vexp_and_rest<T>(l, others);
            const V w = focal_weight<M>(others, prog_.gamma);
            const auto exists = other & (v != T(-INF));
            part[2] -= exists ? w * l : V{};
            part[3] += exists ? w : V{};
            part[4] += counted ? w * l + T(prog_.focal_floor) : V{};
            part[5] += counted ? w : V{};
          }
        },
        [&]() __attribute__((always_inline)) {
#pragma GCC unroll 6
          for (int j = 0; j < 6; ++j) add(*total[j], lost[j], part[j]);
        });
    for (int j = 0; j < 6; ++j) *total[j] += lost[j] == lost[j] ? lost[j] : V{};
    s.above_count = count;
  }

  RowStatistics<M> statistics(I y, First& f, V& inv_sum) const {
    RowStatistics<M> s;
    target_statistics<M>(s, f.x_y, f.tail);
    s.classes = f.count;
    s.neg_log_sum = f.count * s.log_sum + f.gap;
    inv_sum = vexp<T>(-s.log_sum);
    inv_sum = s.log_sum != s.log_sum ? set1(T(NaN)) : inv_sum;
    const T clamp = T(prog_.log_floor_neg);
    const bool focal = prog_.needs & (NEED_FOCAL | NEED_FOCAL_ABOVE);
    s.focal_sum = s.focal_weight = s.focal_above_sum = s.focal_above_weight = V{} + T(1);
    if (focal) {
      second_sums<true>(y, f, inv_sum, s);
    } else if (prog_.needs && any(f.min - f.max <= s.log_sum - clamp)) {
      second_sums<false>(y, f, inv_sum, s);
    } else {  // every class above the clamp: closed form
      s.above_count = f.count;
      s.above_sum = f.count * clamp - s.neg_log_sum;
      s.below_mass = V{};
    }
    return s;
  }

  double forward() {
    const I y = load_labels();
    First f = first_sweep(y);
    V inv_sum;
    const RowStatistics<M> s = statistics(y, f, inv_sum);
    if (call_.op == Op::STATS) {
      write_statistics(y, f, s);
      return 0.0;
    }
    Coefficients<M> g;
    const I live = y != -1;
    V weight = {};
    for (int j = 0; j < n_; ++j) weight[j] = y[j] < 0 ? T(1) : T(class_weight<T>(call_, y[j]));
    V loss = evaluate<M>(prog_, s, g);
    loss = live ? loss * weight : V{};
    const V scale = weight * T(call_.loss_scale);
    V* fields[7] = {&g.a, &g.b, &g.a_above, &g.c, &g.bw, &g.cw, &g.target};
    for (V* x : fields) *x = live ? *x * scale : V{};
    if (call_.row_loss) store_part(static_cast<T*>(call_.row_loss) + row_, n_, loss);
    if (call_.coefs) {
      const V values[NUM_COEFS] = {f.max, live ? inv_sum : V{}, g.a,      g.b,        g.a_above,
                                   g.c,   g.bw,                  g.cw,     g.target,   s.log_sum};
      for (int j = 0; j < NUM_COEFS; ++j)
        store_part(static_cast<T*>(call_.coefs) + j * num_rows_ + row_, n_, values[j]);
    }
    if (call_.grad) gradient(y, f.max, s.log_sum, inv_sum, g, prog_.needs, f.missing, nullptr);
    return lane_sum(loss);
  }

  double from_coefs() {
    I y = load_labels();
    V x[NUM_COEFS], go = {};
    for (int j = 0; j < NUM_COEFS; ++j)
      x[j] = load_part(static_cast<const T*>(call_.coefs) + j * num_rows_ + row_, n_, V{});
    for (int j = 0; j < n_; ++j) go[j] = T(grad_output<T>(call_, row_ + j));
    const I live = x[COEF_INV_SUM] != T(0);
    if (any(~live)) clear(~live);
    Coefficients<M> g;
    V* fields[7] = {&g.a, &g.b, &g.a_above, &g.c, &g.bw, &g.cw, &g.target};
    for (int j = 0; j < 7; ++j) *fields[j] = live ? x[COEF_A + j] * go : V{};
    const I bad = live & (y == -2);
    g.target = bad ? set1(T(NaN)) : g.target;
    x[COEF_INV_SUM] = bad ? set1(T(NaN)) : x[COEF_INV_SUM];
    gradient(y, x[COEF_MAX], x[COEF_LOG_SUM], x[COEF_INV_SUM], g, prog_.needs, true, static_cast<const T*>(call_.log_q));
    if (call_.log_q && any(~live)) clear(~live);  // log_q may be NaN: no row was valid
    return 0.0;
  }

  // sum_k p_k (log_q_k - center): twice, so that the mean is taken about (nearly) itself and its digits do not cancel.
  V mean_log_q(V high, const T* log_q, V center) const {
    V mass = {}, moment = {}, mass_part = {}, moment_part = {}, mass_lost = {}, moment_lost = {};
    each_class(
        [&](int64_t k) __attribute__((always_inline)) {
          const V e = vexp<T>(at(k) - high);
          mass_part += e;
          moment_part += e * (log_q[k] - center);
        },
        [&]() __attribute__((always_inline)) {
          add(mass, mass_lost, mass_part);
          add(moment, moment_lost, moment_part);
        });
    return (moment + moment_lost) / (mass + mass_lost);
  }

  template <bool ABOVE, bool FOCAL, bool ENTROPY>
  ANL_INLINE void gradient_classes(I y, V high, V log_sum, V inv_sum, const Coefficients<M>& g, bool masked,
                                   const T* log_q) const {
    V slope0 = g.a * inv_sum, slope1 = g.a_above * inv_sum, q_scale = {}, center = {}, lost = {},
      target = g.target;
    if (ENTROPY) {
      q_scale = T(entropy_scale<T>(call_)) * inv_sum;
      lost = mean_log_q(high, log_q, center);
      center += lost;
      lost = mean_log_q(high, log_q, center);
      for (int64_t k = 0; k < K_; ++k)
        target += y == typename Traits<T>::Int(k) ? q_scale * vexp<T>(at(k) - high) * ((log_q[k] - center) - lost) : V{};
    }
    const V thr = log_sum - T(prog_.log_floor_neg), zero = target - target;
    for (int64_t k = 0; k < K_; ++k) {
      const V v = at(k), x = v - high;
      const auto above = x > thr;
      V slope = slope0, offset = g.b;
      if (ABOVE) {
        slope = above ? slope1 : slope;
        offset += above ? g.c : V{};
      }
      if (ENTROPY) slope += q_scale * ((log_q[k] - center) - lost);
      if (FOCAL) {
        V others;
        vexp_and_rest<T>(x - log_sum, others);
        offset += (above ? g.bw + g.cw : g.bw) * focal_weight<M>(others, prog_.gamma);
      }
      V out = vexp<T>(x) * slope + offset;
      if (masked) out = v == T(-INF) ? zero : out;
      put(k, y == typename Traits<T>::Int(k) ? target : out);
    }
  }

  void gradient(I y, V high, V log_sum, V inv_sum, const Coefficients<M>& g, unsigned needs, bool masked,
                const T* log_q) const {
    const bool focal = needs & (NEED_FOCAL | NEED_FOCAL_ABOVE);
    if (log_q)
      gradient_classes<true, true, true>(y, high, log_sum, inv_sum, g, masked, log_q);
    else if (focal)
      gradient_classes<true, true, false>(y, high, log_sum, inv_sum, g, masked, log_q);
    else if (needs)
      gradient_classes<true, false, false>(y, high, log_sum, inv_sum, g, masked, log_q);
    else
      gradient_classes<false, false, false>(y, high, log_sum, inv_sum, g, masked, log_q);
  }

  void write_statistics(I y, const First& f, const RowStatistics<M>& s) const {
    V values[NUM_STATS];
    all_statistics<M>(prog_, s, f.max, values);
    for (int j = 0; j < n_; ++j) {
      if (y[j] == -1) {
        write_ignored_statistics(call_, row_ + j, num_rows_);
        continue;
      }
      for (int i = 0; i < NUM_STATS; ++i) call_.stats[i * num_rows_ + row_ + j] = double(values[i][j]);
    }
  }

  void add_columns(double* sums) const {
    const T* coefs = static_cast<const T*>(call_.coefs) + row_;
    const V inv_sum = load_part(coefs + COEF_INV_SUM * num_rows_, n_, V{});
    const V high = load_part(coefs + COEF_MAX * num_rows_, n_, V{});
    const I dead = inv_sum == T(0);
    for (int64_t k = 0; k < K_; ++k) sums[k] += lane_sum(dead ? V{} : vexp<T>(at(k) - high) * inv_sum);
  }

  const Call& call_;
  const Program& prog_;
  const int64_t K_, num_rows_, width_;
  T* scratch_;
  T* s_ = nullptr;   // the current vector of rows
  int64_t row_ = 0;  // its first row
  int n_ = 0;        // how many of its lanes are rows
};

template <class S>
double run(const Call& call) {
  using T = typename Storage<S>::Acc;
  const int64_t K = call.num_classes, width = Tiles<S>::tile_width(K), per_outer = ceil_div(call.inner, width);
  const int64_t num_tiles = call.outer * per_outer;
  const bool columns = call.op == Op::COLUMN_SUMS;
  // Tasks are tiles, or for column sums a fixed number of runs of tiles, so that no order depends on the threads.
  const int64_t run_length = columns ? ceil_div(num_tiles, 16) : 1, num_tasks = ceil_div(num_tiles, run_length);
  Scratch<double> partial(columns ? num_tasks * K : num_tasks);
  parallel_for(num_tasks, max_of<int64_t>(1, TASK_ELEMENTS / (run_length * width * K)), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(K * width);
    Tiles<S> tiles(call, scratch.data);
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
  return by_storage<half_t, bfloat16_t>(call.dtype, [&](auto s) { return run<typename decltype(s)::type>(call); });
}

}  // namespace ANL_ISA
}  // namespace anl
