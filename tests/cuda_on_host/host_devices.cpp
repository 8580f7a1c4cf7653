#include "host_devices.h"

#include <algorithm>

namespace anl {
namespace host {
namespace {

constexpr int KB = 1 << 10, MB = 1 << 20;

// A few hundred classes fill a CTA's shared memory, a few thousand a cluster's.
constexpr Device toy(const char* name, int arch, int processors, int threads, int registers, int shared, int l2) {
  return {name,   arch / 10,  arch % 10, {processors}, threads, 2 * threads, registers, 2 * registers, shared,
          shared + RESERVED_SHARED, 32, l2, arch < 90 ? 0 : 16, arch, arch, true};
}

constexpr Device of_data_centre(const char* name, int arch, Gpcs gpcs, int shared, int l2, int max_cluster, int ptx) {
  return {name,   arch / 10, arch % 10, gpcs, 1024, 2048, 65536, 65536, shared, shared + RESERVED_SHARED,
          32,     l2,        max_cluster, ptx, arch};
}

constexpr Device of_desktop(const char* name, int arch, Gpcs gpcs, int l2, int max_cluster, int ptx, int binary) {
  return {name, arch / 10, arch % 10, gpcs, 1024, 1536, 65536, 65536, 99 * KB, 100 * KB, 24, l2, max_cluster, ptx, binary};
}

constexpr Gpcs SXM = {18, 18, 16, 16, 16, 16, 16, 16};

constexpr Device DEVICES[NUM_DEVICES] = {
    toy("a small sm_90", 90, 4, 64, 4096, 16 * KB, 256 * KB),
    toy("a small sm_80", 80, 3, 64, 4096, 12 * KB, 128 * KB),
    toy("sm_90 of one warp", 90, 2, 32, 2048, 6 * KB, 64 * KB),
    of_data_centre("H100's numbers", 90, SXM, 227 * KB, 50 * MB, 16, 90),
    of_data_centre("A100's numbers", 80, {16, 16, 16, 16, 16, 14, 14}, 163 * KB, 40 * MB, 0, 80),
    of_data_centre("H200's numbers", 90, {18, 18, 18, 18, 16, 16, 14, 14}, 227 * KB, 60 * MB, 16, 90),
    of_data_centre("sm_90 with small GPCs", 90, {10, 10, 10, 10, 10, 10, 10, 8}, 227 * KB, 60 * MB, 8, 90),
    of_data_centre("B200's numbers", 100, {20, 20, 18, 18, 18, 18, 18, 18}, 227 * KB, 126 * MB, 16, 100),
    of_desktop("RTX 4090's numbers", 89, {12, 12, 12, 12, 12, 12, 12, 12, 12, 10, 10}, 72 * MB, 0, 80, 80),
    of_desktop("RTX 5090's numbers", 120, {16, 16, 16, 16, 16, 16, 16, 16, 14, 14, 14}, 96 * MB, 8, 100, 120),
    of_data_centre("a slice of an H200", 90, {8, 8}, 227 * KB, 7 * MB, 16, 90),
    of_data_centre("H100 with a build for A100", 90, SXM, 227 * KB, 50 * MB, 16, 80),
    toy("a small sm_80 with room for long parts of rows", 80, 3, 64, 4096, 60 * KB, 128 * KB),
};
static_assert(DEVICES[3].gpcs.processors() == 132 && DEVICES[4].gpcs.processors() == 108 &&
              DEVICES[5].gpcs.processors() == 132 && DEVICES[6].gpcs.processors() == 78 &&
              DEVICES[7].gpcs.processors() == 148 && DEVICES[8].gpcs.processors() == 128 &&
              DEVICES[9].gpcs.processors() == 170);

}  // namespace

const Device& device_of(int index) { return DEVICES[index]; }

int ctas_per_sm(const Device& device, const Footprint& cta) {
  const int threads = int((cta.threads + 31) / 32 * 32);
  const int by_threads = device.threads_per_sm / threads;
  const int by_registers = device.registers_per_sm / (threads * cta.registers);
  const int by_shared = device.shared_per_sm / int(cta.shared + RESERVED_SHARED);
  return std::min({by_threads, by_registers, by_shared, device.ctas_per_sm});
}

int active_clusters(const Device& device, const Footprint& cta, unsigned cluster) {
  const int ctas = ctas_per_sm(device, cta);
  if (device.toy) return ctas ? std::max(1, device.gpcs.processors() / int(cluster)) : 0;
  int clusters = 0;
  for (int i = 0; i < device.gpcs.count; ++i) clusters += device.gpcs.of[i] * ctas / int(cluster);
  return clusters;
}

}  // namespace host
}  // namespace anl
