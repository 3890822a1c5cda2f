// Runs the threads of kernels as fibers.
//
// ThreadSanitizer must see only the order that the kernel's barriers make. So what a fiber does for
// the shim itself is hidden from it (NO_TSAN) and uses no standard containers.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "cuda/launch.h"
#include "host_shim/counts.h"
#include "host_shim/intrinsics.h"

#if !defined(__x86_64__) || defined(PFGM_SHIM_UCONTEXT)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// Otherwise each fiber would get memory for a second stack, which takes ten times as long as
// everything else.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

#define NO_TSAN __attribute__((no_sanitize("thread")))

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace pfgm {
namespace shim {
namespace {

constexpr int kWarp = 32;
constexpr std::size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kStack = 64 * kPage;  // sanitizers make their reports on the fiber's stack
#else
constexpr std::size_t kStack = 16 * kPage;
#endif

const char* const kCalls[] = {"none",
                              "__syncthreads",
                              "__syncwarp",
                              "__shfl_sync",
                              "__shfl_xor_sync",
                              "__any_sync",
                              "__all_sync",
                              "__ballot_sync",
                              "__reduce_min_sync",
                              "__reduce_add_sync",
                              "multiply_add",
                              "multiply_add_halves",
                              "begin_product",
                              "take_tensor_memory",
                              "return_tensor_memory",
                              "load_tensor_memory",
                              "store_tensor_memory",
                              "wait_for_signal",
                              "begin_product_in_memory",
                              "is_elected",
                              "its end"};
constexpr int kEnd = static_cast<int>(Call::end);

// ---- contexts -------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(PFGM_SHIM_UCONTEXT)
// swapcontext would make a system call for the signal mask on every switch.
struct Context {
  void* stack_pointer;
};

extern "C" void pfgm_shim_swap(Context* from, const Context* to);
asm(R"(
.pushsection .text
.local pfgm_shim_swap
.type pfgm_shim_swap, @function
pfgm_shim_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pfgm_shim_swap, .-pfgm_shim_swap
.popsection
)");

void prepare(Context* context, char* stack, std::size_t size, void (*entry)()) {
  // Six registers, the return address, and a null caller.
  auto** top = reinterpret_cast<void**>(stack + size) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context->stack_pointer = top;
}

NO_TSAN void swap(Context* from, const Context* to) { pfgm_shim_swap(from, to); }
#else
struct Context {
  ucontext_t saved;
};

void prepare(Context* context, char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context->saved);
  context->saved.uc_stack.ss_sp = stack;
  context->saved.uc_stack.ss_size = size;
  context->saved.uc_link = nullptr;
  makecontext(&context->saved, entry, 0);
}

NO_TSAN void swap(Context* from, const Context* to) { swapcontext(&from->saved, &to->saved); }
#endif

// ---- a block --------------------------------------------------------------------------------

struct Fiber;
struct Copies;
struct Products;
struct TensorAccesses;

// Where the threads of a warp or a block wait for each other. The values that they
// exchange are kept for two meetings, so that no thread has to wait until all others have read
// them.
struct Meeting {
  Fiber* members = nullptr;
  int size = 0, arrived = 0;
  unsigned number = 0;  // number of earlier meetings
  Call call = Call::none;
  unsigned votes[2] = {};
  alignas(8) char order[2][8];  // ThreadSanitizer uses their addresses only
};

struct LaneWords {
  std::uint32_t words[6];
  float values[12];  // the words of multiply_add_halves as numbers
};

struct Warp : Meeting {
  LaneWords lanes[2][kWarp];
};

struct Fiber {
  Context context;
  Warp* warp = nullptr;
  Copies* copies = nullptr;
  Products* products = nullptr;
  TensorAccesses* tensor = nullptr;
  unsigned thread = 0;
  Call waits = Call::none;
  bool began = false;  // whether it has met others or copied
  char* stack = nullptr;
  std::size_t stack_size = 0;
  void* sanitizer = nullptr;  // ThreadSanitizer's fiber, or AddressSanitizer's fake stack
};

// Fibers that can continue; the next one is first.
struct Queue {
  Fiber** slots;
  unsigned mask, first = 0, count = 0;

  NO_TSAN Fiber*& at(unsigned i) { return slots[(first + i) & mask]; }
  NO_TSAN Fiber* pop() {
    Fiber* next = at(0);
    ++first, --count;
    return next;
  }
};

struct BlockCounts {
  std::int64_t calls[kEnd] = {}, copied = 0, waited = 0;
};

struct ProductInMemory {
  std::uint32_t d;
  const char *a, *b;
  int a_apart, b_apart, columns;
  bool adds;
  std::uint32_t a_in_memory;  // if a is null
};

// Products that follow each other with the same sums.
struct ProductsInMemory {
  std::vector<ProductInMemory> all;
  std::vector<float> was;  // the sums to which they add
  int signal = -1;         // the number of the one that was sent after them
};

struct ColumnRange {
  int first, end;
};

struct Signal {
  const std::uint64_t* at;
  int sent, done;
  int wanted;                // how many threads wait for
  int known;                 // how many a thread had waited for before a barrier
  ColumnRange sums, values;  // in tensor memory, of the products that it says are done
  alignas(8) char order[8];  // ThreadSanitizer uses its address only
};

constexpr int kTensorRows = 128, kTensorColumns = 512, kMostSignals = 4;
constexpr int kValueColumns = 8;  // of an operand

// The tensor memory that a block has taken, and its products there.
struct TensorMemory {
  float* at = nullptr;  // rows of kTensorColumns
  int first = 0, columns = 0;
  int issuer = -1;                     // the thread that began products
  std::deque<ProductsInMemory> begun;  // and are not done
  Signal signals[kMostSignals] = {};
};

struct Block : Meeting {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Fiber*> slots;
  Queue queue;
  uint3 index;
  int running;
  char* memory;
  // Whether a thread had copies it had not published at the last barrier that all threads reached.
  bool unpublished = false;
  // Whether a thread accessed tensor memory before that barrier and did not order it.
  bool unordered = false;
  TensorMemory tensor;
  BlockCounts counts;
};

// ---- settings, and what runs ----------------------------------------------------------------

std::mutex mutex;  // guards all that follows
Device device_now{4, 90, 232448, kCache};
unsigned order = 0;
std::uint64_t random_state = 0;
std::vector<std::string> launched;
bool counting = false;
std::vector<LaunchCounts> counted;

const Launch* shape;
const std::function<void()>* body;
Block* block;
Fiber host;  // the calling context, which waits until no fiber can continue
Fiber* current = &host;
Fiber* previous = &host;
char* end_of_grid;

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "host_shim: kernel %s: %s\n", shape->kernel, what.c_str());
  std::abort();
}

