// Two 16-bit numbers in a word: packed instructions, and tensor cores that widen what is packed.
//
// In a matrix product with a diagonal matrix every element is multiplied by one number, and comes out as float32. The
// fragments of mma.m16n8k8 are such that a lane gets the products of the four numbers it brought, whatever others bring:
// one instruction widens, multiplies and adds. All lanes of a warp call these together. A number that is not finite makes
// NaN of its neighbours' products too: callers leave -inf out.
#pragma once

#include "scalar.cuh"

namespace anl {
namespace gpu {

// Products of the numbers of two words: of the first's lower and upper half, and the second's.
struct Quad {
  float of[4];
};

// A format's bits: 1, and log2(e) as float has it, as the sum of three.
template <class S>
struct Format;
template <>
struct Format<bfloat16_t> {
  static constexpr uint16_t ONE = 0x3f80, LOWEST = 0xff7f, INF = 0x7f80, MINUS_INF = 0xff80, FAR_BELOW = 0xce80,
                            FAR_ABOVE = 0x4e80,  // -2^30 and 2^30
                            LOG2_E[3] = {0x3fb9, 0xbb2c, 0x36ec};
};
template <>
struct Format<half_t> {
  static constexpr uint16_t ONE = 0x3c00, LOWEST = 0xfbff, INF = 0x7c00, MINUS_INF = 0xfc00, FAR_BELOW = 0xfc00,
                            FAR_ABOVE = 0x7c00,
                            LOG2_E[3] = {0x3dc5, 0x0d1e, 0x8002};
};

ANL_DEVICE uint32_t twice(uint16_t bits) { return uint32_t(bits) << 16 | bits; }
template <class S>
ANL_DEVICE float low_half(uint32_t word) {
  return widen(S{uint16_t(word)});
}
template <class S>
ANL_DEVICE float high_half(uint32_t word) {
  return widen(S{uint16_t(word >> 16)});
}

#if !defined(ANL_CUDA_ON_HOST)

#define ANL_PACKED(S, out, instruction, ...)                       \
  if constexpr (std::is_same_v<S, half_t>)                         \
    asm(instruction(f16) : "=r"(out) : __VA_ARGS__);               \
  else                                                             \
    asm(instruction(bf16) : "=r"(out) : __VA_ARGS__)

// Both halves' larger and smaller; of a NaN and a number, the number.
template <class S>
ANL_DEVICE uint32_t larger2(uint32_t a, uint32_t b) {
  uint32_t x;
#define ANL_MAX(format) "max." #format "x2 %0, %1, %2;"
  ANL_PACKED(S, x, ANL_MAX, "r"(a), "r"(b));
#undef ANL_MAX
  return x;
}
template <class S>
ANL_DEVICE uint32_t smaller2(uint32_t a, uint32_t b) {
  uint32_t x;
#define ANL_MIN(format) "min." #format "x2 %0, %1, %2;"
  ANL_PACKED(S, x, ANL_MIN, "r"(a), "r"(b));
#undef ANL_MIN
  return x;
}
// 1 in each half that is above `bound`, 0 in others.
template <class S>
ANL_DEVICE uint32_t above2(uint32_t a, uint32_t bound) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // which has no such instruction for bfloat16
  if constexpr (std::is_same_v<S, bfloat16_t>) {
    const bool low = low_half<S>(a) > low_half<S>(bound), high = high_half<S>(a) > high_half<S>(bound);
    return (low ? Format<S>::ONE : 0u) | (high ? uint32_t(Format<S>::ONE) << 16 : 0u);
  } else
#endif
  {
    uint32_t x;
#define ANL_ABOVE(format) "set.gt." #format "x2." #format "x2 %0, %1, %2;"
    ANL_PACKED(S, x, ANL_ABOVE, "r"(a), "r"(bound));
#undef ANL_ABOVE
    return x;
  }
}
// Both halves' sums.
template <class S>
ANL_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
  uint32_t x;
#define ANL_FMA(format) "fma.rn." #format "x2 %0, %1, %2, %3;"
  ANL_PACKED(S, x, ANL_FMA, "r"(a), "r"(twice(Format<S>::ONE)), "r"(b));
#undef ANL_FMA
  return x;
}
#undef ANL_PACKED

