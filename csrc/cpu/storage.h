// Loads and stores: one vector of arithmetic values from and to memory of any dtype.
#pragma once

#include "simd.h"

namespace anl {
namespace ANL_ISA {

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

}  // namespace ANL_ISA
}  // namespace anl