std::string who() {
  char text[100];
  std::snprintf(text, sizeof text, "thread %u of block (%u, %u, %u) ", threadIdx.x, blockIdx.x,
                blockIdx.y, blockIdx.z);
  return text;
}

std::string name(Call call) { return kCalls[static_cast<int>(call)]; }

NO_TSAN std::uint32_t random_below(std::uint32_t n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>((random_state >> 32) * n >> 32);
}

// ---- sanitizers -----------------------------------------------------------------------------

#ifdef __SANITIZE_THREAD__
NO_TSAN void publish(char* address) { __tsan_release(address); }
// A fiber that displaced another one (see create_fibers) gets a new slot in the acquire. Only a
// release records the slot in the fiber's history. Without that record no race with the fiber is
// reported.
NO_TSAN void observe(char* address) {
  alignas(8) static char nobody[8];
  __tsan_acquire(address);
  __tsan_release(nobody);
}
NO_TSAN void leave(Fiber*, Fiber* to, bool) {
  __tsan_switch_to_fiber(to->sanitizer, __tsan_switch_to_fiber_no_sync);
}
NO_TSAN void landed() {}
// Between the two calls neither accesses nor freed memory are checked.
void look_away() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
void look_again() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
void publish(char*) {}
void observe(char*) {}
void look_away() {}
void look_again() {}
#ifdef __SANITIZE_ADDRESS__
void leave(Fiber* from, Fiber* to, bool forever) {
  __sanitizer_start_switch_fiber(forever ? nullptr : &from->sanitizer, to->stack, to->stack_size);
}
void landed() {
  const void* stack;
  std::size_t size;
  __sanitizer_finish_switch_fiber(current->sanitizer, &stack, &size);
  if (previous != &host) return;
  host.stack = static_cast<char*>(const_cast<void*>(stack));
  host.stack_size = size;
}
#else
void leave(Fiber*, Fiber*, bool) {}
void landed() {}
#endif
#endif

// Stacks for n fibers, with an inaccessible page at the end of each. ThreadSanitizer gets new
// stacks each time: it would take the use of one stack by two fibers for a race.
char* stacks(std::size_t n) {
  static char* memory = nullptr;
  static std::size_t size = 0;
  const std::size_t wanted = std::max(size, n * kStack);
#ifndef __SANITIZE_THREAD__
  if (wanted == size) return memory;
#endif
  if (memory) munmap(memory, size);
  void* fresh = mmap(nullptr, wanted, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fresh == MAP_FAILED) throw std::bad_alloc();
  memory = static_cast<char*>(fresh);
  size = wanted;
#ifndef __SANITIZE_THREAD__
  for (std::size_t at = 0; at < size; at += kStack) mprotect(memory + at, kPage, PROT_NONE);
#endif
  return memory;
}

#ifdef __SANITIZE_THREAD__
// ThreadSanitizer reports a race only while it knows both fibers, so ended fibers are kept for a
// while.
constexpr std::size_t kRemembered = 16384;
std::deque<void*> ended;

void forget_fibers(std::size_t keep) {
  for (; ended.size() > keep; ended.pop_front()) __tsan_destroy_fiber(ended.front());
}

// ThreadSanitizer distinguishes 255 fibers. The next one takes the slot of an earlier fiber, or of
// the creating context. The accesses of the earlier fiber then seem to precede its own, which hides
// races. Creating fibers in a random order avoids hiding the races of the same threads every time.
void create_fibers(std::vector<Fiber>& fibers) {
  static std::mt19937 engine;
  std::vector<std::size_t> turns(fibers.size());
  std::iota(turns.begin(), turns.end(), 0);
  std::shuffle(turns.begin(), turns.end(), engine);
  for (const std::size_t i : turns) fibers[i].sanitizer = __tsan_create_fiber(0);
}
#endif

// ---- switching ------------------------------------------------------------------------------

NO_TSAN void switch_to(Fiber* to, bool forever) {
  Fiber* from = current;
  previous = from;
  current = to;
  threadIdx.x = to->thread;
  blockIdx = block->index;
  leave(from, to, forever);
  swap(&from->context, &to->context);
  landed();
}

NO_TSAN void go_on(bool forever = false) {
  Queue& queue = block->queue;
  Fiber* to = queue.count ? queue.pop() : &host;
  if (to != current) switch_to(to, forever);
}

NO_TSAN void enqueue(Fiber* members, int n) {
  Queue& queue = block->queue;
  const bool ahead = order < 2 || random_below(2);
  if (ahead) queue.first -= n;
  const unsigned start = ahead ? 0 : queue.count;
  queue.count += n;
  for (int i = 0; i < n; ++i) queue.at(start + i) = members + (order == 1 ? n - 1 - i : i);
  if (order < 2) return;
  for (int i = n - 1; i > 0; --i) {
    Fiber*& other = queue.at(start + random_below(i + 1));
    Fiber* moved = queue.at(start + i);
    queue.at(start + i) = other;
    other = moved;
  }
}

[[noreturn]] void stuck() {
  int counts[kEnd + 1] = {};
  for (const Fiber& fiber : block->fibers) ++counts[static_cast<int>(fiber.waits)];
  const int ends = counts[kEnd];
  std::string what = "threads wait ";
  what += ends ? "for threads that ended" : "at different barriers";
  for (int call = 1; call < kEnd; ++call)
    if (counts[call]) what += ", " + std::to_string(counts[call]) + " at " + kCalls[call];
  die(what + "; " + std::to_string(ends) + " ended");
}

