// Small things both traversals need: labels, scratch memory, scalars of the arithmetic type.
#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "storage.h"

namespace anl {
namespace ANL_ISA {
namespace {

constexpr double INF = __builtin_inf();
constexpr double NaN = __builtin_nan("");

template <auto VALUE>
struct Constant {
  static constexpr auto value = VALUE;
};

// ---- loops over classes are compiled for what a loss needs of them; the rest of a traversal only once ----

// f(Constant<FULL>()) for the FirstSums that a loss needs.
template <class T, class F>
ANL_INLINE void by_first_sums(const Call& call, const F& f) {
  if constexpr (sizeof(T) < sizeof(double))
    if (!takes_full(call)) return f(Constant<false>());
  f(Constant<true>());
}

// f(Constant<MASS>(), Constant<FOCAL>()) for the sums of add_as that a loss needs.
template <class F>
ANL_INLINE void by_second_sums(const Program& prog, const F& f) {
  if (needs_focal(prog)) return f(Constant<true>(), Constant<true>());
  if (needs_mass(prog)) return f(Constant<true>(), Constant<false>());
  f(Constant<false>(), Constant<false>());
}

// The GradientParts that a loss needs, of rows whose classes may be missing.
ANL_INLINE unsigned gradient_parts(const Call& call) {
  if (needs_focal(call.program)) return FOCAL_PARTS;
  if (takes_full(call)) return FULL_PARTS;
  return needs_second(call.program) ? LEAN_PARTS : LEAN_PARTS & ~unsigned(CLAMPED);
}

// f(Constant<PARTS>()) for them. Only lean loops are compiled without missing classes, where there are none.
template <class T, class F>
ANL_INLINE void by_gradient_parts(const Call& call, bool missing, const F& f) {
  constexpr unsigned LEAN = LEAN_PARTS, PLAIN = LEAN_PARTS & ~unsigned(CLAMPED), MISSING = MISSING_CLASSES;
  const unsigned parts = gradient_parts(call);
  if (parts == FOCAL_PARTS) return f(Constant<FOCAL_PARTS>());
  if constexpr (sizeof(T) < sizeof(double)) {
    if (parts == LEAN) return missing ? f(Constant<LEAN>()) : f(Constant<LEAN & ~MISSING>());
    if (parts == PLAIN) return missing ? f(Constant<PLAIN>()) : f(Constant<PLAIN & ~MISSING>());
  }
  f(Constant<FULL_PARTS>());
}

ANL_INLINE double class_weight(const Call& call, int64_t y) {
  return call.weight ? real_at(call, call.weight, y) : 1.0;
}
ANL_INLINE double grad_output(const Call& call, int64_t r) {
  return real_at(call, call.grad_output, r * call.grad_output_stride);
}
ANL_INLINE double entropy_scale(const Call& call) { return call.log_q ? real_at(call, call.entropy_scale, 0) : 0.0; }

// Uninitialised memory for trivially copyable things, freed at the end of the scope. Throws if there is none.
template <class X>
struct Scratch {
  X* data;
  explicit Scratch(int64_t n) : data(nullptr) {
    const size_t bytes = size_t(n > 0 ? n : 1) * sizeof(X);
    if (posix_memalign(reinterpret_cast<void**>(&data), 64, bytes)) throw_no_memory(int64_t(bytes));
  }
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

template <class T>
ANL_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
ANL_INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}

// The long formulas of a row, compiled once per arithmetic, not in every kernel that needs them.
template <class M>
ANL_NOINLINE typename M::V loss_of(const Program& prog, const RowStatistics<M>& s, typename M::V (&coefs)[NUM_COEFS]) {
  return evaluate<M>(prog, s, coefs);
}
template <class M>
ANL_NOINLINE void statistics_of(const Program& prog, const RowStatistics<M>& s, typename M::V max,
                                typename M::V (&out)[NUM_STATS]) {
  all_statistics<M>(prog, s, max, out);
}

// Fields of row r into the table of statistics.
template <int FIELDS>
ANL_INLINE void write_fields(const Call& call, int64_t r, const double (&fields)[FIELDS]) {
  const int64_t num_rows = call.outer * call.inner;
  for (int i = 0; i < FIELDS; ++i) call.stats[i * num_rows + r] = fields[i];
}

// The statistics of a row that is not read: ignored, or NaN because its label is no class.
ANL_INLINE void write_unread_statistics(const Call& call, int64_t r, bool ignored) {
  double fields[NUM_STATS];
  ignored_statistics(double(call.num_classes), call.program, fields);
  for (int i = 0; i < NUM_STATS && !ignored; ++i) fields[i] = i == STAT_VALID ? 1.0 : NaN;
  write_fields(call, r, fields);
}

// SLICE_STATS of row r. Sums that a lean kernel leaves out are 0.
template <int SIZE>
ANL_INLINE void write_slice_first(const Call& call, int64_t r, double max, const double (&sums)[SIZE]) {
  double fields[NUM_SLICE_FIRST] = {};
  fields[SLICE_MAX] = max;
  for (int i = 0; i < SIZE; ++i) fields[SLICE_FIRST_SUMS + i] = sums[i];
  write_fields(call, r, fields);
}
template <int SIZE>
ANL_INLINE void write_slice_second(const Call& call, int64_t r, const double (&sums)[SIZE], double mass_scale) {
  double fields[NUM_SECOND_SUMS] = {};
  for (int i = 0; i < SIZE; ++i) fields[i] = sums[i];
  fields[BELOW_MASS] *= mass_scale;
  write_fields(call, r, fields);
}

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
