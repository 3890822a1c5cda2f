// An executor of PTX on the CPU: the machine. Written from the PTX ISA, not from any other
// emulator.
//
// A warp executes an instruction for 32 lanes at a time. A virtual register is an array of 32
// values in the warp's register file; immediates are registers that are filled once. Lanes that
// diverge have program counters of their own; those at the lowest one run first and merge with
// others that wait further down. Warps of a block run one after another until each waits.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
constexpr u32 FULL = 0xffffffffu;
constexpr u32 kReserved =
    1024;  // bytes of shared memory before a block's own, as on sm_80 and later
constexpr u32 kMostShared = 233472;
constexpr int kMostWarps = 32;
constexpr s64 kMostInstructions = 1 << 23;  // of a warp: it would never end

enum class Ty : u8 {
  none,
  pred,
  b8,
  u8,
  s8,
  b16,
  u16,
  s16,
  f16,
  bf16,
  b32,
  u32,
  s32,
  f32,
  tf32,
  f16x2,
  bf16x2,
  b64,
  u64,
  s64,
  f64,
  b128
};
int size_of(Ty t);

struct Warp;
struct Ins;
using Handler = void (*)(Warp&, const Ins&);

// Instructions that are counted in each launch: how often a warp executes them.
enum Counted : u8 { kOthers, kMma, kMmaOfTf32, kShuffle, kBallot, kCounted };
extern u64 counts[kCounted];

struct Ins {
  Handler fn = nullptr;
  s32 guard = -1;  // offset of a predicate, or -1
  bool negated = false;
  u8 x = 0, y = 0, z = 0;  // of the handler
  Counted counted = kOthers;
  mutable bool reached = false;  // whether a warp has executed it
  u8 vec = 1;
  u16 used = 0;  // bytes of a load that are used (.pragma "used_bytes_mask"); 0 all
  s32 o[6] = {-1, -1, -1, -1, -1, -1};  // offsets of registers
  s64 imm = 0;                          // offset of an address, or another number
  s32 target = -1;
  std::vector<s32> regs;  // of long lists
  s32 line = 0;           // of the text
};

struct Symbol {
  enum Space { shared, global, local, param } space;
  u64 at;  // offset, or host address
  u64 size;
};

struct Param {
  u64 offset, size;
};

struct Module;
struct Kernel {
  std::string name;
  Module* module = nullptr;
  size_t header = 0, body = 0, end = 0;  // places in the text
  bool parsed = false;
  std::vector<Param> params;
  u64 params_size = 0;
  std::vector<Ins> code;
  u32 registers = 0;                                           // bytes of a warp's register file
  std::vector<std::pair<s32, std::pair<int, u64>>> constants;  // offset, (size, value)
  u32 static_shared = 0, local = 0;
  int max_threads[3] = {0, 0, 0};
  int required_threads = 0;
  u32 dynamic_at = 0;    // where dynamic shared memory begins
  u64 instructions = 0;  // that warps have executed
};

struct Module {
  std::string text;
  int target = 0;  // 80
  std::map<std::string, Symbol> symbols;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::string extern_shared;  // its name
  u32 module_shared = 0;
  std::vector<std::unique_ptr<u8[]>> memory;
};

std::unique_ptr<Module> load_module(const std::string& text);
void parse_kernel(Kernel& k);

// ---- options and errors ---------------------------------------------------------------------

struct Options {
  int order = 0;     // of warps and blocks: 0 ascending, 1 descending, ≥ 2 random with this seed
  int preempt = 0;   // random orders: most instructions before another warp runs; 0 none
  int late = 1;      // asynchronous copies take place when they are waited for
  int truncate = 0;  // sums of matrix units: 0 rounded to nearest, 1 cut as by the device's
  int noise = 0;     // of approximate functions: 0 none, else a seed
  int anywhere = 0;  // kernels may use all memory, without checks of races
};
extern Options options;

// The device that programs see. Its matrix units are those of its capability.
struct Device {
  int multiprocessors = 4, capability = 90, shared = 227 << 10;
};
extern Device device;

struct Error {
  std::string kind, text;
  u64 count;
};
extern std::vector<Error> errors;
void report(const char* kind, const Warp* w, const Ins* i, int lane, const char* format, ...);

// ---- memory -----------------------------------------------------------------------------------

