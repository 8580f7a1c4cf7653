// A tile of rows in scratch memory that the caches hold, [class][row], in the arithmetic type.
#pragma once

#include "common.h"

namespace anl {
namespace ANL_ISA {
namespace {

template <class T>
struct Tile {
  using V = typename Traits<T>::V;
  static constexpr int W = Traits<T>::width;
  static constexpr int64_t BYTES = 192 << 10, MAX_VECTORS = 16;

  const int64_t num_classes, width;
  T* const data;

  // How many rows a tile holds: whole vectors of them.
  static int64_t width_for(int64_t K) {
    return W * max_of<int64_t>(1, min_of<int64_t>(MAX_VECTORS, BYTES / (K * W * int64_t(sizeof(T)))));
  }

  // Logits of n rows; lanes past the last row hold zeros.
  template <class S>
  ANL_NOINLINE void load(const S* z, const Strides& strides, int n) const {
    const int64_t sk = strides.sk, si = strides.si;
    const int whole = n / W * W;
    for (int64_t k = 0; k < num_classes && si == 1; ++k) {
      T* out = data + k * width;
      for (int j = 0; j < whole; j += W) Storage<T>::store(out + j, Storage<S>::load(z + k * sk + j));
      if (whole < n) Storage<T>::store(out + whole, load_part(z + k * sk + whole, n - whole, V{}));
    }
    if (si == 1) return;
    for (int64_t k = 0; k < num_classes && whole < n; ++k) Storage<T>::store(data + k * width + whole, V{});
    for (int j = 0; j < n; ++j) {
      const S* row = z + j * si;
      T* out = data + j;
      for (int64_t k = 0; k < num_classes; k += W) {
        T values[W];
        const int m = int(min_of<int64_t>(W, num_classes - k));
        if (sk == 1) {
          Storage<T>::store(values, m == W ? Storage<S>::load(row + k) : load_part(row + k, m, V{}));
        } else {
          for (int t = 0; t < m; ++t) values[t] = load_one(row + (k + t) * sk);
        }
        for (int t = 0; t < m; ++t) out[(k + t) * width] = values[t];
      }
    }
  }

  // The gradient of n rows.
  template <class S>
  ANL_NOINLINE void store(S* g, const Strides& strides, int n) const {
    const int64_t sk = strides.sk, si = strides.si;
    const int whole = n / W * W;
    for (int64_t k = 0; k < num_classes && si == 1; ++k) {
      const T* in = data + k * width;
      for (int j = 0; j < whole; j += W) Storage<S>::store(g + k * sk + j, Storage<T>::load(in + j));
      if (whole < n) store_part(g + k * sk + whole, n - whole, Storage<T>::load(in + whole));
    }
    if (si == 1) return;
    for (int j = 0; j < n; ++j) {
      const T* in = data + j;
      for (int64_t k = 0; k < num_classes; k += W) {
        T values[W];
        S bits[W];
        const int m = int(min_of<int64_t>(W, num_classes - k));
        for (int t = 0; t < m; ++t) values[t] = in[(k + t) * width];
        for (int t = m; t < W; ++t) values[t] = T(0);
        Storage<S>::store(bits, Storage<T>::load(values));
        if (sk == 1) {
          memcpy(g + j * si + k, bits, m * sizeof(S));
        } else {
          for (int t = 0; t < m; ++t) g[j * si + (k + t) * sk] = bits[t];
        }
      }
    }
  }
};

}  // namespace
}  // namespace ANL_ISA
}  // namespace anl
