// One dtype and variant of a kernel: ANL_SOURCE is the file, ANL_DTYPE and ANL_FULL what is compiled of it.
#include "call.h"

namespace anl {

template <class H, class B>
auto one_storage() {
  if constexpr (ANL_DTYPE == FLOAT32)
    return Stored<float>();
  else if constexpr (ANL_DTYPE == FLOAT64)
    return Stored<double>();
  else if constexpr (ANL_DTYPE == FLOAT16)
    return Stored<H>();
  else
    return Stored<B>();
}

template <class H, class B, class F>
auto by_one_storage(DType, F f) {
  return f(one_storage<H, B>());
}
template <class H, class B, class F>
auto by_one_variant(const Call&, F f) {
  return f(one_storage<H, B>(), std::bool_constant<ANL_FULL>());
}

}  // namespace anl

#define by_storage by_one_storage
#define by_variant by_one_variant
#include ANL_SOURCE