// Returns which half of the meeting's memory this meeting used.
NO_TSAN unsigned meet(Meeting& meeting, Call call) {
  const unsigned half = meeting.number & 1;
  if (meeting.arrived && meeting.call != call)
    die("threads wait at different barriers: " + name(meeting.call) + " and " + name(call));
  meeting.call = current->waits = call;
  current->began = true;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++block->counts.calls[static_cast<int>(call)];
    meeting.votes[++meeting.number & 1] = 0;
    enqueue(meeting.members, meeting.size);
  }
  go_on();
  current->waits = Call::none;
  return half;
}

NO_TSAN unsigned meet_in_order(Meeting& meeting, Call call) {
  publish(meeting.order[meeting.number & 1]);
  const unsigned half = meet(meeting, call);
  observe(meeting.order[half]);
  return half;
}

NO_TSAN Warp& whole_warp(unsigned mask, Call call) {
  if (mask != 0xffffffff) die(who() + "calls " + name(call) + " for a part of its warp");
  return *current->warp;
}

// ---- copies ---------------------------------------------------------------------------------

struct Copy {
  char* to;
  const char* from;
  int bytes, valid, group;
};

struct Copies {
  std::vector<Copy> begun;
  int groups = 0;         // committed so far
  bool published = true;  // all that have arrived
};

NO_TSAN Copies& copies() { return *current->copies; }
NO_TSAN void set_copies(Copies* copies) { current->copies = copies; }

// ---- asynchronous products ------------------------------------------------------------------

using Columns = float[8][4];

struct BegunProduct {
  Columns* d;
  bool first;              // no product with this d was under way
  float was[8][4];         // d, if it is the first; 0 if it does not add to d
  const std::uint32_t* a;  // the operand of this thread, which must not change
  std::uint32_t kept[4];
  float rows[2][16];  // rows g and g + 8 of a
  const std::uint16_t* b;
  int apart, group;
};

struct Products {
  std::vector<BegunProduct> begun;
  int groups = 0;  // committed so far
};

NO_TSAN Products& products() { return *current->products; }
NO_TSAN void set_products(Products* products) { current->products = products; }

// ---- accesses of tensor memory --------------------------------------------------------------

// Which values of tensor memory a lane accesses: those of a row, or of two rows as products of
// warps have them.
enum class Places { of_row, of_product };

struct TensorPlaces {
  std::uint32_t first;
  int values;  // of a lane
  Places places;
};
struct TensorLoad {
  TensorPlaces from;
  float* d;
};
struct TensorStore {
  TensorPlaces to;
  std::vector<float> d;
};

struct TensorAccesses {
  std::vector<TensorLoad> loads;
  std::vector<TensorStore> stores;
  bool ordered = true;                               // before the next barrier
  bool after_barrier = false, after_signal = false;  // order_after_barrier was called since then
  int waited[kMostSignals] = {};                     // times that this thread waited for signals
  int known[kMostSignals] = {};  // how many it knows of, from others before a barrier too
};

NO_TSAN TensorAccesses& accesses() { return *current->tensor; }
NO_TSAN void set_accesses(TensorAccesses* all) { current->tensor = all; }

NO_TSAN bool is_shared(const void* address, std::size_t bytes) {
  const char* memory = block->memory;
  const auto* first = static_cast<const char*>(address);
  return first >= memory && first + bytes <= memory + shape->shared;
}

NO_TSAN void count_copy(int bytes) {
  block->counts.copied += bytes;
  current->began = true;
}

bool on_boundary(const void* address, int bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(bytes) == 0;
}

// ---- a fiber's life -------------------------------------------------------------------------

NO_TSAN void end() {
  publish(end_of_grid);
  current->waits = Call::end;
  --block->running;
  go_on(true);
}

NO_TSAN void call_body() { (*body)(); }

void enter() {
  landed();
  {
    Copies mine;
    Products products_of_mine;
    set_copies(&mine);
    set_products(&products_of_mine);
    TensorAccesses accesses_of_mine;
    set_accesses(&accesses_of_mine);
    call_body();
    if (!accesses_of_mine.loads.empty() || !accesses_of_mine.stores.empty())
      die(who() + "ends and never waited for its accesses of tensor memory");
    if (!products_of_mine.begun.empty()) die(who() + "ends and never waited for its products");
    if (!mine.begun.empty())
      die(who() + "ends and never waited for " + std::to_string(mine.begun.size()) + " copies");
  }
  end();
}

// ---- a block's life -------------------------------------------------------------------------

unsigned narrow(std::int64_t n) { return static_cast<unsigned>(n); }

void prepare(Fiber& fiber, int thread, char* stack) {
  fiber.thread = static_cast<unsigned>(thread);
  fiber.stack = stack;
  fiber.stack_size = kStack;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack + kPage, kStack - kPage);
#endif
  // With all stack tops at the same place of a page they would share one set of the cache.
  prepare(&fiber.context, stack, kStack - static_cast<std::size_t>(thread % 32) * 128, enter);
}

void set_meeting(Meeting& meeting, Fiber* members, int size) {
  meeting.members = members;
  meeting.size = size;
}

Block* new_block(uint3 index) {
  const int n = shape->threads;
  auto* made = new Block;
  made->index = index;
  made->running = n;
  made->fibers.resize(n);
  made->warps.resize(n / kWarp);
  set_meeting(*made, made->fibers.data(), n);
  made->memory = static_cast<char*>(std::malloc(shape->shared));
  if (!made->memory) throw std::bad_alloc();
  std::memset(made->memory, 0xff, shape->shared);
  unsigned slots = 1;
  while (slots < static_cast<unsigned>(n)) slots *= 2;
  made->slots.resize(slots);
  made->queue.slots = made->slots.data();
  made->queue.mask = slots - 1;
  char* stack = stacks(n);
  for (int i = 0; i < n; ++i) {
    Warp& warp = made->warps[i / kWarp];
    if (i % kWarp == 0) set_meeting(warp, &made->fibers[i], kWarp);
    made->fibers[i].warp = &warp;
    prepare(made->fibers[i], i, stack + i * kStack);
  }
#ifdef __SANITIZE_THREAD__
  create_fibers(made->fibers);
#endif
  return made;
}

