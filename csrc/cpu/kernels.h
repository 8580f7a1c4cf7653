// What module.cpp asks of the kernels: one entry per traversal and instruction set.
#pragma once

#include "call.h"

namespace anl {

// LOSS returns the sum of the rows' losses, added up in an order that depends on the shape alone.
using KernelEntry = double (*)(const Call&);

struct KernelTable {
  const char* name;
  KernelEntry rows, spatial;
};

// std::bad_alloc that says how many bytes were asked for. Not in the kernels' files, whose code is an instruction set's.
[[noreturn]] void throw_no_memory(int64_t bytes);

// f(begin, end, context) over [0, n) on PyTorch's own threads, never less than `grain` at a time. What f throws comes out
// here once all threads are through; ranges that had not begun by then are left out.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for(int64_t n, int64_t grain, RangeFunction f, void* context);
int num_threads();

template <class F>
ANL_HD void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel_for(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

}  // namespace anl
