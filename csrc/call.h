// What a compiled module's Python functions ask of its kernels: one struct of arguments for every operation.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "terms.h"

namespace anl {

enum DType : int { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
enum TargetType : int { INT64, INT32, INT16, UINT8 };
enum Reduction : int { NONE, MEAN, SUM };
enum class Op : int { LOSS, STATS, GRAD, COLUMN_SUMS, SLICE_STATS };

// SLICE_STATS: what the sweeps over some of a row's classes find, the target left out; its label is outside [0, K) where
// it lies elsewhere. Without lse the largest logit and the FirstSums about it, with lse the SecondSums, masses as p_j.
constexpr int SLICE_MAX = 0, SLICE_FIRST_SUMS = 1, NUM_SLICE_FIRST = SLICE_FIRST_SUMS + NUM_FIRST_SUMS;

// Class k of row (o, i) is data[o * so + k * sk + i * si].
struct Strides {
  int64_t so, sk, si;
};

struct Call {
  Op op;
  DType dtype;
  int64_t outer, num_classes, inner;  // rows: outer * inner
  const void* logits;
  Strides logits_strides;
  void* grad;  // null: not wanted
  Strides grad_strides;
  const void* target;     // one label per row
  TargetType target_type;
  int64_t ignore_index;
  const void* weight;   // one per class; null: ones
  double loss_scale;    // what the reduction multiplies each row's gradient with
  void* row_loss;       // LOSS: the rows' losses, or null
  void* grad_coefs;     // LOSS: written, or null; GRAD, COLUMN_SUMS: read
  double* stats;        // STATS, SLICE_STATS: written
  const double* lse;    // SLICE_STATS: max and log sum exp(z - max) of the whole rows, or null
  const void* grad_output;
  int64_t grad_output_stride;
  const void* log_q;    // GRAD: entropy term, or null
  const void* entropy_scale;
  double* sums;         // COLUMN_SUMS: (num_classes,), written
  Program program;      // STATS, SLICE_STATS, GRAD: only min_prob, gamma and needs
};

inline bool classes_are_adjacent(const Call& call) {
  return call.logits_strides.sk == 1 && (!call.grad || call.grad_strides.sk == 1);
}

template <class S>
struct Stored {
  using type = S;
};

// f(Stored<S>()) for the type S that holds a stored number; H and B are float16's and bfloat16's.
template <class H, class B, class F>
auto by_storage(DType dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f(Stored<float>());
    case FLOAT64: return f(Stored<double>());
    case FLOAT16: return f(Stored<H>());
    default: return f(Stored<B>());
  }
}

// Where no GPU was seen, full kernels alone are compiled, which write the same to rounding.
#if defined(ANL_FULL_KERNELS_ALONE)
constexpr bool HAS_LEAN_KERNELS = false;
#else
constexpr bool HAS_LEAN_KERNELS = true;
#endif

// Whether a call takes the kernels that make what few losses read. Float64 always does: fewer to compile.
inline bool takes_full(const Call& call) {
  return !HAS_LEAN_KERNELS || call.dtype == FLOAT64 || needs_full(call.program);
}

// f(Stored<S>(), FULL) for the kernel that a call takes.
template <class H, class B, class F>
auto by_variant(const Call& call, F f) {
  return by_storage<H, B>(call.dtype, [&](auto s) {
    if constexpr (HAS_LEAN_KERNELS && !std::is_same_v<decltype(s), Stored<double>>)
      if (!takes_full(call)) return f(s, std::false_type());
    return f(s, std::true_type());
  });
}

inline int64_t logit_bytes(const Call& call) { return call.dtype == FLOAT64 ? 8 : call.dtype == FLOAT32 ? 4 : 2; }

// Numbers that go with the rows are of the arithmetic type: float64 with such logits, else float32.
inline int64_t real_bytes(const Call& call) { return call.dtype == FLOAT64 ? 8 : 4; }
inline double real_at(const Call& call, const void* table, int64_t i) {
  return call.dtype == FLOAT64 ? static_cast<const double*>(table)[i] : double(static_cast<const float*>(table)[i]);
}
inline void set_real(const Call& call, void* table, int64_t i, double value) {
  if (call.dtype == FLOAT64)
    static_cast<double*>(table)[i] = value;
  else
    static_cast<float*>(table)[i] = float(value);
}

ANL_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is read here may be something else when it is read again: another thread can write labels during a call. Hence
// volatile on the CPU: the value that is looked at is the value that is used.
#if defined(__CUDACC__)
#define ANL_READ_ONCE
#else
#define ANL_READ_ONCE volatile
#endif
ANL_HD int64_t label_at(const Call& call, int64_t r) {
  switch (call.target_type) {
    case INT64: return static_cast<const ANL_READ_ONCE int64_t*>(call.target)[r];
    case INT32: return static_cast<const ANL_READ_ONCE int32_t*>(call.target)[r];
    case INT16: return static_cast<const ANL_READ_ONCE int16_t*>(call.target)[r];
    default: return static_cast<const ANL_READ_ONCE uint8_t*>(call.target)[r];
  }
}

ANL_HD bool is_class(const Call& call, int64_t y) { return uint64_t(y) < uint64_t(call.num_classes); }

// Row r = o * inner + i begins here. Divisions are slow, and most calls have one outer index.
ANL_HD int64_t row_offset(const Call& call, const Strides& s, int64_t r) {
  return call.outer == 1 ? r * s.si : r / call.inner * s.so + r % call.inner * s.si;
}

}  // namespace anl