// Adds the counts of the block to those of its launch.
void keep_counts(std::int64_t number) {
  const auto& [calls, copied, waited] = block->counts;
  auto& blocks = counted.back().blocks;
  for (int call = 1; call < kEnd; ++call) blocks[kCalls[call]][number] = calls[call];
  blocks["copied"][number] = copied;
  blocks["wait_for_earlier_launches"][number] = waited;
}

NO_TSAN void check_returned() {
  if (block->tensor.at) die("a block ends and has not returned its tensor memory");
}

void run_block(std::int64_t number) {
  const Grid& grid = shape->grid;
  block = new_block({narrow(number % grid.x), narrow(number / grid.x % grid.y),
                     narrow(number / grid.x / grid.y)});
  enqueue(block->fibers.data(), block->running);
  go_on();
  if (block->running) stuck();
  check_returned();
  if (counting) keep_counts(number);
#ifdef __SANITIZE_THREAD__
  for (const Fiber& fiber : block->fibers) ended.push_back(fiber.sanitizer);
  forget_fibers(kRemembered);
#endif
  // Nothing orders the fibers before this context until the grid has ended.
  look_away();
  std::free(block->memory);
  delete block;
  look_again();
}

// ---- a grid ---------------------------------------------------------------------------------

void require(bool good, const std::string& what) {
  if (!good) throw std::runtime_error(std::string(shape->kernel) + ": " + what);
}

void check_shape() {
  const Grid& grid = shape->grid;
  require(grid.x > 0 && grid.x <= std::numeric_limits<std::int32_t>::max() && grid.y > 0 &&
              grid.y <= 65535 && grid.z > 0 && grid.z <= 65535,
          "invalid grid");
  require(shape->threads > 0 && shape->threads % kWarp == 0 && shape->threads <= 1024,
          "invalid number of threads");
  require(shape->shared <= device_now.shared_limit, "too much shared memory");
}

std::vector<std::int64_t> ordered(std::int64_t n) {
  std::vector<std::int64_t> result(static_cast<std::size_t>(n));
  std::iota(result.begin(), result.end(), 0);
  if (order == 1) std::reverse(result.begin(), result.end());
  for (std::int64_t i = n - 1; order > 1 && i > 0; --i)
    std::swap(result[i], result[random_below(static_cast<std::uint32_t>(i + 1))]);
  return result;
}

void begin_counts() {
  const Grid& grid = shape->grid;
  counted.push_back({shape->kernel, {grid.x, grid.y, grid.z}, shape->threads, shape->shared, {}});
  const std::vector<std::int64_t> zeros(static_cast<std::size_t>(grid.x * grid.y * grid.z));
  for (int call = 1; call < kEnd; ++call) counted.back().blocks[kCalls[call]] = zeros;
  for (const char* other : {"copied", "wait_for_earlier_launches"})
    counted.back().blocks[other] = zeros;
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  shape = &launch;
  body = &thread;
  check_shape();
  launched.push_back(launch.kernel);
  const Grid& grid = launch.grid;
  gridDim = {narrow(grid.x), narrow(grid.y), narrow(grid.z)};
  blockDim = {narrow(launch.threads), 1, 1};
  std::vector<char> end(8);
  end_of_grid = end.data();
#ifdef __SANITIZE_THREAD__
  host.sanitizer = __tsan_get_current_fiber();
#endif
  if (counting) begin_counts();
  for (const std::int64_t number : ordered(grid.x * grid.y * grid.z)) run_block(number);
#ifdef __SANITIZE_THREAD__
  forget_fibers(0);
#endif
  observe(end_of_grid);
}

void set_order(unsigned seed) {
  const std::lock_guard<std::mutex> lock(mutex);
  order = seed;
  random_state = seed;
  for (int i = 0; i < 8; ++i) random_below(1);
}

void set_device(int multiprocessors, int capability, std::size_t shared_limit, int l2_cache) {
  const std::lock_guard<std::mutex> lock(mutex);
  device_now = {multiprocessors, capability, shared_limit, l2_cache};
}

Device device() {
  const std::lock_guard<std::mutex> lock(mutex);
  return device_now;
}

std::vector<std::string> launches() {
  const std::lock_guard<std::mutex> lock(mutex);
  return launched;
}

void clear_launches() {
  const std::lock_guard<std::mutex> lock(mutex);
  launched.clear();
}

std::vector<LaunchCounts> count(bool on) {
  const std::lock_guard<std::mutex> lock(mutex);
  counting = on;
  return std::exchange(counted, {});
}

// ---- what kernels call ----------------------------------------------------------------------

NO_TSAN std::uint64_t exchange(Call call, unsigned mask, std::uint64_t mine, unsigned source) {
  Warp& warp = whole_warp(mask, call);
  LaneWords& lane = warp.lanes[warp.number & 1][current->thread % kWarp];
  lane.words[0] = static_cast<std::uint32_t>(mine);
  lane.words[1] = static_cast<std::uint32_t>(mine >> 32);
  const LaneWords& other = warp.lanes[meet(warp, call)][source];
  return other.words[0] | static_cast<std::uint64_t>(other.words[1]) << 32;
}

NO_TSAN void gather(Call call, unsigned mask, std::uint32_t mine, std::uint32_t (&all)[kWarp]) {
  Warp& warp = whole_warp(mask, call);
  warp.lanes[warp.number & 1][current->thread % kWarp].words[0] = mine;
  const LaneWords* lanes = warp.lanes[meet(warp, call)];
  for (int i = 0; i < kWarp; ++i) all[i] = lanes[i].words[0];
}

