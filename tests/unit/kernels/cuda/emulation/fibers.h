// What the emulation is told before a launch.
#pragma once

namespace emulation {

constexpr int EMULATION_FAILURE = 70;

struct Options {
  int order = 0;    // of a block's threads: 0 ascending, -1 descending, else the seed of a permutation
  int num_sms = 1;  // that the launchers see
};
void set_options(const Options& chosen);

}  // namespace emulation
