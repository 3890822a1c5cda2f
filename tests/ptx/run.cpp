// Warps, blocks, launches, and what they may touch.
#include <dlfcn.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "machine.h"

namespace ptx {

Options options;
Device device;
u64 counts[kCounted];
std::vector<Error> errors;
u32 launch_number = 0;
static u32 clock_floor = 1;  // clocks of earlier blocks are below
u32 first_clock() { return clock_floor; }

std::string text_of(const Kernel& k, const Ins& i) {
  const std::string& t = k.module->text;
  size_t p = k.header;
  for (int line = 0; line < i.line && p < k.end; ++p) line += t[p] == '\n';
  const size_t e = t.find('\n', p);
  std::string s = t.substr(p, std::min<size_t>(e - p, 160));
  while (!s.empty() && std::isspace(static_cast<unsigned char>(s.front()))) s.erase(0, 1);
  return s;
}

void report(const char* kind, const Warp* w, const Ins* i, int lane, const char* format, ...) {
  char what[512];
  va_list list;
  va_start(list, format);
  std::vsnprintf(what, sizeof what, format, list);
  va_end(list);
  const std::string key = std::string(kind) + (w ? " in " + w->kernel->name : "") +
                          (i ? " line " + std::to_string(i->line) : "");
  for (Error& e : errors)
    if (e.kind == key) {
      ++e.count;
      return;
    }
  if (errors.size() > 500) return;
  std::string text = what;
  if (w) {
    char where[160];
    std::snprintf(where, sizeof where, " [block %u,%u,%u of %u,%u,%u warp %d lane %d]",
                  w->block->index[0], w->block->index[1], w->block->index[2],
                  w->block->launch->grid[0], w->block->launch->grid[1], w->block->launch->grid[2],
                  w->id, lane);
    text += where;
    if (i) text += " " + text_of(*w->kernel, *i);
  }
  errors.push_back({key, text, 1});
}

// ---- ranges -------------------------------------------------------------------------------------

static std::map<u64, std::unique_ptr<Range>> ranges;
static Range* last_range = nullptr;

void add_range(const void* at, u64 bytes, const char* name) {
  auto r = std::make_unique<Range>();
  r->from = reinterpret_cast<u64>(at), r->to = r->from + bytes, r->name = name;
  ranges[r->from] = std::move(r);
}
static void remove_range(void* at) {
  ranges.erase(reinterpret_cast<u64>(at));
  last_range = nullptr;
}

// A range from memory.cpp, if that is preloaded.
static Range* find_allocation(u64 at) {
  using Find = bool(u64, u64*, size_t*);
  static auto* const find = reinterpret_cast<Find*>(dlsym(RTLD_DEFAULT, "ptx_allocation"));
  static auto* const watch =
      reinterpret_cast<void (*)(void (*)(void*))>(dlsym(RTLD_DEFAULT, "ptx_watch"));
  u64 from = 0;
  size_t bytes = 0;
  if (!find || !find(at, &from, &bytes)) return nullptr;
  watch(remove_range);
  add_range(reinterpret_cast<void*>(from), bytes, "tensor");
  return ranges[from].get();
}

// The range that holds these bytes, or the one before them that they run past.
Range* find_range(u64 at, u32 bytes) {
  static Range anywhere{4096, u64{1} << 47, "anywhere", {}};
  if (options.anywhere) return &anywhere;
  if (last_range && at >= last_range->from && at + bytes <= last_range->to) return last_range;
  const auto f = ranges.upper_bound(at);
  Range* const before = f == ranges.begin() ? nullptr : std::prev(f)->second.get();
  if (before && at < before->to) return last_range = before;
  if (Range* const found = find_allocation(at)) return last_range = found;
  return before && at < before->to + 4096 ? before : nullptr;
}

// ---- races in shared memory

static void touch(Warp& w, const Ins& i, int lane, u32 at, Shadow& s, bool writes) {
  if (s.pending)
    report("shared memory whose copy or product has not ended", &w, &i, lane, "%s of byte %u",
           writes ? "write" : "read", at - kReserved);
  if (s.wclock >= clock_floor) {
    if (s.wwarp != w.id) {
      if (w.vc[s.wwarp] < s.wclock && !(writes && w.same_value))
        report(writes ? "shared write after write" : "shared read after write", &w, &i, lane,
               "byte %u, of warp %d", at - kReserved, s.wwarp);
    } else if (s.wlane != lane && s.wsync == w.syncs &&
               !(writes && (w.same_value || s.wturn == static_cast<u32>(w.executed)))) {
      report(writes ? "write after write within a warp" : "read after write within a warp", &w, &i,
             lane, "byte %u, of lane %d", at - kReserved, s.wlane);
    }
  }
  if (writes) {
    for (int other = 0; other < w.block->count; ++other)
      if (s.rclock[other] >= clock_floor && other != w.id && w.vc[other] < s.rclock[other])
        report("shared write after read", &w, &i, lane, "byte %u, of warp %d", at - kReserved,
               other);
    if (s.rclock[w.id] >= clock_floor && s.rwarp == w.id && s.rlane != lane && s.rsync == w.syncs)
      report("write after read within a warp", &w, &i, lane, "byte %u, of lane %d", at - kReserved,
             s.rlane);
    s.wwarp = static_cast<u8>(w.id), s.wlane = static_cast<u8>(lane), s.wclock = w.vc[w.id],
    s.wsync = w.syncs;
    s.wturn = static_cast<u32>(w.executed);
  } else {
    s.rclock[w.id] = w.vc[w.id];
    s.rwarp = static_cast<u8>(w.id);
    s.rlane = s.rsync == w.syncs && s.rlane != lane ? 255 : static_cast<u8>(lane);
    s.rsync = w.syncs;
  }
}

void touch_shared(Warp& w, const Ins& i, int lane, u32 at, u32 size, bool writes) {
  for (u32 byte = at; byte < at + size;) {
    Shadow& s = w.block->shadow[byte / 4];
    const u32 end = std::min(at + size, (byte / 4 + 1) * 4);
    if (end - byte == 4 && !s.split) {
      touch(w, i, lane, byte, s, writes);
    } else {
      auto& parts = w.block->bytes[byte / 4];
      if (!s.split || parts.empty()) {
        parts.assign(4, s);
        s.split = 1;
      }
      for (u32 b = byte; b < end; ++b) touch(w, i, lane, b, parts[b % 4], writes);
      // Asynchronous accesses look at the word.
      if (writes)
        s.wwarp = static_cast<u8>(w.id), s.wlane = static_cast<u8>(lane), s.wclock = w.vc[w.id],
        s.wsync = w.syncs;
    }
    byte = end;
  }
}

// ---- warps --------------------------------------------------------------------------------------

void set_here(Warp& w, u32 lanes, s32 pc) {
  for (u32 m = lanes; m; m &= m - 1) w.pcs[__builtin_ctz(m)] = pc;
}

// Whether all members that still run are at this instruction. If not, those that are here wait.
bool converge(Warp& w, const Ins& i, u32 members) {
  const u32 need = members & w.alive;
  if ((w.mask & need) == need) {
    if (w.mask & ~members)
      report("a lane that is no member", &w, &i, __builtin_ctz(w.mask & ~members), "");
    return true;
  }
  set_here(w, w.here, w.pc - 1);
  w.blocked |= w.mask;
  // Lanes whose guard does not hold go on.
  for (u32 m = w.here & ~w.mask; m; m &= m - 1) w.pcs[__builtin_ctz(m)] = w.pc;
  w.select = true;
  return false;
}

static void run_warp(Warp& w) {
  const Ins* code = w.kernel->code.data();
  w.stop = false;
  s32 merge = INT32_MAX;
  w.select = true;
  // Lanes that run together have their counter in w.pc; the others in w.pcs.
  for (;;) {
    if (w.select) {
      w.select = false;
      if (!w.alive) {
        w.state = State::done;
        return;
      }
      s32 low = INT32_MAX;
      for (u32 m = w.alive & ~w.blocked; m; m &= m - 1)
        low = std::min(low, w.pcs[__builtin_ctz(m)]);
      if (low == INT32_MAX) {
        const Ins& at = code[w.pcs[__builtin_ctz(w.alive)]];
        report("lanes wait for each other forever", &w, &at, __builtin_ctz(w.alive),
               "alive %08x blocked %08x", w.alive, w.blocked);
        w.alive = 0, w.state = State::done;
        return;
      }
      u32 here = 0;
      merge = INT32_MAX;
      for (u32 m = w.alive; m; m &= m - 1) {
        const int l = __builtin_ctz(m);
        if (w.pcs[l] == low)
          here |= 1u << l;
        else if (w.pcs[l] > low)
          merge = std::min(merge, w.pcs[l]);
      }
      w.blocked &= ~here;
      w.here = here;
      w.pc = low;
    }
    const Ins& i = code[w.pc++];
    w.mask = w.here;
    ++w.executed;
    if (i.guard >= 0) {
      const u8* p = w.reg<u8>(i.guard);
      u32 holds = 0;
      for (int l = 0; l < 32; ++l) holds |= static_cast<u32>((p[l] != 0) != i.negated) << l;
      w.mask &= holds;
    }
    if (w.mask) ++counts[i.counted], i.reached = true, i.fn(w, i);
    if (w.stop) {
      if (!w.select) set_here(w, w.here, w.pc);
      return;
    }
    if (!w.select && w.pc == merge) set_here(w, w.here, w.pc), w.select = true;
    if (--w.budget == 0) {
      if (!w.select) set_here(w, w.here, w.pc);
      w.state = State::yielded;
      if (static_cast<s64>(w.executed) >= kMostInstructions) {
        report("runs too long", &w, &i, 0, "");
        w.alive = 0, w.state = State::done;
      }
      return;
    }
  }
}

// ---- blocks -------------------------------------------------------------------------------------

struct Workshop {  // memory that blocks use one after another
  std::vector<Warp> warps;
  std::vector<u8> registers, shared;
  std::vector<Shadow> shadow;
  u8* files = nullptr;
  u8* shared_at = nullptr;
};

static std::mt19937 random_engine;

static void run_block(const Launch& launch, Workshop& shop, u32 x, u32 y, u32 z) {
  Kernel& k = *launch.kernel;
  Block b;
  b.launch = &launch;
  b.index[0] = x, b.index[1] = y, b.index[2] = z;
  b.number = 1 + x + launch.grid[0] * (y + launch.grid[1] * z);
  b.shared = shop.shared_at;
  b.shared_end = k.dynamic_at + launch.shared;
  b.warps = &shop.warps;
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  b.count = static_cast<int>((threads + 31) / 32);
  b.shadow = shop.shadow.data();
  std::memset(b.shared, 0xff, b.shared_end);
  const u32 clock = clock_floor;
  for (int id = 0; id < b.count; ++id) {
    Warp& w = shop.warps[id];
    w.block = &b, w.kernel = &k, w.id = id;
    w.R = shop.files + static_cast<u64>(id) * k.registers;
    const u32 mine = std::min<u32>(32, threads - 32 * static_cast<u32>(id));
    w.alive = mine == 32 ? FULL : (1u << mine) - 1;
    w.blocked = 0, w.select = true, w.state = State::running, w.budget = 0;
    std::fill(w.pcs, w.pcs + 32, 0);
    w.copies.assign(32, {});
    std::fill(w.vc, w.vc + kMostWarps, clock - 1);
    w.vc[id] = clock;
    if (k.local) w.local.assign(32ull * k.local, 0xff);
    for (const auto& [at, c] : k.constants)
      for (int l = 0; l < 32; ++l) {
        if (c.first == 0)
          w.R[at + l] = static_cast<u8>(c.second);
        else
          std::memcpy(w.R + at + l * c.first, &c.second, c.first);
      }
    for (int l = 0; l < 32; ++l) {
      const u32 t = 32 * static_cast<u32>(id) + static_cast<u32>(l);
      const u32 special[] = {t % launch.block[0],
                             t / launch.block[0] % launch.block[1],
                             t / (launch.block[0] * launch.block[1]),
                             launch.block[0],
                             launch.block[1],
                             launch.block[2],
                             x,
                             y,
                             z,
                             launch.grid[0],
                             launch.grid[1],
                             launch.grid[2],
                             static_cast<u32>(l),
                             static_cast<u32>(id),
                             (1u << l) - 1,
                             0,
                             0,
                             0,
                             launch.shared};
      for (size_t s = 0; s < sizeof special / 4; ++s)
        std::memcpy(w.R + 128 * s + 4 * static_cast<size_t>(l), &special[s], 4);
    }
  }
  std::vector<int> order(static_cast<size_t>(b.count));
  std::iota(order.begin(), order.end(), 0);
  int idle = 0;
  for (;;) {
    if (options.order == 1) std::sort(order.rbegin(), order.rend());
    if (options.order >= 2) std::shuffle(order.begin(), order.end(), random_engine);
    bool progress = false, left = false;
    for (const int id : order) {
      Warp& w = shop.warps[id];
      if (w.state == State::running || w.state == State::yielded) {
        const u64 before = w.executed;
        w.state = State::running;
        w.budget = options.preempt > 0
                       ? 1 + static_cast<s64>(random_engine() % static_cast<u32>(options.preempt))
                       : kMostInstructions;
        run_warp(w);
        progress |= w.executed - before > 8;
      }
      left |= w.state != State::done;
    }
    if (!left) break;
    // barriers
    for (int bar = 0; bar < 16; ++bar) {
      u32 arrived = 0, running = 0, expected = 0;
      for (int id = 0; id < b.count; ++id) {
        const Warp& w = shop.warps[id];
        if (w.state != State::done) running += 32;
        if (w.state == State::barrier && w.barrier == bar) {
          arrived += 32;
          if (w.expected) {
            if (expected && expected != w.expected)
              report("barrier with two numbers of threads", &w, nullptr, 0, "");
            expected = w.expected;
          }
        }
      }
      if (!arrived) continue;
      if (arrived < (expected ? expected : running)) continue;
      if (expected && arrived > expected)
        report("too many threads at a barrier", &shop.warps[0], nullptr, 0, "%u of %u", arrived,
               expected);
      u32 all[kMostWarps] = {};
      for (int id = 0; id < b.count; ++id) {
        const Warp& w = shop.warps[id];
        if (w.state == State::barrier && w.barrier == bar)
          for (int o = 0; o < b.count; ++o) all[o] = std::max(all[o], w.vc[o]);
      }
      for (int id = 0; id < b.count; ++id) {
        Warp& w = shop.warps[id];
        if (w.state == State::barrier && w.barrier == bar) {
          std::copy(all, all + b.count, w.vc);
          ++w.vc[id];
          w.state = State::running;
          progress = true;
        }
      }
    }
    idle = progress ? 0 : idle + 1;
    if (idle > 1000) {
      for (int id = 0; id < b.count; ++id) {
        const Warp& w = shop.warps[id];
        if (w.state == State::done) continue;
        const Ins& at = k.code[std::max(0, w.pcs[__builtin_ctz(w.alive)] - 1)];
        report("deadlock", &w, &at, 0, "barrier %d", w.state == State::barrier ? w.barrier : -1);
      }
      break;
    }
  }
  u32 top = clock;
  for (int id = 0; id < b.count; ++id) {
    Warp& w = shop.warps[id];
    top = std::max(top, w.vc[id]);
    k.instructions += w.executed;
    w.executed = 0;
    for (const auto& c : w.copies)
      if (!c.open.empty() || !c.groups.empty()) {
        for (const auto& g : c.groups)
          if (!g.empty()) {
            report("a thread ends before its copies", &w, nullptr, 0, "");
            break;
          }
        if (!c.open.empty()) report("a thread ends before its copies", &w, nullptr, 0, "");
      }
  }
  // pending marks of copies that never ended
  for (u32 word = 0; word < (b.shared_end + 3) / 4; ++word)
    shop.shadow[word].pending = 0, shop.shadow[word].split = 0;
  clock_floor = top + 2;
}

void run_launch(const Launch& launch) {
  static Workshop shop;
  Kernel& k = *launch.kernel;
  parse_kernel(k);
  ++launch_number;
  std::fill(counts, counts + kCounted, 0);
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  const int count = static_cast<int>((threads + 31) / 32);
  if (k.dynamic_at + launch.shared > kMostShared + kReserved) {
    report("too much shared memory", nullptr, nullptr, 0, "%s: %u", k.name.c_str(), launch.shared);
    return;
  }
  if (static_cast<int>(shop.warps.size()) < count) shop.warps.resize(static_cast<size_t>(count));
  k.registers = (k.registers + 63) / 64 * 64;
  const u64 bytes = static_cast<u64>(count) * k.registers + 64;
  if (shop.registers.size() < bytes) shop.registers.resize(bytes);
  shop.files = reinterpret_cast<u8*>((reinterpret_cast<u64>(shop.registers.data()) + 63) / 64 * 64);
  std::memset(shop.files, 0xcd, static_cast<u64>(count) * k.registers);
  if (shop.shared.empty()) {
    shop.shared.resize(1 << 19);
    shop.shared_at = reinterpret_cast<u8*>(
        (reinterpret_cast<u64>(shop.shared.data()) + (1 << 18) - 1) >> 18 << 18);
    shop.shadow.resize(1 << 16);
  }
  random_engine.seed(static_cast<u32>(options.order) * 7919u + launch_number);
  const u64 blocks = static_cast<u64>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  std::vector<u32> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (options.order == 1) std::reverse(order.begin(), order.end());
  if (options.order >= 2) std::shuffle(order.begin(), order.end(), random_engine);
  for (const u32 n : order)
    run_block(launch, shop, n % launch.grid[0], n / launch.grid[0] % launch.grid[1],
              n / launch.grid[0] / launch.grid[1]);
}

}  // namespace ptx
