// Vectors of the instruction set this file is compiled for (ANL_ISA), on GCC's and Clang's vector extensions.
// Everything lives in a namespace of that name: code for AVX-512 must never be linked into the baseline's functions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "row_math.h"

#define ANL_INLINE inline __attribute__((always_inline))
#define ANL_NOINLINE __attribute__((noinline))  // long, and called from several places: compiled once

#if defined(__AVX512F__)
#define ANL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ANL_VECTOR_BYTES 32
#else
#define ANL_VECTOR_BYTES 16
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both: false alarms in GCC 12's own intrinsics
#endif

namespace anl {
namespace ANL_ISA {

typedef float VecF __attribute__((vector_size(ANL_VECTOR_BYTES)));
typedef int32_t IntF __attribute__((vector_size(ANL_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(ANL_VECTOR_BYTES)));
typedef int64_t IntD __attribute__((vector_size(ANL_VECTOR_BYTES)));
typedef uint16_t Vec16 __attribute__((vector_size(ANL_VECTOR_BYTES / 2)));

template <class To, class From>
ANL_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// Constants of exp and log, and the vector types, by arithmetic type.
template <class T>
struct Traits;

template <>
struct Traits<float> {
  using V = VecF;
  using I = IntF;
  using Int = int32_t;
  static constexpr int width = ANL_VECTOR_BYTES / 4;
  static constexpr int mantissa = 23;
  static constexpr float round_magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float exp_lowest = -87.f, exp_highest = 88.f;
  static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr int32_t one_bits = 0x3f800000, sqrt_half_bits = 0x3f3504f3, mantissa_mask = 0x007fffff;
};

template <>
struct Traits<double> {
  using V = VecD;
  using I = IntD;
  using Int = int64_t;
  static constexpr int width = ANL_VECTOR_BYTES / 8;
  static constexpr int mantissa = 52;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_lowest = -708.0, exp_highest = 709.0;
  static constexpr double ln2_hi = 6.93147180369123816490e-01, ln2_lo = 1.90821492927058770002e-10;
  static constexpr int64_t one_bits = 0x3ff0000000000000, sqrt_half_bits = 0x3fe6a09e667f3bcd,
                           mantissa_mask = 0x000fffffffffffff;
};

template <class T>
ANL_INLINE typename Traits<T>::V set1(T x) {
  return x - typename Traits<T>::V{};
}

// The larger (smaller) of two, lane by lane; with a NaN either may come out.
template <class V>
ANL_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
ANL_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}

// ---- exp, log and their kin: errors of 1 to 2 ulp, NaN in gives NaN out --------------------------------------------

// e^r - 1 - r over r^2 for |r| <= ln(2) / 2.
ANL_INLINE VecF exp_poly(VecF r) {
  VecF y = set1(1.9875691500e-4f) * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  return y * r + 5.0000001201e-1f;
}
ANL_INLINE VecD exp_poly(VecD r) {  // Taylor's coefficients 1/13! ... 1/2!
  VecD y = set1(1.0 / 6227020800.0) * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  return y * r + 0.5;
}

// x = n ln2 + r: gives r and 2^n's exponent bits.
template <class T, class V = typename Traits<T>::V, class I = typename Traits<T>::I>
ANL_INLINE V exp_reduce(V x, I& exponent) {
  using C = Traits<T>;
  const V t = x * T(1.44269504088896340736) + C::round_magic;
  const V n = t - C::round_magic;
  exponent = bit_cast<I>(t) << C::mantissa;
  return (x - n * C::ln2_hi) - n * C::ln2_lo;
}

// exp for x <= exp_highest; 0 below exp_lowest, where the result would leave the normal range.
template <class T, class V = typename Traits<T>::V, class I = typename Traits<T>::I>
ANL_INLINE V vexp(V x) {
  I exponent;
  const V r = exp_reduce<T>(x, exponent);
  const V y = exp_poly(r) * (r * r) + r + T(1);
  const V e = bit_cast<V>(bit_cast<I>(y) + exponent);
  return x < Traits<T>::exp_lowest ? V{} : e;
}

template <class T, class V = typename Traits<T>::V, class I = typename Traits<T>::I>
ANL_INLINE V vexpm1(V x) {
  I exponent;
  const V r = exp_reduce<T>(x, exponent);
  const V q = exp_poly(r) * (r * r) + r;
  const V scale = bit_cast<V>(exponent + Traits<T>::one_bits);
  return x < Traits<T>::exp_lowest ? V{} - T(1) : scale * q + (scale - T(1));
}

// p = e^l and 1 - p, each to full relative accuracy, for l <= 0: one polynomial for both.
template <class T, class V = typename Traits<T>::V, class I = typename Traits<T>::I>
ANL_INLINE V vexp_and_rest(V l, V& rest) {
  I exponent;
  const V r = exp_reduce<T>(l, exponent);
  const V q = exp_poly(r) * (r * r) + r;
  const V scale = bit_cast<V>(exponent + Traits<T>::one_bits);
  const auto tiny = l < Traits<T>::exp_lowest;
  rest = tiny ? V{} + T(1) : vmax((T(1) - scale) - scale * q, V{});
  return tiny ? V{} : scale * q + scale;
}

ANL_INLINE VecF log_poly(VecF z) {
  VecF y = set1(0.24279078841f) * z + 0.28498786688f;
  y = y * z + 0.40000972152f;
  return (y * z + 0.66666662693f) * z;
}
ANL_INLINE VecD log_poly(VecD z) {
  VecD y = set1(1.479819860511658591e-01) * z + 1.531383769920937332e-01;
  y = y * z + 1.818357216161805012e-01;
  y = y * z + 2.222219843214978396e-01;
  y = y * z + 2.857142874366239149e-01;
  y = y * z + 3.999999999940941908e-01;
  return (y * z + 6.666666666666735130e-01) * z;
}

// log of a positive normal number, plus a correction c = (exact x - x) / x, by fdlibm's method.
template <class T, class V = typename Traits<T>::V, class I = typename Traits<T>::I>
ANL_INLINE V vlog_corrected(V x, V c) {
  using C = Traits<T>;
  I bits = bit_cast<I>(x) + (C::one_bits - C::sqrt_half_bits);
  const I k_bits = (bits >> C::mantissa) - (C::one_bits >> C::mantissa);
  const V k = bit_cast<V>(k_bits + bit_cast<typename C::Int>(C::round_magic)) - C::round_magic;
  bits = (bits & C::mantissa_mask) + C::sqrt_half_bits;
  const V f = bit_cast<V>(bits) - T(1);
  const V s = f / (f + T(2));
  const V half_sq = f * f * T(0.5);
  const V R = log_poly(s * s);
  const V y = k * C::ln2_hi - ((half_sq - (s * (half_sq + R) + (k * C::ln2_lo + c))) - f);
  return y + (x - x);
}

template <class T, class V = typename Traits<T>::V>
ANL_INLINE V vlog(V x) {
  return vlog_corrected<T>(x, V{});
}

template <class T, class V = typename Traits<T>::V>
ANL_INLINE V vlog1p(V x) {
  const V u = x + T(1);
  return vlog_corrected<T>(u, (x - (u - T(1))) / u);
}

#if defined(__AVX512F__)
ANL_INLINE VecF vsqrt(VecF x) { return (VecF)_mm512_sqrt_ps((__m512)x); }
ANL_INLINE VecD vsqrt(VecD x) { return (VecD)_mm512_sqrt_pd((__m512d)x); }
#elif defined(__AVX2__)
ANL_INLINE VecF vsqrt(VecF x) { return (VecF)_mm256_sqrt_ps((__m256)x); }
ANL_INLINE VecD vsqrt(VecD x) { return (VecD)_mm256_sqrt_pd((__m256d)x); }
#else
template <class V>
ANL_INLINE V vsqrt(V x) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = sizeof(x[0]) == 4 ? sqrtf(x[i]) : sqrt(x[i]);
  return x;
}
#endif

// ---- row_math.h's policies ------------------------------------------------------------------------------------------

// A vector: of rows, or of a row's classes. A mask is what comparing two vectors gives.
template <class T>
struct LaneMath {
  using V = typename Traits<T>::V;
  using I = typename Traits<T>::I;
  static ANL_INLINE V set(double x) { return set1(T(x)); }
  static ANL_INLINE V exp(V x) { return vexp<T>(x); }
  static ANL_INLINE V expm1(V x) { return vexpm1<T>(x); }
  static ANL_INLINE V log(V x) { return vlog<T>(x); }
  static ANL_INLINE V log1p(V x) { return vlog1p<T>(x); }
  static ANL_INLINE V sqrt(V x) { return vsqrt(x); }
  static ANL_INLINE V divide(V a, V b) { return a / b; }
  static ANL_INLINE V class_exp(V x) { return vexp<T>(x); }
  static ANL_INLINE V class_exp_and_rest(V l, V& rest) { return vexp_and_rest<T>(l, rest); }
  static ANL_INLINE void add_where(I mask, V& sum, V x) { sum += mask ? x : V{}; }
  static ANL_INLINE I negate(I mask) { return ~mask; }
};

// One number: what is known of a row, or of a block of its classes, is merged in it.
struct ScalarMath {
  using V = double;
  static ANL_INLINE V set(double x) { return x; }
  static ANL_INLINE V exp(V x) { return x == 0.0 ? 1.0 : ::exp(x); }  // most rows are one block, which is not rescaled
};

// All lanes of a vector into one number, by halves.
template <class T, int BYTES>
struct Sized;
#define ANL_SIZED(T, BYTES)                             \
  template <>                                           \
  struct Sized<T, BYTES> {                              \
    typedef T V __attribute__((vector_size(BYTES)));    \
    struct Halves {                                     \
      T lo __attribute__((vector_size(BYTES / 2)));     \
      T hi __attribute__((vector_size(BYTES / 2)));     \
    };                                                  \
  };
ANL_SIZED(float, 16)
ANL_SIZED(float, 32)
ANL_SIZED(float, 64)
ANL_SIZED(double, 16)
ANL_SIZED(double, 32)
ANL_SIZED(double, 64)

template <class T, int BYTES = ANL_VECTOR_BYTES, class Combine>
ANL_INLINE T fold_lanes(typename Sized<T, BYTES>::V v, const Combine& combine) {
  if constexpr (BYTES == 16 && sizeof(T) == 8) {
    return combine(v[0], v[1]);
  } else if constexpr (BYTES == 16) {
    return combine(combine(v[0], v[1]), combine(v[2], v[3]));
  } else {
    const auto halves = bit_cast<typename Sized<T, BYTES>::Halves>(v);
    return fold_lanes<T, BYTES / 2>(combine(halves.lo, halves.hi), combine);
  }
}
ANL_INLINE double lane_sum(VecD v) {
  return fold_lanes<double>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
ANL_INLINE double lane_sum(VecF v) {  // in double
  const auto halves = bit_cast<Sized<float, ANL_VECTOR_BYTES>::Halves>(v);
  return lane_sum(__builtin_convertvector(halves.lo, VecD) + __builtin_convertvector(halves.hi, VecD));
}

}  // namespace ANL_ISA
}  // namespace anl
