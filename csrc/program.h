// What the kernels are told of a loss: a weighted sum of terms, with its numbers.
#pragma once

namespace anl {

constexpr int MAX_TERMS = 16;

// A weighted sum of terms, and the one clamp and one focal exponent they share.
struct Program {
  int num_terms;
  int kind[MAX_TERMS];
  double factor[MAX_TERMS], p0[MAX_TERMS], p1[MAX_TERMS];
  double min_prob, gamma;
  double clamp_height;        // T = -log(min_prob)
  double focal_clamp_height;  // A = (1 - min_prob)^gamma T
  unsigned needs;
};

}  // namespace anl
