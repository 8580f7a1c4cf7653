// What a row's label asks for and what is written of a row: weights, losses, coefficients, statistics, unread rows.
#pragma once

#include "kernels.h"
#include "row.cuh"
#include "row_gradient.cuh"
#include "tickets.cuh"

namespace anl {
namespace gpu {

// ---- labels --------------------------------------------------------------------------------------------------------

enum class Label { LIVE, IGNORED, BAD };  // BAD: outside [0, K), its row is NaN

ANL_DEVICE Label label_kind(const Call& call, int64_t y) {
  if (y == call.ignore_index) return Label::IGNORED;
  return is_class(call, y) ? Label::LIVE : Label::BAD;
}

// The row's weight in the loss; 1 where the label is bad, so that the others' denominator is a number.
template <class T>
ANL_DEVICE T row_weight(const Call& call, int64_t y, Label kind) {
  if (kind == Label::IGNORED) return T(0);
  return call.weight && kind == Label::LIVE ? static_cast<const T*>(call.weight)[y] : T(1);
}

// ---- the loss of all rows -------------------------------------------------------------------------------------------

// What the rows' gradients and the sum of losses are divided by. All threads of every CTA call this, before they read
// anything else that launch_prepare writes.
template <class T>
ANL_DEVICE double loss_denominator(const Params& p) {
  if (p.reduction != MEAN || p.call.op != Op::LOSS) return 1.0;
  double sum = 0.0;
  if (p.weight_parts) {
    wait_for_previous_launch();
#pragma unroll
    for (int i = 0; i < WEIGHT_PARTS / WARP; ++i) sum += p.weight_parts[i * WARP + lane_index()];
    return warp_reduce(sum, Add<double>());
  }
  ANL_STATIC_SHARED(double[WARP], shared);
  for (int64_t r = threadIdx.x; r < p.num_rows; r += blockDim.x) {
    const int64_t y = label_at(p.call, r);
    sum += double(row_weight<T>(p.call, y, label_kind(p.call, y)));
  }
  return block_reduce(sum, Add<double>(), shared);
}

// The loss from its parts, added up in a fixed order by one CTA. The GPU idles meanwhile: so all loads of a turn are under
// way at once.
template <class T>
ANL_DEVICE void add_loss_parts(const Params& p, double denominator) {
  constexpr int AT_ONCE = 16;
  ANL_STATIC_SHARED(double[WARP], shared);
  double sum = 0.0;
  for (int64_t first = threadIdx.x / WARP * AT_ONCE * WARP; first < p.plan.loss_parts; first += AT_ONCE * blockDim.x) {
    const double* parts = p.loss_parts + first + lane_index();
    const int64_t left = p.plan.loss_parts - first - lane_index();
    double part[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) part[i] = i * WARP < left ? parts[i * WARP] : 0.0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i += 4) sum += (part[i] + part[i + 1]) + (part[i + 2] + part[i + 3]);
  }
  sum = block_reduce(sum, Add<double>(), shared);
  if (threadIdx.x == 0) *static_cast<T*>(p.loss) = T(sum * inverse(denominator));
}

// The CTA's sum of losses (thread 0 has it) into the call's: the CTA that comes last adds the parts up, or launch_finish.
// All threads of the CTA call this.
template <class T>
ANL_DEVICE void finish_loss(const Params& p, int64_t part, double sum, double denominator) {
  if (!p.loss) return;
  const int64_t parts = p.plan.loss_parts;
  if (parts == 1) {
    if (threadIdx.x == 0) *static_cast<T*>(p.loss) = T(sum * inverse(denominator));
  } else if (!p.loss_ticket) {
    if (threadIdx.x == 0) p.loss_parts[part] = sum;
  } else {
    ANL_STATIC_SHARED(unsigned, last);
    __syncthreads();  // between two parts that one CTA brings
    if (threadIdx.x == 0) {
      p.loss_parts[part] = sum;
      last = arrive_at(p.loss_ticket, p.mark) == unsigned(parts - 1);
      if (last) give_back(p.loss_ticket);
    }
    __syncthreads();
    if (last) add_loss_parts<T>(p, denominator);
  }
}

// ---- rows that are read ------------------------------------------------------------------------------------------------

// Row r of the coefficients (NUM_COEFS, N).
template <class T>
ANL_DEVICE void write_coefs(const Params& p, int64_t r, const T (&coefs)[NUM_COEFS]) {
  T* out = static_cast<T*>(p.call.grad_coefs) + r;
#pragma unroll
  for (int i = 0; i < NUM_COEFS; ++i) out[i * p.num_rows] = coefs[i];
}

// The weighted loss of a live row, and its gradient, of which the loss of all rows has the part grad_scale: 1 / denominator.
// Only the thread with `writes` writes what is kept of them.
template <class T, bool FULL>
ANL_DEVICE T finish_row(const Params& p, int64_t r, const Row<T>& row, T weight, double grad_scale, bool writes,
                        RowGradient<T, FULL>& gradient) {
  using M = Scalar<T>;
  const Program& program = p.call.program;
  T coefs[NUM_COEFS];
  const T loss = evaluate<M, FULL>(program, row.stats, coefs) * weight;
  const T scale = p.call.weight ? T(double(weight) * grad_scale) : T(grad_scale);
#pragma unroll
  for (int i = COEF_A; i <= COEF_TARGET; ++i) coefs[i] *= scale;
  coefs[COEF_MAX] = row.max;
  coefs[COEF_INV_SUM] = row.inv_sum;
  coefs[COEF_LOG_SUM] = row.stats.log_sum;
  gradient = RowGradient<T, FULL>::of_coefs(program, coefs, T(1));
  if (writes) {
    if (p.call.row_loss) static_cast<T*>(p.call.row_loss)[r] = loss;
    if (p.call.grad_coefs) write_coefs(p, r, coefs);
  }
  return loss;
}

// STATS: row r of the table, by one thread. In double: what is 1 minus a small sum, or differs from another by one, has to
// keep the small part.
template <bool FULL, class T>
ANL_DEVICE void write_statistics(const Params& p, int64_t r, const Row<T>& row) {
  using Wide = Scalar<double>;
  double fields[NUM_STATS];
  all_statistics<Wide, FULL>(p.call.program, row.stats.template as<Wide>(), double(row.max), fields);
#pragma unroll
  for (int i = 0; i < NUM_STATS; ++i) p.call.stats[i * p.num_rows + r] = fields[i];
}

// ---- rows that are not read: ignored ones are 0, those with a bad label NaN ----------------------------------------------

template <class T>
ANL_DEVICE T unread_value(Label kind) {
  return kind == Label::IGNORED ? T(0) : T(NOT_A_NUMBER);
}

// By one thread: all but the gradient, which the kernel writes, unread_value everywhere. Returns the row's loss.
template <class T>
ANL_DEVICE T write_unread_row(const Params& p, int64_t r, Label kind) {
  const T value = unread_value<T>(kind);
  if (p.call.op == Op::STATS) {
#pragma unroll 1
    for (int i = 0; i < NUM_STATS; ++i)
      p.call.stats[i * p.num_rows + r] = kind == Label::IGNORED ? p.ignored[i] : i == STAT_VALID ? 1.0 : NOT_A_NUMBER;
    return value;
  }
  if (p.call.row_loss) static_cast<T*>(p.call.row_loss)[r] = value;
  if (p.call.grad_coefs) {
    T* coefs = static_cast<T*>(p.call.grad_coefs) + r;
#pragma unroll 1
    for (int i = 0; i < NUM_COEFS; ++i) coefs[i * p.num_rows] = i == COEF_INV_SUM ? value : T(0);
  }
  return value;
}

// ---- any row -------------------------------------------------------------------------------------------------------------

// Finishes a row. Only the thread with `writes` returns its loss; padding rows write nothing.
template <class T, bool FULL>
ANL_DEVICE T finish_any_row(const Params& p, int64_t r, int64_t y, Label kind, const Row<T>& row, double grad_scale,
                            bool writes, RowGradient<T, FULL>& gradient) {
  const bool live = kind == Label::LIVE;
  gradient = RowGradient<T, FULL>::constant(unread_value<T>(kind));
  if (live && p.call.op != Op::STATS) {
    const T loss = finish_row<T, FULL>(p, r, row, row_weight<T>(p.call, y, kind), grad_scale, writes, gradient);
    return writes ? loss : T(0);
  }
  if (!writes) return T(0);
  if (!live) return write_unread_row<T>(p, r, kind);
  write_statistics<FULL>(p, r, row);
  return T(0);
}

// What the backward pass is given of a row. All of it is on its way before any is used.
template <class T>
struct GivenRow {
  T coefs[NUM_COEFS], grad_output;
  int64_t label;