NO_TSAN unsigned vote(Call call, unsigned mask, bool mine) {
  Warp& warp = whole_warp(mask, call);
  if (mine) warp.votes[warp.number & 1] |= 1u << current->thread % kWarp;
  return warp.votes[meet(warp, call)];
}

void begin_copy(void* to, const void* from, int bytes, int valid) {
  if (valid < 0 || valid > bytes) die(who() + "copies " + std::to_string(valid) + " bytes");
  if (!on_boundary(to, bytes) || (valid > 0 && !on_boundary(from, bytes)))
    die(who() + "copies " + std::to_string(bytes) + " bytes off their boundary");
  if (!is_shared(to, bytes)) die(who() + "copies to what is not its block's shared memory");
  std::memset(to, 0xff, bytes);
  count_copy(valid);
  Copies& mine = copies();
  mine.begun.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, mine.groups});
}

void wait_copies(int pending) {
  Copies& mine = copies();
  auto copy = mine.begun.begin();
  for (; copy != mine.begun.end() && copy->group < mine.groups - pending; ++copy) {
    if (copy->valid > 0) std::memcpy(copy->to, copy->from, copy->valid);
    std::memset(copy->to + copy->valid, 0, copy->bytes - copy->valid);
  }
  if (copy != mine.begun.begin()) mine.published = false;
  mine.begun.erase(mine.begun.begin(), copy);
}

namespace {

NO_TSAN double product(std::uint32_t a, std::uint32_t b) {
  return static_cast<double>(float_of(a & 0xffffe000)) * float_of(b & 0xffffe000);
}

NO_TSAN float truncated(double v) {
  const float nearest = static_cast<float>(v);
  if (!(std::fabs(nearest) > std::fabs(v))) return nearest;
  if (std::fabs(v) >= 0x1p128) return nearest;  // it rounds to infinity
  return std::nextafter(nearest, 0.0f);
}

// The values of a that multiply_add_halves takes for row g, or g + 8 if `lower`, in the order in
// which it adds them up: place i of 16 is feature order[i].
constexpr int kOrder[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

// Row g of a, or g + 8 if `lower`, times column c of b.
NO_TSAN float row_by_column(float d, const LaneWords* lanes, int g, bool lower, int c) {
  double sum = d;
  for (int k = 0; k < 8; ++k) {
    const int t = k % 4, right = k / 4;
    sum += product(lanes[4 * g + t].words[2 * right + lower], lanes[4 * c + t].words[4 + right]);
  }
  return truncated(sum);
}

NO_TSAN float row_by_column_of_halves(float d, const LaneWords* lanes, int g, bool lower, int c) {
  double sum = d;
  for (int t = 0; t < 4; ++t)
    for (int right = 0; right < 2; ++right) {
      const float* of_a = lanes[4 * g + t].values + 2 * (2 * right + lower);
      const float* of_b = lanes[4 * c + t].values + 2 * (4 + right);
      for (int i = 0; i < 2; ++i) sum += static_cast<double>(of_a[i]) * of_b[i];
    }
  return truncated(sum);
}

}  // namespace
}  // namespace shim

using namespace shim;

NO_TSAN void wait_for_earlier_launches() {
  if (!current->began) ++block->counts.waited;
}

NO_TSAN char* shared_memory() { return block->memory; }

void commit_copies() { ++copies().groups; }

namespace {

template <class RowByColumn>
NO_TSAN void multiply(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      Call call, const RowByColumn& row_by_column_of) {
  Warp& warp = *current->warp;
  LaneWords& lane = warp.lanes[warp.number & 1][current->thread % kWarp];
  for (int i = 0; i < 4; ++i) lane.words[i] = a[i];
  for (int i = 0; i < 2; ++i) lane.words[4 + i] = b[i];
  if (call == Call::multiply_add_halves)
    for (int i = 0; i < 12; ++i)
      lane.values[i] = half_to_float(static_cast<std::uint16_t>(lane.words[i / 2] >> i % 2 * 16));
  const LaneWords* lanes = warp.lanes[meet(warp, call)];
  const int g = current->thread % kWarp / 4, c = 2 * (current->thread % 4);
  for (int i = 0; i < 4; ++i) d[i] = row_by_column_of(d[i], lanes, g, i / 2, c + i % 2);
}

}  // namespace

NO_TSAN void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply(d, a, b, Call::multiply_add, row_by_column);
}

NO_TSAN void multiply_add_halves(float (&d)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t (&b)[2]) {
  multiply(d, a, b, Call::multiply_add_halves, row_by_column_of_halves);
}

namespace {

// The rows of a that this thread's results need.
NO_TSAN void share_rows(const std::uint32_t (&a)[4], float (&rows)[2][16]) {
  Warp& warp = *current->warp;
  LaneWords& lane = warp.lanes[warp.number & 1][current->thread % kWarp];
  for (int i = 0; i < 4; ++i) lane.words[i] = a[i];
  const LaneWords* lanes = warp.lanes[meet(warp, Call::begin_product)];
  const unsigned g = current->thread % kWarp / 4;
  for (int lower = 0; lower < 2; ++lower)
    for (int i = 0; i < 16; ++i) {
      const std::uint32_t word = lanes[4 * g + i / 4].words[i / 2 % 2 * 2 + lower];
      rows[lower][i] = half_to_float(static_cast<std::uint16_t>(word >> i % 2 * 16));
    }
}

// Operands are read when the thread waits for the product and not before.
void finish(const BegunProduct& begun) {
  if (std::memcmp(begun.a, begun.kept, sizeof begun.kept) != 0)
    die(who() + "changes an operand of a product that is under way");
  Columns& d = *begun.d;
  if (begun.first) std::memcpy(d, begun.was, sizeof begun.was);
  const unsigned t = current->thread % kWarp % 4;
  for (unsigned n = 0; n < 8; ++n)
    for (unsigned odd = 0; odd < 2; ++odd) {
      const std::uint16_t* const column = begun.b + 8 * (8 * n + 2 * t + odd);
      float b[16];
      for (int i = 0; i < 16; ++i)
        b[i] = half_to_float(column[kOrder[i] % 8 + kOrder[i] / 8 * begun.apart / 2]);
      for (unsigned lower = 0; lower < 2; ++lower) {
        float& value = d[n][2 * lower + odd];
        double sum = value;
        for (int i = 0; i < 16; ++i) sum += static_cast<double>(begun.rows[lower][i]) * b[i];
        value = truncated(sum);
      }
    }
}

NO_TSAN bool unpublished() { return block->unpublished; }

}  // namespace

