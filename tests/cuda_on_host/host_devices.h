// Devices that do not exist: what each has, and what fits on it. Numbers of NVIDIA's own are those of its data sheets and
// of the programming guide's table of compute capabilities; how the SMs are spread over GPCs varies from chip to chip.
#pragma once

#include <stddef.h>

#include <initializer_list>

namespace anl {
namespace host {

struct Gpcs {
  constexpr Gpcs(std::initializer_list<int> list) {
    for (int sms : list) of[count++] = sms;
  }
  constexpr int processors() const {
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += of[i];
    return sum;
  }
  int of[16] = {};  // SMs of each: a cluster lies within one
  int count = 0;
};

struct Device {
  const char* name;
  int major, minor;
  Gpcs gpcs;
  int threads, threads_per_sm;      // of a CTA, of an SM
  int registers, registers_per_sm;
  int shared, shared_per_sm;        // of a CTA that asks for it (without asking: 48 KB), of an SM
  int ctas_per_sm;
  int l2;
  int max_cluster;                  // 0: none can be launched
  int ptx, binary;                  // what the kernels were compiled for, and what runs: 80 and 90 is PTX for an A100 on an H100
  bool toy = false;                 // so small that a kernel's static shared memory is not counted, and one cluster always fits

  int arch() const { return 10 * major + minor; }
};

constexpr int RESERVED_SHARED = 1 << 10;       // of every CTA, by CUDA itself
constexpr int SHARED_WITHOUT_ASKING = 48 << 10;
constexpr int PORTABLE_CLUSTER = 8;            // CTAs; more are asked for

constexpr int NUM_DEVICES = 13;
const Device& device_of(int index);

// What a kernel takes of an SM.
struct Footprint {
  unsigned threads;
  int registers;        // of a thread
  size_t shared;        // static and dynamic
};

int ctas_per_sm(const Device& device, const Footprint& cta);
// At a time; 0: a cluster of that size does not fit.
int active_clusters(const Device& device, const Footprint& cta, unsigned cluster);

}  // namespace host
}  // namespace anl
