// What both engines share: CTAs and their memory, exchanges between lanes, copies, the order in which a grid runs.
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "host_runtime.h"

namespace anl {
namespace host {

thread_local Thread* current = nullptr;

Memory::Memory(size_t bytes, size_t alignment) : bytes(bytes), alignment(alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, std::max(alignment, sizeof(void*)), bytes + GUARD)) abort();
  data = static_cast<unsigned char*>(p);
  memset(data, 0xff, bytes + GUARD);
}
bool Memory::is_intact() const {
  return std::all_of(data + bytes, data + bytes + GUARD, [](unsigned char x) { return x == 0xff; });
}
Memory::~Memory() { free(data); }

Cta::Cta(const Launch& launch, uint3 index, unsigned rank, Cluster* cluster)
    : launch(&launch), index(index), rank(rank), cluster(cluster), barrier(launch.threads()),
      shared(launch.shared_bytes, 128) {
  for (unsigned first = 0; first < launch.threads(); first += 32) {
    const unsigned lanes = std::min(32u, launch.threads() - first);
    warps.push_back(std::make_unique<Lanes>(lanes == 32 ? 0xffffffffu : (1u << lanes) - 1));
  }
}

bool Cta::is_intact() const {
  return shared.is_intact() &&
         std::all_of(statics.begin(), statics.end(), [](const auto& entry) { return entry.second.is_intact(); });
}

Cluster::Cluster(const Launch& launch, uint64_t first_cta) : barrier(launch.threads() * launch.cluster) {
  const uint64_t x = launch.grid.x, y = launch.grid.y;
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    const uint64_t i = first_cta + rank;
    const uint3 index = {unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)};
    ctas.push_back(std::make_unique<Cta>(launch, index, rank, this));
  }
}

void* Cta::static_shared(const void* site, size_t size, size_t alignment) {
  const std::lock_guard lock(mutex);
  const auto [found, fresh] = statics.try_emplace(site, size, alignment);
  if (fresh) count_static_shared(size, alignment);
  return found->second.data;
}

// How much a kernel has is known when it has run: CUDA would have refused the launch.
void Cta::count_static_shared(size_t size, size_t alignment) {
  static_bytes = (static_bytes + alignment - 1) / alignment * alignment + size;
  if (std::atomic<size_t>* most = launch->static_shared) {
    size_t known = *most;
    while (known < static_bytes && !most->compare_exchange_weak(known, static_bytes)) {
    }
  }
  if (static_bytes > launch->most_static_shared) refuse("static and dynamic shared memory are more than a block may have");
}

// Without the lock after the first time, which would order what the kernel does not.
void* static_shared(const void* site, size_t size, size_t alignment) {
  Thread& thread = self();
  for (const auto& [known, place] : thread.statics)
    if (known == site) return place;
  void* place = thread.cta->static_shared(site, size, alignment);
  thread.statics.emplace_back(site, place);
  return place;
}

void* Cta::same_place(const Cta& other, const void* shared_pointer) {
  const auto* p = static_cast<const unsigned char*>(shared_pointer);
  const auto offset = [&](const Memory& memory) { return size_t(p - memory.data); };
  if (offset(other.shared) < other.shared.bytes) return shared.data + offset(other.shared);
  for (const auto& [site, place] : self().statics) {
    const Memory& memory = other.statics.at(site);
    if (offset(memory) < memory.bytes)
      return static_cast<unsigned char*>(static_shared(site, memory.bytes, memory.alignment)) + offset(memory);
  }
  fail("cluster_map of an address that is not in shared memory");
}

Lanes& Cta::lanes(unsigned warp, unsigned mask) {
  if (mask == 0xffffffffu) return *warps[warp];
  const std::lock_guard lock(mutex);
  std::unique_ptr<Lanes>& part = parts[{warp, mask}];
  if (!part) part = std::make_unique<Lanes>(mask);
  return *part;
}

namespace {

bool is_first(const Thread& thread) { return thread.index.x + thread.index.y + thread.index.z == 0; }

Lanes& lanes_of(unsigned mask) {
  if (!(mask >> self().lane & 1)) fail("a lane that is not in its own mask");
  return self().cta->lanes(self().warp, mask);
}

}  // namespace

Exchanged exchange(unsigned mask, uint64_t value) {
  Lanes& lanes = lanes_of(mask);
  const unsigned turn = lanes.turn[lane()]++ % 2;
  lanes.values[turn][lane()].store(value, std::memory_order_relaxed);
  lanes.meeting.arrive_and_wait();
  return {&lanes, turn};
}

void sync_warp(unsigned mask) {
  Lanes& lanes = lanes_of(mask);
  lanes.barrier.wait(lanes.barrier.arrive());
}

void sync_cta(std::source_location where) {
  Thread& thread = self();
  thread.fruitless = 0;
  Cta& cta = *thread.cta;
  const unsigned turn = thread.meetings++, here = where.line() << 10 | where.column();
  unsigned there = 0;
  if (!cta.sites[turn % 3].compare_exchange_strong(there, here, std::memory_order_relaxed) && there != here)
    fail("threads of a block meet at different barriers");
  cta.barrier.wait(cta.barrier.arrive());
  if (is_first(thread)) cta.sites[(turn + 2) % 3].store(0, std::memory_order_relaxed);
}

void cluster_arrive() { self().cluster_token = self().cta->cluster->barrier.arrive(); }
void cluster_wait() { self().cta->cluster->barrier.wait(self().cluster_token); }

int sync_cta_or(bool predicate, std::source_location where) {
  Thread& thread = self();
  const unsigned turn = thread.votes++;
  if (predicate) thread.cta->votes[turn % 3] = 1;
  sync_cta(where);
  if (is_first(thread)) thread.cta->votes[(turn + 2) % 3] = 0;
  return thread.cta->votes[turn % 3];
}

void Copy::run() const { memcpy(to, from, bytes); }

void CopyGroups::commit() {
  committed.push_back(std::move(open));
  open.clear();
}

void CopyGroups::wait(size_t leave) {
  while (committed.size() > leave) {
    for (const Copy& copy : committed.front()) copy.run();
    committed.erase(committed.begin());
  }
}

void Thread::finish() const {
  if (!copies.open.empty() || !copies.committed.empty())
    fail("a thread ended before its asynchronous copies");
  if (cta->launch->starts_early && !has_waited) fail("a launch that starts early has not waited for the one ahead");
}

namespace {

unsigned seed_of(const Launch& launch) {
  const char* seed = getenv("ANL_HOST_SEED");
  uint64_t hash = seed ? strtoull(seed, nullptr, 10) : 0;
  for (const uint64_t x : {launch.identity, uint64_t(launch.grid.x), uint64_t(launch.grid.y), uint64_t(launch.grid.z)})
    hash = (hash ^ x) * 0x9e3779b97f4a7c15u;
  return unsigned(hash >> 32);
}

}  // namespace

Outcome run(const Launch& launch) {
  const uint64_t ctas = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  std::vector<unsigned> order(ctas / launch.cluster);
  std::iota(order.begin(), order.end(), 0u);
  const unsigned seed = seed_of(launch);
  std::shuffle(order.begin(), order.end(), std::minstd_rand(seed));
  return run_clusters(launch, order, seed);
}

}  // namespace host
}  // namespace anl