  ANL_DEVICE GivenRow() {}
  ANL_DEVICE GivenRow(const Params& p, int64_t r) {
    set_all_but_coefs(p.call, r);
#pragma unroll
    for (int i = 0; i < NUM_COEFS; ++i) coefs[i] = coefs_of(p, r)[i * p.num_rows];
  }
  ANL_DEVICE void set_all_but_coefs(const Call& call, int64_t r) {
    label = label_at(call, r);
    grad_output = static_cast<const T*>(call.grad_output)[r * call.grad_output_stride];
  }
  static ANL_DEVICE const T* coefs_of(const Params& p, int64_t r) { return static_cast<const T*>(p.call.grad_coefs) + r; }
};

// And what follows from that. EAGER: of unread rows as well, or the compiler loads most coefficients only once it knows.
template <class T, bool FULL, bool EAGER = false>
struct KnownRow {
  RowGradient<T, FULL> gradient;
  T inv_sum;
  bool unread;    // ignored, or NaN: its logits may be anything
  int64_t label;  // or -1, where the row has no target

  ANL_DEVICE KnownRow(const Call& call, const GivenRow<T>& given) {
    inv_sum = given.coefs[COEF_INV_SUM];
    unread = !(inv_sum > T(0));
    label = !unread && is_class(call, given.label) ? given.label : -1;
    if (EAGER || !unread) gradient = RowGradient<T, FULL>::of_coefs(call.program, given.coefs, given.grad_output);
    if (unread) gradient = RowGradient<T, FULL>::constant(inv_sum);
  }
};

}  // namespace gpu
}  // namespace anl
