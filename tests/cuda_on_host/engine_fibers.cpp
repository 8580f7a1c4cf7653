// Every CUDA thread a fiber of the launching thread: it runs until it waits for others.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace anl {
namespace host {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t UNDER_WAY = 3;     // clusters at a time
constexpr int FRUITLESS_ROUNDS = 1000;  // after so many nobody will ever get on

// ---- contexts -------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)

extern "C" void anl_host_switch(void** from, void* to);
asm(R"(
.text
.globl anl_host_switch
.hidden anl_host_switch
.type anl_host_switch, @function
anl_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* sp = nullptr;
  void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES) - 1;
    *--top = reinterpret_cast<void*>(entry);
    sp = top - 6;
  }
  void switch_to(const Context& to) { anl_host_switch(&sp, to.sp); }
};

#else

struct Context {
  ucontext_t c;
  void prepare(char* stack, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = STACK_BYTES;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
  }
  void switch_to(const Context& to) { swapcontext(&c, &to.c); }
};

#endif

// Stacks are kept for the next launch.
struct Stacks {
  std::vector<char*> free;
  char* take() {
    if (free.empty()) {
      void* p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) abort();
      return static_cast<char*>(p);
    }
    char* stack = free.back();
    free.pop_back();
    return stack;
  }
  ~Stacks() {
    for (char* stack : free) munmap(stack, STACK_BYTES);
  }
};
thread_local Stacks stacks;

// ---- fibers -----------------------------------------------------------------------------------------------------------------

struct Fiber : Thread {
  Context context;
  char* stack;
  const Barrier* waits_for = nullptr;
  Barrier::Token token = 0;
  enum { READY, SPINS, WAITS, DONE } state = READY;

  Fiber() : stack(stacks.take()) {}
  ~Fiber() { stacks.free.push_back(stack); }
  Fiber(const Fiber&) = delete;
};

struct Scheduler {
  Context context;
  Outcome outcome = Outcome::DONE;  // so far
  const void* stack_bottom = nullptr;  // the launching thread's, for AddressSanitizer
  size_t stack_bytes = 0;
};
thread_local Scheduler* scheduler = nullptr;

Fiber& fiber() { return static_cast<Fiber&>(self()); }

// Back to the scheduler. AddressSanitizer wants to know which stack is in use.
void leave(bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler->stack_bottom, scheduler->stack_bytes);
#endif
  fiber().context.switch_to(scheduler->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  (void)for_good;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler->stack_bottom, &scheduler->stack_bytes);
#endif
  Fiber& f = fiber();
  f.cta->launch->kernel(f.cta->launch->context);
  f.finish();
  f.state = Fiber::DONE;
  leave(true);
}

// Whether it got on: it came to another barrier, or to its end.
bool resume(Fiber& f) {
  f.state = Fiber::READY;
  current = &f;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, STACK_BYTES);
#endif
  scheduler->context.switch_to(f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  current = nullptr;
  return f.state != Fiber::SPINS;
}

using Warp = std::vector<std::unique_ptr<Fiber>>;

// A cluster under way. Its warps, and the lanes of each warp, run in a random order. A warp runs on until all of its lanes
// wait for other warps: so the lanes that exchange values run one after another, while their stacks are in the cache.
struct Running {
  Cluster cluster;
  std::vector<Warp> warps;
  size_t left;

  Running(const Launch& launch, unsigned number, std::minstd_rand& random)
      : cluster(launch, uint64_t(number) * launch.cluster) {
    const unsigned x = launch.block.x, y = launch.block.y;
    for (const std::unique_ptr<Cta>& cta : cluster.ctas) {
      for (unsigned i = 0; i < launch.threads(); ++i) {
        if (i % 32 == 0) warps.emplace_back();
        auto f = std::make_unique<Fiber>();
        f->index = {i % x, i / x % y, i / x / y};
        f->warp = i / 32;
        f->lane = i % 32;
        f->cta = cta.get();
        f->context.prepare(f->stack, fiber_main);
        warps.back().push_back(std::move(f));
      }
    }
    left = launch.threads() * cluster.ctas.size();
    for (Warp& warp : warps) std::shuffle(warp.begin(), warp.end(), random);
    std::shuffle(warps.begin(), warps.end(), random);
  }

  bool is_intact() const {
    return std::all_of(cluster.ctas.begin(), cluster.ctas.end(), [](const auto& cta) { return cta->is_intact(); });
  }

  bool round() {
    bool got_on = false;
    for (const Warp& warp : warps)
      while (scheduler->outcome == Outcome::DONE && round_of(warp)) got_on = true;
    return got_on;
  }

  bool round_of(const Warp& warp) {
    bool got_on = false;
    for (const std::unique_ptr<Fiber>& f : warp) {
      if (f->state == Fiber::DONE || (f->state == Fiber::WAITS && !f->waits_for->passed(f->token))) continue;
      got_on |= resume(*f);
      if (scheduler->outcome != Outcome::DONE) return false;
      left -= f->state == Fiber::DONE;
    }
    return got_on;
  }
};

}  // namespace

Barrier::Token Barrier::arrive() {
  const Token token = generation_;
  if (++arrived_ == threads_) {
    arrived_ = 0;
    ++generation_;
  }
  return token;
}

void Barrier::wait(Token token) {
  if (passed(token)) return;
  Fiber& f = fiber();
  f.waits_for = this;
  f.token = token;
  f.state = Fiber::WAITS;
  leave();
}

void yield() {
  fiber().state = Fiber::SPINS;
  leave();
}

namespace {

[[noreturn]] void end(Outcome outcome, const char* message) {
  const Cta& cta = *self().cta;
  fprintf(stderr, "CUDA on the host: %s (block %u %u %u, thread %u %u %u)\n", message, cta.index.x, cta.index.y,
          cta.index.z, self().index.x, self().index.y, self().index.z);
  scheduler->outcome = outcome;
  leave();
  abort();
}

}  // namespace

void fail(const char* message) { end(Outcome::FAILED, message); }
void refuse(const char* message) { end(Outcome::REFUSED, message); }

Outcome run_clusters(const Launch& launch, const std::vector<unsigned>& order, unsigned seed) {
  Scheduler own;
  scheduler = &own;
  std::minstd_rand random(seed);
  std::vector<std::unique_ptr<Running>> active;
  size_t next = 0;
  for (int fruitless = 0; next < order.size() || !active.empty();) {
    while (active.size() < UNDER_WAY && next < order.size())
      active.push_back(std::make_unique<Running>(launch, order[next++], random));
    bool got_on = false;
    for (const auto& running : active) {
      got_on |= running->round();
      if (own.outcome != Outcome::DONE) return own.outcome;
    }
    for (const auto& running : active) {
      if (running->left || running->is_intact()) continue;
      fprintf(stderr, "CUDA on the host: a block has written past its shared memory\n");
      return Outcome::FAILED;
    }
    std::erase_if(active, [](const auto& running) { return running->left == 0; });
    fruitless = got_on ? 0 : fruitless + 1;
    if (fruitless == FRUITLESS_ROUNDS) {
      fprintf(stderr, "CUDA on the host: a deadlock, every thread waits for others or has ended\n");
      return Outcome::FAILED;
    }
  }
  return Outcome::DONE;
}

}  // namespace host
}  // namespace anl
