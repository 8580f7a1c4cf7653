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
  Barrier meeting;
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

Barrier::Token Barrier::arrive(std::memory_order release, std::memory_order acquire) {
  const Token token = generation_.load(std::memory_order_relaxed);  // which does not change before this thread is here
  if (arrived_.fetch_add(1, release) + 1 < threads_) return token;
  arrived_.load(acquire);  // what all of them did before
  arrived_.store(0, std::memory_order_relaxed);
  generation_.store(token + 1, release);
  syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, threads_, nullptr, nullptr, 0);
  return token;
}

void Barrier::wait(Token token, std::memory_order acquire) {
  while (generation_.load(acquire) == token)
    syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, token, nullptr, nullptr, 0);
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

Outcome run_clusters(const Launch& launch, const std::vector<unsigned>& order, unsigned) {
  std::atomic<size_t> taken{0};
  const auto next = [&]() -> std::unique_ptr<Cluster> {
    const size_t i = taken++;
    return i < order.size() ? std::make_unique<Cluster>(launch, uint64_t(order[i]) * launch.cluster) : nullptr;
  };
  std::vector<std::unique_ptr<Slot>> slots;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < std::min(UNDER_WAY, order.size()); ++i) slots.push_back(std::make_unique<Slot>(launch));
  // All begin together: the first slot's CTA would be through with most of the work before the second's has threads.
  Meeting start(unsigned(slots.size()) * slots[0]->threads);
  for (const std::unique_ptr<Slot>& slot : slots) {
    for (unsigned number = 0; number < slot->threads; ++number) {
      threads.emplace_back([slot = slot.get(), number, &next, &start] {
        start.arrive_and_wait();
        slot->work(number, next);
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  return Outcome::DONE;
}

}  // namespace host
}  // namespace anl
