// The host's side of csrc/cuda/packed.cuh, name by name; included there.
#pragma once

namespace anl {
namespace gpu {

template <class S, class F>
uint32_t each_half(uint32_t a, uint32_t b, const F& f) {
  return uint32_t(f(uint16_t(a), uint16_t(b))) | uint32_t(f(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}
template <class S>
uint32_t larger2(uint32_t a, uint32_t b) {
  return each_half<S>(a, b, [](uint16_t x, uint16_t y) {
    const float u = widen(S{x}), v = widen(S{y});
    return u != u || v > u ? y : x;
  });
}
template <class S>
uint32_t smaller2(uint32_t a, uint32_t b) {
  return each_half<S>(a, b, [](uint16_t x, uint16_t y) {
    const float u = widen(S{x}), v = widen(S{y});
    return u != u || v < u ? y : x;
  });
}
template <class S>
uint32_t add2(uint32_t a, uint32_t b) {
  return each_half<S>(a, b, [](uint16_t x, uint16_t y) { return narrow<S>(widen(S{x}) + widen(S{y})).bits; });
}
template <class S>
uint32_t above2(uint32_t a, uint32_t bound) {
  return each_half<S>(a, bound, [](uint16_t x, uint16_t y) { return widen(S{x}) > widen(S{y}) ? Format<S>::ONE : uint16_t(0); });
}

// A product's lanes: which number of a diagonal matrix each of them has, so that a wrong one is noticed.
inline uint32_t diagonal(uint16_t factor) { return factor; }
template <class S>
uint32_t halves() {
  return Format<S>::ONE;
}

// Tensor cores add in fixed point: below the last place of the largest addend, bits are cut off. (Fasi, Higham, Mikaitis,
// Pranesh 2021: no more than that is kept on the oldest of them.)
inline float add_in_fixed_point(const double* addends, int n) {
  double largest = 0.0, sum = 0.0;
  for (int i = 0; i < n; ++i) {
    sum += addends[i];
    largest = std::max(largest, std::abs(addends[i]));
  }
  if (largest == 0.0 || !(std::abs(sum) < HUGE_VAL)) return float(sum);
  sum = 0.0;
  const double place = std::exp2(std::ilogb(largest) - 23);
  for (int i = 0; i < n; ++i) sum += std::trunc(addends[i] / place) * place;
  const double end = sum == 0.0 ? 1.0 : std::exp2(std::max(std::ilogb(sum) - 23, -149));
  return float(std::trunc(sum / end) * end);
}

template <class S>
bool all_finite(const uint32_t* words, int n) {
  for (int i = 0; i < 2 * n; ++i)
    if (!(std::abs(widen(S{uint16_t(words[i / 2] >> (i % 2 * 16))})) < HUGE_VALF)) return false;
  return true;
}

// Here a lane notices only what it brought itself that is not finite.
template <class S>
Quad times_diagonal(uint32_t a, uint32_t b, uint32_t diagonal, Quad c) {
  const uint32_t words[2] = {a, b};
  const float factor = widen(S{uint16_t(diagonal)});
  for (int i = 0; i < 4; ++i) {
    const double addends[2] = {double(widen(S{uint16_t(words[i / 2] >> (i % 2 * 16))})) * factor, c.of[i]};
    c.of[i] = all_finite<S>(words, 2) ? add_in_fixed_point(addends, 2) : NAN;
  }
  return c;
}

// The first of the four lanes that have a row of the matrix.
inline unsigned lane_of_four() { return host::lane() / 4 * 4; }

// Here all lanes meet: those of a warp that came apart would be found waiting.
template <class S>
Quad sum_of_eight(const uint32_t* words, uint32_t halves, Quad c) {
  if (halves != Format<S>::ONE) host::fail("a product with another matrix than that of the halves");
  const unsigned votes = __ballot_sync(ALL_LANES, all_finite<S>(words, 4));
  const bool finite = (votes >> lane_of_four() & 15) == 15;
  for (int i = 0; i < 4; ++i) {
    double addends[5] = {c.of[i]};
    for (int j = 0; j < 4; ++j)
      addends[1 + j] = widen(S{uint16_t(words[i / 2 + j / 2 * 2] >> (j % 2 * 16))});
    c.of[i] = finite ? add_in_fixed_point(addends, 5) : NAN;
  }
  return c;
}

}  // namespace gpu
}  // namespace anl