void begin_products() {}
void commit_products() { ++products().groups; }
void publish_shared() { copies().published = true; }

void begin_product(float (&d)[8][4], const std::uint32_t (&a)[4], const void* b, int apart,
                   bool adds) {
  if (unpublished()) die(who() + "multiplies what was not published before a barrier");
  if (!is_shared(b, apart + 64 * 16) || !on_boundary(b, 16) || apart % 16 != 0)
    die(who() + "multiplies what is not an operand in its block's shared memory");
  Products& mine = products();
  BegunProduct begun = {&d, true, {}, a, {a[0], a[1], a[2], a[3]}, {}, nullptr, apart, mine.groups};
  begun.b = static_cast<const std::uint16_t*>(b);
  for (const BegunProduct& other : mine.begun) begun.first = begun.first && other.d != &d;
  if (!begun.first && !adds) die(who() + "drops a product that is under way");
  if (begun.first) {
    if (adds) std::memcpy(begun.was, d, sizeof d);
    std::memset(d, 0xff, sizeof d);
  }
  share_rows(a, begun.rows);
  mine.begun.push_back(begun);
}

namespace shim {

void wait_products(int pending) {
  Products& mine = products();
  auto product = mine.begun.begin();
  for (; product != mine.begun.end() && product->group < mine.groups - pending; ++product)
    finish(*product);
  mine.begun.erase(mine.begun.begin(), product);
}

}  // namespace shim
}  // namespace pfgm

namespace pfgm {
namespace {

// ---- products in tensor memory --------------------------------------------------------------

NO_TSAN TensorMemory& tensor() { return block->tensor; }
NO_TSAN void meet_warp(Call call) { meet(*current->warp, call); }
NO_TSAN void meet_block(Call call) { meet(*block, call); }

NO_TSAN void count_call(Call call) {
  ++block->counts.calls[static_cast<int>(call)];
  current->began = true;
}

float& tensor_at(int row, int column) { return tensor().at[row * kTensorColumns + column]; }

int row_of(std::uint32_t address) { return static_cast<int>(address >> 16); }
int column_of(std::uint32_t address) { return static_cast<int>(address & 0xffff); }

void check_columns(std::uint32_t address, int columns, const char* what) {
  const TensorMemory& all = tensor();
  const int first = column_of(address);
  if (!all.at || first < all.first || first + columns > all.first + all.columns)
    die(who() + what + " tensor memory that its block does not have");
}

void check_rows(std::uint32_t address, int rows) {
  const int row = row_of(address);
  if (row / 32 != static_cast<int>(threadIdx.x / kWarp % 4) || row % rows != 0)
    die(who() + "accesses rows of tensor memory from " + std::to_string(row) + " on");
}

// Calls each(value of a lane, where it is).
template <class Each>
void for_values(float* d, const TensorPlaces& at, const Each& each) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  for (int i = 0; i < at.values; ++i) {
    const int n = i / 4, e = i % 4;
    const bool of_row = at.places == Places::of_row;
    const int row = of_row ? lane : g + 8 * (e / 2), column = of_row ? i : 8 * n + 2 * t + e % 2;
    each(d[i], tensor_at(row_of(at.first) + row, column_of(at.first) + column));
  }
}

bool overlap(ColumnRange a, ColumnRange b) { return a.first < b.end && b.first < a.end; }

// Whether products that are done had their sums there, or their values if this thread stores, and
// it does not know that they are done: neither it nor another thread before a barrier has waited.
NO_TSAN bool are_unknown(ColumnRange columns, bool stores) {
  for (int i = 0; i < kMostSignals; ++i) {
    const Signal& signal = block->tensor.signals[i];
    if (std::max(accesses().known[i], accesses().waited[i]) >= signal.done) continue;
    if (overlap(columns, signal.sums) || (stores && overlap(columns, signal.values))) return true;
  }
  return false;
}

void begin_access(const TensorPlaces& at, Call call) {
  if (!accesses().after_signal) die(who() + "calls " + name(call) + " in no order after a signal");
  const bool of_row = at.places == Places::of_row;
  check_columns(at.first, of_row ? at.values : 2 * at.values, "accesses");
  check_rows(at.first, of_row ? 32 : 16);
  const int first = column_of(at.first), end = first + (of_row ? at.values : 2 * at.values);
  if (are_unknown({first, end}, call == Call::store_tensor_memory))
    die(who() + "calls " + name(call) + " and has not waited for the products there");
  accesses().ordered = false;
  meet_warp(call);
}

// What an operand has in eight values of each of `rows` rows or columns, twice.
std::vector<float> operand(const char* at, int apart, int rows) {
  std::vector<float> values(static_cast<std::size_t>(rows) * 16);
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; ++k) {
      const auto* const eight =
          reinterpret_cast<const std::uint16_t*>(at + k / 8 * apart + 16 * row);
      values[static_cast<std::size_t>(row) * 16 + k] = half_to_float(eight[k % 8]);
    }
  return values;
}

// The same of an operand in tensor memory.
std::vector<float> operand_in_memory(std::uint32_t at) {
  std::vector<float> values(static_cast<std::size_t>(kTensorRows) * 16);
  for (int row = 0; row < kTensorRows; ++row)
    for (int k = 0; k < 16; ++k) {
      const std::uint32_t word = bits_of(tensor_at(row, column_of(at) + k / 2));
      values[static_cast<std::size_t>(row) * 16 + k] =
          half_to_float(static_cast<std::uint16_t>(word >> 16 * (k % 2)));
    }
  return values;
}

