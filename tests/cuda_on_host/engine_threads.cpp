// Every CUDA thread a std::thread: for ThreadSanitizer, slow.
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <thread>

#include "engine.h"

namespace anl {
namespace host {
namespace {

constexpr size_t UNDER_WAY = 2;  // clusters at a time

void run_cluster(const Launch& launch, unsigned number) {
  Cluster cluster(launch, uint64_t(number) * launch.cluster);
  const unsigned x = launch.block.x, y = launch.block.y;
  std::vector<std::thread> threads;
  for (const std::unique_ptr<Cta>& cta : cluster.ctas) {
    for (unsigned i = 0; i < launch.threads(); ++i) {
      threads.emplace_back([&launch, &cta, i, x, y] {
        Thread own{};
        own.index = {i % x, i / x % y, i / x / y};
        own.warp = i / 32;
        own.lane = i % 32;
        own.cta = cta.get();
        current = &own;
        launch.kernel(launch.context);
        own.finish();
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void Meeting::arrive_and_wait() {
  const unsigned generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_relaxed) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_relaxed);
    syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, threads_, nullptr, nullptr, 0);
    return;
  }
  while (generation_.load(std::memory_order_relaxed) == generation)
    syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
}

void yield() { std::this_thread::yield(); }

void fail(const char* message) {
  fprintf(stderr, "CUDA on the host: %s\n", message);
  abort();
}
void refuse(const char* message) { fail(message); }

void cluster_arrive() {
  self().cluster_token = std::make_unique<Barrier::Token>(self().cta->cluster->barrier.arrive());
}
void cluster_wait() { self().cta->cluster->barrier.wait(std::move(*self().cluster_token)); }

Outcome run_clusters(const Launch& launch, const std::vector<unsigned>& order, unsigned) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> slots;
  for (size_t slot = 0; slot < std::min(UNDER_WAY, order.size()); ++slot) {
    slots.emplace_back([&] {
      for (size_t i = next++; i < order.size(); i = next++) run_cluster(launch, order[i]);
    });
  }
  for (std::thread& slot : slots) slot.join();
  return Outcome::DONE;
}

}  // namespace host
}  // namespace anl
