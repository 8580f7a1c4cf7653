// What module.cpp asks of the kernels: one struct of arguments, one entry a traversal and instruction set.
#pragma once

#include <stdint.h>

#include "row_math.h"

namespace anl {

enum DType : int { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };
enum TargetType : int { INT64, INT32, INT16, UINT8 };
enum class Op : int { LOSS, STATS, GRAD, COLUMN_SUMS };

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
  const void* target;     // one label a row
  TargetType target_type;
  int64_t ignore_index;
  const void* weight;   // by class, null: ones
  double loss_scale;    // what the reduction multiplies each row's gradient with
  void* row_loss;       // LOSS: the rows' losses, or null
  void* coefs;          // LOSS: written, or null; GRAD, COLUMN_SUMS: read
  double* stats;        // STATS: written
  const void* grad_output;
  int64_t grad_output_stride;
  const void* log_q;    // GRAD: entropy term, or null
  const void* entropy_scale;
  double* sums;         // COLUMN_SUMS: (num_classes,), written
  Program program;      // STATS, GRAD: only min_prob, gamma and needs
};

// LOSS returns the sum of the rows' losses, added up in an order that depends on the shape alone.
using KernelEntry = double (*)(const Call&);

struct KernelTable {
  const char* name;
  KernelEntry rows, spatial;
};

// f(begin, end, context) over [0, n) on PyTorch's own threads, never less than `grain` at a time.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context);
int num_threads();

template <class F>
ANL_HD void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel_for(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

ANL_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace anl