// Operands are read when the thread that began the product waits for the signal and not before.
void finish_in_memory(const ProductInMemory& product) {
  const std::vector<float> a = product.a ? operand(product.a, product.a_apart, kTensorRows)
                                         : operand_in_memory(product.a_in_memory);
  const std::vector<float> b = operand(product.b, product.b_apart, product.columns);
  for (int row = 0; row < kTensorRows; ++row)
    for (int column = 0; column < product.columns; ++column) {
      float& value = tensor_at(row, column_of(product.d) + column);
      double sum = product.adds ? value : 0;
      for (int k = 0; k < 16; ++k)
        sum += static_cast<double>(a[static_cast<std::size_t>(row) * 16 + k]) *
               b[static_cast<std::size_t>(column) * 16 + k];
      value = truncated(sum);
    }
}

// The number of a signal that was started, or of a place for one if `at` is null; −1 if there is
// none.
NO_TSAN int number_of_signal(const std::uint64_t* at) {
  for (int i = 0; i < kMostSignals; ++i)
    if (block->tensor.signals[i].at == at) return i;
  return -1;
}
NO_TSAN void name_signal(int number, const std::uint64_t* at) {
  block->tensor.signals[number].at = at;
}
NO_TSAN int sent(int number) { return block->tensor.signals[number].sent; }
NO_TSAN int done(int number) { return block->tensor.signals[number].done; }
NO_TSAN void count_sent(int number) { ++block->tensor.signals[number].sent; }
NO_TSAN char* order_of(int number) { return block->tensor.signals[number].order; }
// The products of a signal are done.
NO_TSAN void count_done(int number, ColumnRange sums, ColumnRange values) {
  Signal& signal = block->tensor.signals[number];
  ++signal.done;
  signal.sums = sums, signal.values = values;
}
NO_TSAN void want(int number, int turn) {
  int& wanted = block->tensor.signals[number].wanted;
  if (wanted <= turn) wanted = turn + 1;
}
NO_TSAN bool wants_more() {
  for (const Signal& signal : block->tensor.signals)
    if (signal.done < signal.wanted) return true;
  return false;
}
NO_TSAN bool is_issuer() { return block->tensor.issuer == static_cast<int>(threadIdx.x); }
// Makes this thread the one that begins products, unless another one is.
NO_TSAN bool becomes_issuer() {
  if (block->tensor.issuer < 0) block->tensor.issuer = static_cast<int>(threadIdx.x);
  return is_issuer();
}

// Computes products in the order in which they were begun, up to those before all signals for which
// threads wait.
void finish_products_in_memory() {
  if (!is_issuer()) return;
  TensorMemory& all = tensor();
  while (wants_more() && !all.begun.empty() && all.begun.front().signal >= 0) {
    const ProductsInMemory& products = all.begun.front();
    const ProductInMemory& first = products.all.front();
    if (first.adds)
      for (int row = 0; row < kTensorRows; ++row)
        for (int column = 0; column < first.columns; ++column)
          tensor_at(row, column_of(first.d) + column) =
              products.was[static_cast<std::size_t>(row) * first.columns + column];
    for (const ProductInMemory& product : products.all) finish_in_memory(product);
    ColumnRange values = {kTensorColumns, 0};
    for (const ProductInMemory& product : products.all)
      if (!product.a) {
        const int at = column_of(product.a_in_memory);
        values = {std::min(values.first, at), std::max(values.end, at + kValueColumns)};
      }
    const int sums = column_of(first.d);
    count_done(products.signal, {sums, sums + first.columns}, values);
    publish(order_of(products.signal));
    all.begun.pop_front();
  }
}

NO_TSAN bool unordered() { return block->unordered; }

void begin_load(const TensorPlaces& from, float* d) {
  begin_access(from, Call::load_tensor_memory);
  std::memset(d, 0xff, sizeof *d * static_cast<unsigned>(from.values));
  accesses().loads.push_back({from, d});
}

// `values` are 32 bits each, of any type.
void begin_store(const TensorPlaces& to, const void* values) {
  begin_access(to, Call::store_tensor_memory);
  TensorStore store = {to, std::vector<float>(static_cast<std::size_t>(to.values))};
  std::memcpy(store.d.data(), values, sizeof(float) * store.d.size());
  for_values(store.d.data(), to, [](float, float& at) { at = NAN; });
  accesses().stores.push_back(store);
}

void check_first_row(std::uint32_t address) {
  if (row_of(address) != 0)
    die(who() + "multiplies in rows of tensor memory from " + std::to_string(row_of(address)) +
        " on");
}

void begin_in_memory(const ProductInMemory& product) {
  if (unpublished()) die(who() + "multiplies what was not published before a barrier");
  if (unordered() || !accesses().after_barrier)
    die(who() + "multiplies in tensor memory in no order after its accesses");
  if (!is_shared(product.b, product.b_apart + product.columns * 16) ||
      !on_boundary(product.b, 16) || product.b_apart % 16 != 0)
    die(who() + "multiplies what is not an operand in its block's shared memory");
  check_columns(product.d, product.columns, "multiplies in");
  check_first_row(product.d);
  if (!becomes_issuer())
    die(who() + "begins products beside those of another thread, which is not emulated");
  TensorMemory& all = tensor();
  if (all.begun.empty() || all.begun.back().signal >= 0) {
    ProductsInMemory fresh;
    for (int row = 0; row < kTensorRows; ++row)
      for (int column = 0; column < product.columns; ++column) {
        float& value = tensor_at(row, column_of(product.d) + column);
        if (product.adds) fresh.was.push_back(value);
        value = NAN;
      }
    all.begun.push_back(fresh);
  }
  std::vector<ProductInMemory>& products = all.begun.back().all;
  if (!products.empty() &&
      (product.d != products.front().d || product.columns != products.front().columns))
    die(who() + "changes the sums of products without a signal, which is not emulated");
  count_call(Call::begin_product_in_memory);
  products.push_back(product);
}

}  // namespace