// A lane's part of the diagonal matrix of a number.
ANL_DEVICE uint32_t diagonal(uint16_t factor) {
  const unsigned lane = threadIdx.x % WARP, row = lane % 4 * 2, column = lane / 4;
  return kept((row == column ? factor : 0) | uint32_t(row + 1 == column ? factor : 0) << 16);
}

// The four numbers times that of the diagonal, plus c.
template <class S>
ANL_DEVICE Quad times_diagonal(uint32_t a, uint32_t b, uint32_t diagonal, Quad c) {
  Quad d;
#define ANL_MMA(format)                                                                                              \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." #format "." #format ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, " \
      "%9, %10};"                                                                                                    \
      : "=f"(d.of[0]), "=f"(d.of[1]), "=f"(d.of[2]), "=f"(d.of[3])                                                   \
      : "r"(a), "r"(b), "r"(diagonal), "f"(c.of[0]), "f"(c.of[1]), "f"(c.of[2]), "f"(c.of[3]))
  if constexpr (std::is_same_v<S, half_t>)
    ANL_MMA(f16);
  else
    ANL_MMA(bf16);
#undef ANL_MMA
  return d;
}

// A lane's part of the matrix that adds up both halves of a word.
template <class S>
ANL_DEVICE uint32_t halves() {
  const unsigned lane = threadIdx.x % WARP;
  return kept(lane % 4 == lane / 8 ? twice(Format<S>::ONE) : 0);
}

// Its of[0] + of[2] is the sum of the lane's eight numbers, and of those of c.
template <class S>
ANL_DEVICE Quad sum_of_eight(const uint32_t* words, uint32_t halves, Quad c) {
  Quad d;
#define ANL_MMA(format)                                                                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." #format "." #format ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, " \
      "%8}, {%9, %10, %11, %12};"                                                                                  \
      : "=f"(d.of[0]), "=f"(d.of[1]), "=f"(d.of[2]), "=f"(d.of[3])                                                 \
      : "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(halves), "f"(c.of[0]), "f"(c.of[1]),       \
        "f"(c.of[2]), "f"(c.of[3]))
  if constexpr (std::is_same_v<S, half_t>)
    ANL_MMA(f16);
  else
    ANL_MMA(bf16);
#undef ANL_MMA
  return d;
}

#else
}  // namespace gpu
}  // namespace anl
#include "host_packed.h"
namespace anl {
namespace gpu {
#endif

// One number four times. As the result of a product, so that the compiler keeps four registers: a product can only add
// to four in a row, and copies of one would be made anew for each.
ANL_DEVICE Quad quad(float x) { return times_diagonal<bfloat16_t>(0, 0, 0, {x, x, x, x}); }

// The diagonal matrices whose sum is that of a number: with 3 of them to the last bit of a float, with 2 to 2^-17 of it.
template <int PARTS>
struct Diagonals {
  uint32_t part[PARTS];
};
template <class S, int PARTS>
ANL_DEVICE Quad times_diagonals(uint32_t a, uint32_t b, const Diagonals<PARTS>& factor, Quad c) {
#pragma unroll
  for (const uint32_t part : factor.part) c = times_diagonal<S>(a, b, part, c);
  return c;
}
// log2(e)
template <class S, int PARTS>
ANL_DEVICE Diagonals<PARTS> log2e_diagonals() {
  constexpr uint16_t PART[3] = {Format<S>::LOG2_E[0], Format<S>::LOG2_E[1], Format<S>::LOG2_E[2]};
  Diagonals<PARTS> d;
  d.part[0] = diagonal(PART[0]);
  d.part[1] = diagonal(PART[1]);
  if constexpr (PARTS == 3) d.part[2] = diagonal(PART[2]);
  return d;
}
// What two parts leave of it.
template <class S>
ANL_DEVICE float log2e_rest() {
  constexpr uint16_t LAST = Format<S>::LOG2_E[2];
  return widen(S{LAST});
}
// Any number, as the factor of what above2<S> gives, by products of bfloat16: half precision's 1 is 2^-7 in it.
template <class S, int PARTS>
ANL_DEVICE Diagonals<PARTS> diagonals_of_above(float x) {
  Diagonals<PARTS> d;
  float rest = std::is_same_v<S, half_t> ? x * 128.0f : x;
#pragma unroll
  for (uint32_t& part : d.part) {
    const uint16_t bits = float_to_bfloat16(rest);
    part = diagonal(bits);
    rest -= bfloat16_to_float(bits);
  }
  return d;
}

}  // namespace gpu
}  // namespace anl
