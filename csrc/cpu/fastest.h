#pragma once

// Which instruction set computes bf16: not the newest, but the fastest that is right.
//
// AVX-512's BF16 products are faster than its fp32 ones on some machines, and may be slower on
// others; of NEON's nobody has measured it. So the first call tries a few tiles of attention at
// each level that the machine has. A level whose result differs is left out, and said on stderr.

#include <cstdint>

#include "common/attention.h"
#include "cpu/capability.h"
#include "cpu/kernels.h"

namespace usp::cpu {

// What is used for inputs of a dtype: what USP_CPU_CAPABILITY says, or what is best here.
Capability capability_for(DType inputs);

// One level on trial.
struct Trial {
  Capability capability;
  double seconds;  // the least of a few rounds
  double error;    // against the first level, as a share of the largest value
};

// Tries tables of bf16, in turn.
std::vector<Trial> try_levels(const std::vector<Capability>& levels);

// The fastest of those that agree with the first one, which is trusted.
Capability choose(const std::vector<Trial>& trials);

}  // namespace usp::cpu