void start_signal(std::uint64_t* signal) {
  if (!is_shared(signal, sizeof *signal) || !on_boundary(signal, 8))
    die(who() + "starts a signal that is not in its block's shared memory");
  const int number = number_of_signal(nullptr);
  if (number < 0 || number_of_signal(signal) >= 0)
    die(who() + "starts a signal twice, or too many");
  name_signal(number, signal);
  *signal = 0;
}

bool is_elected() {
  meet_warp(Call::is_elected);
  return threadIdx.x % kWarp == 0;
}

void signal_products(std::uint64_t* signal) {
  const int number = signal ? number_of_signal(signal) : -1;
  if (number < 0) die(who() + "sends a signal that was not started");
  TensorMemory& all = tensor();
  if (!is_issuer() || all.begun.empty() || all.begun.back().signal >= 0)
    die(who() + "signals no products of its own");
  if (sent(number) != done(number))
    die(who() + "sends a signal before the last one was waited for");
  count_sent(number);
  all.begun.back().signal = number;
}

void wait_for_signal(std::uint64_t* signal, int turn) {
  const int number = signal ? number_of_signal(signal) : -1;
  if (number < 0) die(who() + "waits for a signal that was not started");
  if (turn != accesses().waited[number]++) die(who() + "waits for signals out of order");
  accesses().after_signal = accesses().after_barrier = false;
  want(number, turn);
  meet_block(Call::wait_for_signal);
  finish_products_in_memory();
  meet_block(Call::wait_for_signal);
  observe(order_of(number));
  if (turn >= done(number)) die(who() + "waits for a signal that never comes");
}

void order_before_barrier() {
  if (!accesses().loads.empty() || !accesses().stores.empty())
    die(who() + "orders accesses of tensor memory that it has not waited for");
  accesses().ordered = true;
}
void order_after_barrier() { accesses().after_barrier = accesses().after_signal = true; }

void load_tensor_memory(float (&d)[4][4], std::uint32_t from) {
  begin_load({from, 16, Places::of_product}, &d[0][0]);
}
void load_tensor_memory(float (&d)[32], std::uint32_t from) {
  begin_load({from, 32, Places::of_row}, d);
}

void store_tensor_memory(std::uint32_t to, const float (&d)[4][4]) {
  begin_store({to, 16, Places::of_product}, &d[0][0]);
}
void store_tensor_memory(std::uint32_t to, const std::uint32_t (&d)[16]) {
  begin_store({to, 16, Places::of_row}, d);
}

void wait_loads() {
  for (const TensorLoad& load : accesses().loads)
    for_values(load.d, load.from, [](float& value, const float& at) { value = at; });
  accesses().loads.clear();
}

void wait_stores() {
  for (TensorStore& store : accesses().stores)
    for_values(store.d.data(), store.to, [](float value, float& at) { at = value; });
  accesses().stores.clear();
}

namespace shim {

void take_tensor_memory(std::uint32_t* at, int columns) {
  if (!is_shared(at, sizeof *at))
    die(who() + "takes tensor memory without a place for its address");
  meet_warp(Call::take_tensor_memory);
  if (threadIdx.x % kWarp != 0) return;
  TensorMemory& all = tensor();
  if (all.at) die(who() + "takes tensor memory a second time, which is not emulated");
  const std::size_t bytes = sizeof(float) * kTensorRows * kTensorColumns;
  all.at = static_cast<float*>(std::malloc(bytes));
  if (!all.at) throw std::bad_alloc();
  std::memset(all.at, 0xff, bytes);
  all.first = kTensorColumns - columns, all.columns = columns;
  *at = static_cast<std::uint32_t>(all.first);
}

void return_tensor_memory(std::uint32_t memory, int columns) {
  if (unordered() || !accesses().after_barrier)
    die(who() + "returns tensor memory in no order after its accesses");
  meet_warp(Call::return_tensor_memory);
  if (threadIdx.x % kWarp != 0) return;
  TensorMemory& all = tensor();
  if (column_of(memory) != all.first || columns != all.columns || !all.begun.empty())
    die(who() + "returns tensor memory that it did not take or uses");
  std::free(all.at);
  all.at = nullptr;
}

void begin_product_in_memory(std::uint32_t d, const void* a, int a_apart, const void* b,
                             int b_apart, int columns, bool adds) {
  if (!is_shared(a, a_apart + kTensorRows * 16) || !on_boundary(a, 16) || a_apart % 16 != 0)
    die(who() + "multiplies what is not an operand in its block's shared memory");
  begin_in_memory({d, static_cast<const char*>(a), static_cast<const char*>(b), a_apart, b_apart,
                   columns, adds, 0});
}

void begin_product_in_memory(std::uint32_t d, std::uint32_t a, const void* b, int b_apart,
                             int columns, bool adds) {
  check_columns(a, kValueColumns, "multiplies values in");
  check_first_row(a);
  begin_in_memory({d, nullptr, static_cast<const char*>(b), 0, b_apart, columns, adds, a});
}

}  // namespace shim
}  // namespace pfgm

using namespace pfgm::shim;

// What is known of signals before a barrier, and after it.
NO_TSAN static void tell_signals() {
  for (int i = 0; i < kMostSignals; ++i) {
    int& known = block->tensor.signals[i].known;
    known = std::max(known, accesses().waited[i]);
  }
}
NO_TSAN static void learn_signals() {
  for (int i = 0; i < kMostSignals; ++i) accesses().known[i] = block->tensor.signals[i].known;
}

NO_TSAN void __syncthreads() {
  unsigned& votes = block->votes[block->number & 1];
  if (!copies().published) votes |= 1;
  if (!accesses().ordered) votes |= 2;
  accesses().after_barrier = false;
  tell_signals();
  const unsigned half = meet_in_order(*block, Call::syncthreads);
  learn_signals();
  block->unpublished = (block->votes[half] & 1) != 0;
  copies().published = false;  // what a thread writes from now on
  block->unordered = (block->votes[half] & 2) != 0;
}

NO_TSAN void __syncwarp(unsigned mask) {
  meet_in_order(whole_warp(mask, Call::syncwarp), Call::syncwarp);
}
