// Every CUDA thread a std::thread: for ThreadSanitizer, slow.
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "engine.h"

namespace anl {
namespace host {
namespace {

constexpr size_t UNDER_WAY = 2;  // clusters at a time
constexpr unsigned MOST_YIELDS = 30000;  // in one loop: ten seconds, or more where the machine has no time

// Clusters one after the other, all by the same threads: to make a thread takes longer than most of them live. Between
// two clusters they meet, so nothing that is in order here was not when every cluster had threads of its own.
struct Slot {
  const Launch& launch;
  const unsigned threads;
  std::barrier<> meeting;
  std::unique_ptr<Cluster> cluster;  // null: there are no more

  explicit Slot(const Launch& launch)
      : launch(launch), threads(launch.threads() * launch.cluster), meeting(threads) {}

  template <class Next>
  void work(unsigned number, const Next& next) {
    for (;;) {
      if (number == 0) cluster = next();
      meeting.arrive_and_wait();
      if (!cluster) return;
      run_thread(*cluster->ctas[number / launch.threads()], number % launch.threads());
      meeting.arrive_and_wait();
    }
  }

  void run_thread(Cta& cta, unsigned i) {
    const unsigned x = launch.block.x, y = launch.block.y;
    Thread own{};
    own.index = {i % x, i / x % y, i / x / y};
    own.warp = i / 32;
    own.lane = i % 32;
    own.cta = &cta;
    current = &own;
    launch.kernel(launch.context);
    own.finish();
  }
};

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

// Asleep: hundreds of threads that spin leave the one that they wait for no time.
void yield() {
  if (++self().fruitless > MOST_YIELDS) fail("a deadlock, a thread waits in vain");
  std::this_thread::sleep_for(std::chrono::microseconds(300));
}

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
  std::atomic<size_t> taken{0};
  const auto next = [&]() -> std::unique_ptr<Cluster> {
    const size_t i = taken++;
    return i < order.size() ? std::make_unique<Cluster>(launch, uint64_t(order[i]) * launch.cluster) : nullptr;
  };
  std::vector<std::unique_ptr<Slot>> slots;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < std::min(UNDER_WAY, order.size()); ++i) {
    slots.push_back(std::make_unique<Slot>(launch));
    for (unsigned number = 0; number < slots.back()->threads; ++number)
      threads.emplace_back([slot = slots.back().get(), number, &next] { slot->work(number, next); });
  }
  for (std::thread& thread : threads) thread.join();
  return Outcome::DONE;
}

}  // namespace host
}  // namespace anl
