// Runs a grid on the host: every CUDA thread is a fiber (the default), or a std::thread (-DANL_HOST_THREADS).
//
// Fibers are quick and all run on the thread that launches, in an order that changes from launch to launch. Threads are
// slow; they are for ThreadSanitizer, which sees a race where two of them meet in memory without a barrier between. In
// both a few CTAs (or clusters) are under way at a time, begun in no particular order.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <source_location>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace anl {
namespace host {

// Ends the launch with an error (fibers) or the process (threads): what is undefined on a device; and what a device would
// have refused to launch, had it been known before.
[[noreturn]] void fail(const char* message);
[[noreturn]] void refuse(const char* message);

// For other threads to get on, inside a loop that waits for them.
void yield();

#if defined(ANL_HOST_THREADS)

// Whether bulk copies are made when they are waited for, so that what is read before is not there yet. Threads make them
// at once, as a device may: ThreadSanitizer sees who reads too early, or writes too late.
constexpr bool COPIES_ARE_LATE = false;

// Orders the threads that meet at it, and nobody else: std::barrier's waits go through counters that all barriers of the
// process share, which hides from ThreadSanitizer what CTAs do to one another without order.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  using Token = unsigned;
  Token arrive() { return arrive(std::memory_order_release, std::memory_order_acquire); }
  void wait(Token token) { wait(token, std::memory_order_acquire); }
  void arrive_and_wait() { wait(arrive()); }

 protected:
  Token arrive(std::memory_order release, std::memory_order acquire);
  void wait(Token token, std::memory_order acquire);

 private:
  const unsigned threads_;
  std::atomic<unsigned> arrived_{0}, generation_{0};
};

// Lets lanes meet without ordering their memory accesses, as a shuffle does: ThreadSanitizer takes no relaxed atomic
// for a synchronisation.
class Meeting : Barrier {
 public:
  using Barrier::Barrier;
  void arrive_and_wait() {
    wait(Barrier::arrive(std::memory_order_relaxed, std::memory_order_relaxed), std::memory_order_relaxed);
  }
};

#else

constexpr bool COPIES_ARE_LATE = true;

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  using Token = unsigned;
  Token arrive();
  void wait(Token token);  // blocks the fiber until the generation is another
  void arrive_and_wait() { wait(arrive()); }
  bool passed(Token token) const { return generation_ != token; }

 private:
  const unsigned threads_;
  unsigned arrived_ = 0, generation_ = 0;
};
using Meeting = Barrier;

#endif

// The lanes of one warp that shuffle or meet under one mask. Values have two places that take turns, so that one
// meeting an exchange is enough.
struct Lanes {
  explicit Lanes(unsigned mask) : barrier(__builtin_popcount(mask)), meeting(__builtin_popcount(mask)) {}
  Barrier barrier;
  Meeting meeting;
  std::atomic<uint64_t> values[2][32];
  unsigned turn[32] = {};  // each lane's own
};

struct Exchanged {
  const Lanes* lanes;
  unsigned turn;
  uint64_t of(int lane) const { return lanes->values[turn][lane].load(std::memory_order_relaxed); }
};

struct Launch {
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
  void (*kernel)(void* context);
  void* context;
  uint64_t identity = 0;                           // of the kernel: the same in every process
  int code = 90;                                   // the architecture that the kernel was compiled for
  bool starts_early = false;                       // before the launch ahead of it has ended, as far as a device knows
  std::atomic<size_t>* static_shared = nullptr;    // the kernel's, as far as it has been seen
  size_t most_static_shared = SIZE_MAX;
  unsigned threads() const { return block.x * block.y * block.z; }
};

struct Cluster;

// Exactly so many bytes, full of ones at first: NaN in every format.
struct Memory {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t GUARD = 0;  // AddressSanitizer has its own
#else
  static constexpr size_t GUARD = 64;  // bytes behind them, which nobody may write
#endif
  Memory(size_t bytes, size_t alignment);
  bool is_intact() const;
  ~Memory();
  Memory(const Memory&) = delete;
  unsigned char* data;
  const size_t bytes, alignment;
};

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  void run() const;
};

struct Cta {
  Cta(const Launch& launch, uint3 index, unsigned rank, Cluster* cluster);
  void* static_shared(const void* site, size_t size, size_t alignment);
  void count_static_shared(size_t size, size_t alignment);
  void* same_place(const Cta& other, const void* shared);  // in this CTA
  Lanes& lanes(unsigned warp, unsigned mask);
  bool is_intact() const;  // whether nothing was written past its shared memory

  const Launch* launch;
  uint3 index;
  unsigned rank;  // in the cluster
  Cluster* cluster;
  Barrier barrier;
  std::atomic<unsigned> sites[3] = {0, 0, 0};  // where the threads meet, of three barriers in turn
  std::atomic<int> votes[3] = {0, 0, 0};       // likewise
  Memory shared;
  std::map<const void*, std::vector<Copy>> late_copies;  // by the mbarrier that waits for them
  std::mutex mutex;  // of what follows
  std::map<const void*, Memory> statics;
  size_t static_bytes = 0;
  std::map<std::pair<unsigned, unsigned>, std::unique_ptr<Lanes>> parts;  // of warps, by warp and mask
  std::vector<std::unique_ptr<Lanes>> warps;                              // whole: no mutex needed
};

void* static_shared(const void* site, size_t size, size_t alignment);

struct Cluster {
  Cluster(const Launch& launch, uint64_t first_cta);
  std::vector<std::unique_ptr<Cta>> ctas;
  Barrier barrier;
};

// Asynchronous copies are made when they are waited for, no sooner: what is read before holds something else.
struct CopyGroups {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
  void commit();
  void wait(size_t leave);
};

struct Thread {
  uint3 index;
  unsigned warp, lane;
  Cta* cta;
  std::vector<std::pair<const void*, void*>> statics;  // those it has seen
  unsigned meetings = 0;       // __syncthreads so far
  unsigned votes = 0;          // of them __syncthreads_or
  unsigned fruitless = 0;      // yields since it last got on
  CopyGroups copies;
  bool has_waited = false;     // for the launch ahead
  void finish() const;  // fails if a copy, or the launch ahead, was not waited for
  Barrier::Token cluster_token = 0;
};

extern thread_local Thread* current __attribute__((tls_model("initial-exec")));
inline Thread& self() { return *current; }
inline unsigned lane() { return self().lane; }

Exchanged exchange(unsigned mask, uint64_t value);
void sync_warp(unsigned mask);
// `where` is the same for all threads: it is undefined what a device does where they are apart.
void sync_cta(std::source_location where);
int sync_cta_or(bool predicate, std::source_location where);
void cluster_arrive();
void cluster_wait();

// Runs the grid, in an order that follows from the kernel, the grid and the environment's ANL_HOST_SEED; what went wrong
// is on stderr. Engines implement run_clusters.
enum class Outcome { DONE, FAILED, REFUSED };
Outcome run(const Launch& launch);
Outcome run_clusters(const Launch& launch, const std::vector<unsigned>& order, unsigned seed);

}  // namespace host
}  // namespace anl
