// Two floats at a time: on sm_100 and later one instruction is for both. The results are the same bits everywhere.
#pragma once

#include "primitives.cuh"

namespace anl {
namespace gpu {

struct Two {
  float of[2];
};

// a * b + c
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
ANL_DEVICE Two fma2(Two a, Two b, Two c) {
  Two d;
  asm("{.reg .b64 a, b, c; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mov.b64 c, {%6, %7};"
      "fma.rn.f32x2 c, a, b, c; mov.b64 {%0, %1}, c;}"
      : "=f"(d.of[0]), "=f"(d.of[1])
      : "f"(a.of[0]), "f"(a.of[1]), "f"(b.of[0]), "f"(b.of[1]), "f"(c.of[0]), "f"(c.of[1]));
  return d;
}
ANL_DEVICE Two add2(Two a, Two b) {
  Two d;
  asm("{.reg .b64 a, b; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; add.rn.f32x2 a, a, b; mov.b64 {%0, %1}, a;}"
      : "=f"(d.of[0]), "=f"(d.of[1])
      : "f"(a.of[0]), "f"(a.of[1]), "f"(b.of[0]), "f"(b.of[1]));
  return d;
}
#else
ANL_DEVICE Two fma2(Two a, Two b, Two c) {
  return {fmaf(a.of[0], b.of[0], c.of[0]), fmaf(a.of[1], b.of[1], c.of[1])};
}
ANL_DEVICE Two add2(Two a, Two b) { return {a.of[0] + b.of[0], a.of[1] + b.of[1]}; }
#endif

// By pairs, in a fixed order.
template <int E>
ANL_DEVICE float sum_of(const float (&x)[E]) {
  if constexpr (E % 2) {
    float sum = x[0];
#pragma unroll
    for (int j = 1; j < E; ++j) sum += x[j];
    return sum;
  } else {
    Two sum = {x[0], x[1]};
#pragma unroll
    for (int j = 2; j < E; j += 2) sum = add2(sum, {x[j], x[j + 1]});
    return sum.of[0] + sum.of[1];
  }
}

}  // namespace gpu
}  // namespace anl
