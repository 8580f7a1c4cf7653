// Counters that CTAs share, in memory that nobody has zeroed: no launch before the kernel is needed.
//
// A word belongs to a call once its upper bits are the call's mark, a number that no other call has; its lower bits
// count. Whoever meets other bits there begins the word anew, and all that come later go on from that. What was there
// before is arbitrary, and the mark itself by chance once in 2^47 times. When all have come the word is given back: a
// graph runs a captured call again, with the same mark.
#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace anl {
namespace gpu {

// Whether it was this thread that made the word the call's own, counting from 0.
ANL_DEVICE bool claim_word(uint64_t* word, uint64_t mark) {
  const uint64_t seen = load_alone(word);
  return (seen ^ mark) >> COUNT_BITS && exchange_alone(word, seen, mark) == seen;
}

// How many have come before, fewer than MOST_COUNTED. What they did before is seen.
ANL_DEVICE unsigned arrive_at(uint64_t* word, uint64_t mark) {
  claim_word(word, mark);
  return unsigned(add_acq_rel(word, 1) - mark);
}

ANL_DEVICE void give_back(uint64_t* word) { *word = 0; }  // no call's mark

// All threads of every CTA call this before the first ticket is taken: whoever comes first zeroes the tickets.
ANL_DEVICE void zero_tickets(uint64_t* claim, uint64_t mark, unsigned* tickets, int64_t count) {
  ANL_STATIC_SHARED(bool, is_first);
  if (threadIdx.x == 0) is_first = claim_word(claim, mark);
  __syncthreads();
  if (is_first) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) tickets[i] = 0;
    __syncthreads();
    if (threadIdx.x == 0) store_release(claim, mark + 1);
  } else if (threadIdx.x == 0) {  // who takes tickets
    while (load_acquire(claim) != mark + 1) wait_a_little();
  }
}

}  // namespace gpu
}  // namespace anl