// A range of memory that kernels may use.
struct Range {
  u64 from = 0, to = 0;
  std::string name;
  // What was accessed in this launch, by 4-byte word: see check_global.
  struct Word {
    u32 launch = 0, wblock = 0, rblock = 0;
    u8 flags = 0;
    u8 wwarp = 0, wlane = 0;  // that wrote last in the block, and the same as in Shadow
    u32 wclock = 0, wsync = 0;
  };
  std::vector<Word> words;
};
void add_range(const void* at, u64 bytes, const char* name);
Range* find_range(u64 at, u32 bytes);

// ---- the block ----------------------------------------------------------------------------------

// What was done to a word (or a byte) of shared memory.
struct Shadow {
  u32 wclock = 0;  // of the warp that wrote last
  u8 wwarp = 0, wlane = 0, pending = 0, split = 0;
  u32 wsync = 0, rsync = 0;  // numbers of warp barriers then
  u32 wturn = 0;             // the instruction of the warp that wrote last
  u8 rlane = 0, rwarp = 0;
  u32 rclock[kMostWarps] = {};
};

struct Copy {
  u32 to;
  u8 size, valid;
  u64 from;
};
struct LaneCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Block;

enum class State : u8 { running, barrier, yielded, done };

struct Warp {
  Block* block = nullptr;
  Kernel* kernel = nullptr;
  u8* R = nullptr;  // register file
  u32 mask = 0;     // lanes that execute the instruction: they are here, and their guard holds
  u32 here = 0;     // lanes at `pc`
  u32 alive = 0, blocked = 0;
  s32 pc = 0;
  s32 pcs[32];
  bool select = true;  // whether lanes must be chosen again
  bool stop = false;   // whether the warp gives up its turn
  State state = State::running;
  int id = 0;
  int barrier = -1;
  u32 expected = 0;  // threads at the barrier
  u32 syncs = 1;
  u64 executed = 0;
  s64 budget = 0;
  std::vector<LaneCopies> copies;
  u32 vc[kMostWarps] = {};
  std::vector<u8> local;
  bool same_value = false;  // a store changes nothing: it races with no other store of the value

  template <class T> T* reg(s32 at) const { return reinterpret_cast<T*>(R + at); }
};

struct Launch {
  Kernel* kernel;
  u32 grid[3], block[3];
  u32 shared;
  std::vector<u8> params;
};

struct Block {
  const Launch* launch;
  u32 index[3];
  u32 number;  // from 1 on
  u8* shared;  // host address of shared address 0
  u32 shared_end;
  std::vector<Warp>* warps;
  int count;
  Shadow* shadow;                                      // by word
  std::unordered_map<u32, std::vector<Shadow>> bytes;  // of words with parts
};

extern u32 launch_number;
u32 first_clock();  // clocks of earlier blocks are below
void run_launch(const Launch& launch);
void set_here(Warp& w, u32 lanes, s32 pc);
bool converge(Warp& w, const Ins& i, u32 members);
void touch_shared(Warp& w, const Ins& i, int lane, u32 at, u32 size, bool writes);
std::string text_of(const Kernel& k, const Ins& i);

// Handlers of the parser (instructions.cpp, matrix.cpp)
struct Operand {
  enum Kind { none, reg, vec, addr, imm, label, sink } kind = none;
  std::string text;
  s32 at = -1;   // register
  int size = 0;  // bytes of the register; 0 predicate
  bool negated = false;
  u64 value = 0;  // immediate
  bool floating = false;
  s64 offset = 0;
  s32 pair = -1;  // of a|b
  std::vector<Operand> parts;
};
struct Builder {
  Kernel& k;
  std::vector<std::string> op;  // parts of the mnemonic
  std::vector<Operand> operands;
  s32 constant(int size, u64 value);
  s32 scratch(int size);
  bool has(const char* part) const;
  Ty type(int from_end = 0) const;  // types in the mnemonic, the last one first
  int types() const;
  s32 source(int operand, int size);  // a register of this many bytes
  s32 source(Operand& o, int size);
  s32 target(int operand);
};
bool build(Builder& b, Ins& i);         // instructions.cpp
bool build_matrix(Builder& b, Ins& i);  // matrix.cpp

float half_to_float(u16 bits);
u16 float_to_half(float v);
float bfloat_to_float(u16 bits);
u16 float_to_bfloat(float v);
float cut(double v);

#define PTX_LANES(body)                                           \
  do {                                                            \
    if (w.mask == ptx::FULL) {                                    \
      _Pragma("GCC ivdep") for (int l = 0; l < 32; ++l) { body; } \
    } else {                                                      \
      for (ptx::u32 m_ = w.mask; m_; m_ &= m_ - 1) {              \
        const int l = __builtin_ctz(m_);                          \
        body;                                                     \
      }                                                           \
    }                                                             \
  } while (0)

}  // namespace ptx
