// Python's numbers into a Call: what the compiled modules share. Pointers and strides are taken as they are given.
#pragma once

#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"

namespace anl {

using Triple = std::array<int64_t, 3>;
using Address = uintptr_t;
using Terms = std::vector<std::tuple<int, double, double, double>>;  // (kind, factor, two parameters)

inline Program make_program(double min_prob, double gamma, unsigned needs) {
  Program p = {};
  p.min_prob = min_prob;
  p.gamma = gamma;
  p.clamp_height = -log(min_prob);
  p.focal_clamp_height = pow(1.0 - min_prob, gamma) * p.clamp_height;
  p.needs = needs;
  return p;
}

inline Program make_program(const Terms& terms, double min_prob, double gamma, unsigned needs) {
  if (terms.size() > MAX_TERMS) throw std::invalid_argument("a sum of losses holds at most 16 terms");
  Program p = make_program(min_prob, gamma, needs);
  p.num_terms = int(terms.size());
  for (int t = 0; t < p.num_terms; ++t) {
    std::tie(p.kind[t], p.factor[t], p.p0[t], p.p1[t]) = terms[t];
    if (p.kind[t] < 0 || p.kind[t] >= NUM_TERM_KINDS) throw std::invalid_argument("unknown kind of loss term");
  }
  return p;
}

// The last resort: tensors that hold no memory are refused, by name, where their addresses are taken.
inline void require(Address address, int64_t elements, const char* what) {
  if (!address && elements > 0) throw std::invalid_argument(std::string("anl_kernels: no memory is given for ") + what);
}

inline int64_t num_rows(const Call& call) { return call.outer * call.inner; }

inline Call call_of_shape(Op op, int dtype, const Triple& shape, const Triple& strides) {
  Call call = {};
  call.op = op;
  call.dtype = DType(dtype);
  call.outer = shape[0];
  call.num_classes = shape[1];
  call.inner = shape[2];
  call.logits_strides = {strides[0], strides[1], strides[2]};
  call.grad_strides = call.logits_strides;
  call.loss_scale = 1.0;
  return call;
}

inline Call make_call(Op op, int dtype, const Triple& shape, Address logits, const Triple& strides) {
  Call call = call_of_shape(op, dtype, shape, strides);
  require(logits, num_rows(call) * call.num_classes, "the logits");
  call.logits = reinterpret_cast<const void*>(logits);
  return call;
}

inline void set_grad(Call& call, Address grad, const Triple& strides) {
  call.grad = reinterpret_cast<void*>(grad);
  if (grad) call.grad_strides = {strides[0], strides[1], strides[2]};
}

inline void set_target(Call& call, Address target, int target_type, int64_t ignore_index) {
  require(target, num_rows(call), "the target");
  call.target = reinterpret_cast<const void*>(target);
  call.target_type = TargetType(target_type);
  call.ignore_index = ignore_index;
}

inline Call make_grad_call(int dtype, const Triple& shape, Address logits, const Triple& logits_strides, Address grad,
                              const Triple& grad_strides, Address target, int target_type, double min_prob,
                              double gamma, unsigned needs, Address grad_coefs, Address grad_output,
                              int64_t grad_output_stride, Address log_q, Address entropy_scale) {
  Call call = make_call(Op::GRAD, dtype, shape, logits, logits_strides);
  require(grad, num_rows(call) * call.num_classes, "the gradient");
  require(grad_coefs, num_rows(call), "the coefficients");
  require(grad_output, num_rows(call), "grad_output");
  require(entropy_scale, log_q != 0, "the entropy's scale");
  set_grad(call, grad, grad_strides);
  // Ignored rows are known by their coefficients.
  set_target(call, target, target_type, std::numeric_limits<int64_t>::min());
  call.program = make_program(min_prob, gamma, needs);
  call.grad_coefs = reinterpret_cast<void*>(grad_coefs);
  call.grad_output = reinterpret_cast<const void*>(grad_output);
  call.grad_output_stride = grad_output_stride;
  call.log_q = reinterpret_cast<const void*>(log_q);
  call.entropy_scale = reinterpret_cast<const void*>(entropy_scale);
  return call;
}

// One index for the rows where one stride will do.
inline void fold_rows(Call& call) {
  const int64_t inner = call.inner;
  const auto one_run = [&](const Strides& s) { return inner == 1 || s.so == s.si * inner; };
  const auto fold = [&](Strides& s) {
    s.si = inner == 1 ? s.so : s.si;
    s.so = 0;
  };
  if (call.outer == 1 && inner != 1) return;
  if (!one_run(call.logits_strides) || !one_run(call.grad_strides)) return;
  fold(call.logits_strides);
  fold(call.grad_strides);
  call.inner = call.outer * inner;
  call.outer = 1;
}

}  // namespace anl
