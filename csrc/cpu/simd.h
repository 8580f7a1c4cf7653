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

// The policy of row_math.h over a vector of rows.
template <class T>
struct LaneMath {
  using V = typename Traits<T>::V;
  static ANL_INLINE V set(double x) { return set1(T(x)); }
  static ANL_INLINE V exp(V x) { return vexp<T>(x); }
  static ANL_INLINE V expm1(V x) { return vexpm1<T>(x); }
  static ANL_INLINE V log(V x) { return vlog<T>(x); }
  static ANL_INLINE V log1p(V x) { return vlog1p<T>(x); }
  static ANL_INLINE V sqrt(V x) { return vsqrt(x); }
};

// ---- loads and stores: one vector of arithmetic values from and to memory of any dtype -----------------------------

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <class S>
struct Storage {  // float, double
  using Acc = S;
  using V = typename Traits<S>::V;
  static ANL_INLINE V load(const S* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static ANL_INLINE void store(S* p, V v) { memcpy(p, &v, sizeof(v)); }
};

template <>
struct Storage<bfloat16_t> {
  using Acc = float;
  static ANL_INLINE VecF load(const bfloat16_t* p) {
    Vec16 h;
    memcpy(&h, p, sizeof(h));
    return bit_cast<VecF>(__builtin_convertvector(h, IntF) << 16);
  }
  static ANL_INLINE void store(bfloat16_t* p, VecF v) {  // to nearest, ties to even
    const IntF b = bit_cast<IntF>(v);
    // A NaN stays one: those that arise here have their low bits clear, so the carry cannot run out of them.
    const Vec16 h = __builtin_convertvector((b + ((b >> 16) & 1) + 0x7fff) >> 16, Vec16);
    memcpy(p, &h, sizeof(h));
  }
};

template <>
struct Storage<half_t> {
  using Acc = float;
  static ANL_INLINE VecF load(const half_t* p) {
    Vec16 h;
    memcpy(&h, p, sizeof(h));
#if defined(__AVX512F__)
    return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
    const IntF b = __builtin_convertvector(h, IntF);
    const IntF magnitude = (b & 0x7fff) << 13;
    // 2^112 moves the exponent from half's bias to float's, subnormals included.
    const VecF scaled = bit_cast<VecF>(magnitude) * 5.192296858534828e33f;
    const IntF special = bit_cast<IntF>(scaled) | 0x7f800000;
    const IntF y = (b & 0x7c00) == 0x7c00 ? special : bit_cast<IntF>(scaled);
    return bit_cast<VecF>(y | ((b & 0x8000) << 16));
#endif
  }
  static ANL_INLINE void store(half_t* p, VecF v) {  // to nearest, ties to even
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const IntF b = bit_cast<IntF>(v);
    const IntF sign = (b >> 16) & 0x8000;
    const IntF a = b & 0x7fffffff;
    // Below 2^-14 the sum with 0.5 leaves the rounded subnormal in the low bits.
    const IntF small = bit_cast<IntF>(bit_cast<VecF>(a) + 0.5f) - 0x3f000000;
    const IntF normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    const IntF big = a > 0x7f800000 ? IntF{} + 0x7e00 : IntF{} + 0x7c00;
    const IntF out = a < 0x38800000 ? small : a >= 0x47800000 ? big : normal;
    const Vec16 h = __builtin_convertvector(out | sign, Vec16);
#endif
    memcpy(p, &h, sizeof(h));
  }
};

// The first n lanes from memory (the others `fill`), and back. Nothing past them is touched.
#if defined(__AVX512F__)
ANL_INLINE uint32_t first_lanes(int n) { return (1u << n) - 1u; }
ANL_INLINE VecF load_part(const float* p, int n, VecF fill) {
  return (VecF)_mm512_mask_loadu_ps((__m512)fill, __mmask16(first_lanes(n)), p);
}
ANL_INLINE VecD load_part(const double* p, int n, VecD fill) {
  return (VecD)_mm512_mask_loadu_pd((__m512d)fill, __mmask8(first_lanes(n)), p);
}
template <class S>
ANL_INLINE VecF load_part(const S* p, int n, VecF fill) {
  S bits[16];
  _mm256_storeu_si256((__m256i*)bits, _mm256_maskz_loadu_epi16(__mmask16(first_lanes(n)), p));
  return (VecF)_mm512_mask_mov_ps((__m512)fill, __mmask16(first_lanes(n)), (__m512)Storage<S>::load(bits));
}
ANL_INLINE void store_part(float* p, int n, VecF v) {
  _mm512_mask_storeu_ps(p, __mmask16(first_lanes(n)), (__m512)v);
}
ANL_INLINE void store_part(double* p, int n, VecD v) {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), (__m512d)v);
}
template <class S>
ANL_INLINE void store_part(S* p, int n, VecF v) {
  S bits[16];
  Storage<S>::store(bits, v);
  _mm256_mask_storeu_epi16(p, __mmask16(first_lanes(n)), _mm256_loadu_si256((const __m256i*)bits));
}
#else
template <class S, class V>
ANL_INLINE V load_part(const S* p, int n, V fill) {
  constexpr int width = Traits<typename Storage<S>::Acc>::width;
  S buffer[width];
  Storage<S>::store(buffer, fill);
  memcpy(buffer, p, n * sizeof(S));
  return Storage<S>::load(buffer);
}
template <class S, class V>
ANL_INLINE void store_part(S* p, int n, V v) {
  constexpr int width = Traits<typename Storage<S>::Acc>::width;
  S buffer[width];
  Storage<S>::store(buffer, v);
  memcpy(p, buffer, n * sizeof(S));
}
#endif

ANL_INLINE float load_one(const float* p) { return *p; }
ANL_INLINE double load_one(const double* p) { return *p; }
ANL_INLINE float load_one(const bfloat16_t* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }
template <class S>
ANL_INLINE typename Storage<S>::Acc load_one(const S* p) {
  S buffer[Traits<typename Storage<S>::Acc>::width] = {};
  buffer[0] = *p;
  return Storage<S>::load(buffer)[0];
}
ANL_INLINE void store_one(float* p, float x) { *p = x; }
ANL_INLINE void store_one(double* p, double x) { *p = x; }
template <class S>
ANL_INLINE void store_one(S* p, typename Storage<S>::Acc x) {
  S buffer[Traits<typename Storage<S>::Acc>::width];
  Storage<S>::store(buffer, set1(x));
  *p = buffer[0];
}

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
ANL_INLINE double lane_sum(IntF v) { return lane_sum(__builtin_convertvector(v, VecF)); }
ANL_INLINE double lane_sum(IntD v) { return lane_sum(__builtin_convertvector(v, VecD)); }

}  // namespace ANL_ISA
}  // namespace anl
