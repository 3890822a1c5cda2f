// Matrix units: mma.sync, ldmatrix, wgmma.
//
// Layouts are those of the PTX ISA. Products are summed up in float64, which holds products of
// float16 exactly, and rounded to the type of the result, or cut (options.truncate).
#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "machine.h"

namespace ptx {
namespace {

constexpr u32 kPoison = 0xffffffffu;

float as_float(u32 b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
u32 as_bits(float v) {
  u32 b;
  std::memcpy(&b, &v, 4);
  return b;
}
float gpu_nan(float v) { return std::isnan(v) ? as_float(0x7fffffffu) : v; }

// To float32, from which float16 is then rounded as from the number itself.
float to_odd(double v) {
  const float f = static_cast<float>(v);
  if (static_cast<double>(f) == v || !std::isfinite(f)) return f;
  return as_float(as_bits(cut(v)) | 1);
}

// c + Σ terms, each aligned to the largest of them and cut below `bits` binary digits behind its
// leading one.
double aligned_sum(double c, const double* terms, int n, int bits) {
  int top = c == 0 ? INT_MIN : std::ilogb(c);
  for (int i = 0; i < n; ++i)
    if (terms[i] != 0) top = std::max(top, std::ilogb(terms[i]));
  if (top == INT_MIN) return c;
  double sum = std::trunc(std::ldexp(c, bits - top));
  for (int i = 0; i < n; ++i) sum += std::trunc(std::ldexp(terms[i], bits - top));
  return std::ldexp(sum, top - bits);
}

// c + Σ terms of an instruction. With options.truncate as in the device's matrix units, which add
// up half of the terms before the others until sm_89, and keep one digit less (Fasi et al., PeerJ
// CS 7:e330; Khattak and Mikaitis, arXiv 2512.07004). They cut each of these sums to float32, or
// round it to float16 if HALF.
template <bool HALF = false>
double sum_of(double c, const double* terms, int n) {
  bool finite = std::isfinite(c);
  double sum = c;
  for (int i = 0; i < n; ++i) finite &= std::isfinite(terms[i]), sum += terms[i];
  if (!options.truncate || !finite) return sum;
  const bool at_once = device.capability >= 90;
  const int together = at_once ? n : n / 2;
  for (int i = 0; i < n; i += together) {
    c = aligned_sum(c, terms + i, together, at_once ? 25 : 24);
    c = HALF ? half_to_float(float_to_half(to_odd(c))) : cut(c);
  }
  return c;
}

// ---- mma.sync -------------------------------------------------------------------------------

// x: 0 tf32, 1 f16, 2 bf16; y: k; z: 1 if c and d are f16. regs: d, a, b, c
void mma(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  if (w.mask != FULL) {
    report("mma without all lanes", &w, &i, 0, "%08x", w.mask);
    return;
  }
  const int k = i.y;
  const bool tf32 = i.x == 0;
  const int na = k / (tf32 ? 2 : 4), nb = na / 2, count_d = i.z ? 2 : 4;
  static thread_local double A[16][16], B[8][16];
  const s32 *d = i.regs.data(), *a = d + count_d, *b = a + na, *c = b + nb;
  const auto number = [&](u32 word, int half) -> double {
    if (tf32) return as_float(word & ~0x1fffu);
    const u16 bits = static_cast<u16>(word >> (16 * half));
    return i.x == 1 ? half_to_float(bits) : bfloat_to_float(bits);
  };
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < na; ++r) {
      const u32 v = w.reg<u32>(a[r])[l];
      const int row = g + 8 * (r % 2);
      if (tf32)
        A[row][t + 4 * (r / 2)] = number(v, 0);
      else
        for (int h = 0; h < 2; ++h) A[row][2 * t + h + 8 * (r / 2)] = number(v, h);
    }
    for (int r = 0; r < nb; ++r) {
      const u32 v = w.reg<u32>(b[r])[l];
      if (tf32)
        B[g][t + 4 * r] = number(v, 0);
      else
        for (int h = 0; h < 2; ++h) B[g][2 * t + h + 8 * r] = number(v, h);
    }
  }
  float out[4][32];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < 4; ++e) {
      const int row = g + 8 * (e / 2), column = 2 * t + e % 2;
      double terms[16];
      for (int j = 0; j < k; ++j) terms[j] = A[row][j] * B[column][j];
      double before;
      if (i.z)
        before = half_to_float(static_cast<u16>(w.reg<u32>(c[e / 2])[l] >> (16 * (e % 2))));
      else
        before = w.reg<float>(c[e])[l];
      if (!i.z) {
        out[e][l] = gpu_nan(static_cast<float>(sum_of(before, terms, k)));
        continue;
      }
      out[e][l] = to_odd(sum_of<true>(before, terms, k));
    }
  }
  for (int l = 0; l < 32; ++l) {
    if (i.z)
      for (int e = 0; e < 2; ++e)
        w.reg<u32>(d[e])[l] = static_cast<u32>(float_to_half(out[2 * e][l])) |
                              static_cast<u32>(float_to_half(out[2 * e + 1][l])) << 16;
    else
      for (int e = 0; e < 4; ++e) w.reg<float>(d[e])[l] = out[e][l];
  }
}

u64 address_of(const Warp& w, const Ins& i, int l) {
  if (i.o[5] < 0) return static_cast<u64>(i.imm);
  if (i.y == 4) return w.reg<u32>(i.o[5])[l] + static_cast<u32>(i.imm);
  return w.reg<u64>(i.o[5])[l] + static_cast<u64>(i.imm);
}
u8* shared_place(Warp& w, const Ins& i, int lane, u64 given, u32 bytes, bool writes) {
  static u8 nowhere[64];
  const u32 at = static_cast<u32>(given);
  if (at % bytes) {
    report("misaligned", &w, &i, lane, "shared address %u of %u bytes", at, bytes);
    return nowhere;
  }
  if (at < kReserved || at + bytes > w.block->shared_end) {
    report("shared memory out of bounds", &w, &i, lane, "address %d",
           static_cast<int>(at) - static_cast<int>(kReserved));
    return nowhere;
  }
  touch_shared(w, i, lane, at, bytes, writes);
  return w.block->shared + at;
}

// x: matrices; z: transposed; vec: 1 stores
void ldmatrix(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  for (int m = 0; m < i.x; ++m) {
    u16 v[8][8];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      std::memcpy(v[r], shared_place(w, i, lane, address_of(w, i, lane), 16, false), 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int r = l / 4, c = 2 * (l % 4);
      w.reg<u32>(i.regs[m])[l] = i.z ? v[c][r] | static_cast<u32>(v[c + 1][r]) << 16
                                     : v[r][c] | static_cast<u32>(v[r][c + 1]) << 16;
    }
  }
}
void stmatrix(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  for (int m = 0; m < i.x; ++m) {
    u16 v[8][8];
    for (int l = 0; l < 32; ++l) {
      const int r = l / 4, c = 2 * (l % 4);
      const u32 word = w.reg<u32>(i.regs[m])[l];
      for (int h = 0; h < 2; ++h)
        (i.z ? v[c + h][r] : v[r][c + h]) = static_cast<u16>(word >> (16 * h));
    }
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      const u32 at = static_cast<u32>(address_of(w, i, lane));
      w.same_value =
          at + 16 <= w.block->shared_end && std::memcmp(w.block->shared + at, v[r], 16) == 0;
      std::memcpy(shared_place(w, i, lane, at, 16, true), v[r], 16);
      w.same_value = false;
    }
  }
}

// ---- operands in shared memory

// An operand of `rows` × 32 bytes (16 values of 2 bytes, or 8 of 4), as the descriptor says.
// Sixteen bytes are a line; a line's bits 4 to 6 are those of the address, xor its bits 7 to 9, of
// which the swizzle takes none, one (32 bytes), two (64) or three (128). Addresses are those of
// shared memory: a pattern begins where the bits 7 to 9 are zero (base offset 0).
//
// K-major: a line has values of one row. Without swizzle eight rows are a core matrix of 128 bytes;
//   the next eight are `stride` away, the next line of a row `leading`. With swizzle of S bytes
//   rows are S bytes apart, eight rows `stride`, and the next line of a row follows it.
// MN-major (transposed, values of 2 bytes): a line has eight rows of one k. Without swizzle eight k
//   are a core matrix; the next eight k are `leading` away, the next eight rows `stride`. With
//   swizzle S bytes of rows are together, k are S bytes apart, eight k `stride`, the next S bytes
//   of rows `leading`.
struct SharedOperand {
  u32 start, leading, stride;
  int swizzle = 0;  // bits
  bool mn_major = false;
  int size = 2;  // bytes of a value
  int values() const { return 32 / size; }
  u32 at(int row, int k) const {
    const u32 r = static_cast<u32>(row), wide = 16u << swizzle;
    const u32 kb = static_cast<u32>(k * size);
    u32 v = start;
    if (!mn_major) {
      v += r / 8 * stride + r % 8 * wide + kb % 16;
      v += swizzle ? kb / 16 * 16 : kb / 16 * leading;
    } else {
      const u32 rb = r * static_cast<u32>(size);
      const u32 e = static_cast<u32>(k);
      v += rb % wide + e % 8 * wide;
      v += swizzle ? rb / wide * leading + e / 8 * stride : rb / wide * stride + e / 8 * leading;
    }
    return v ^ ((v >> 7 & ((1u << swizzle) - 1)) << 4);
  }
};
SharedOperand decode(Warp& w, const Ins& i, u64 d, bool mn_major, int size) {
  SharedOperand o{static_cast<u32>(d & 0x3fff) << 4, static_cast<u32>(d >> 16 & 0x3fff) << 4,
                  static_cast<u32>(d >> 32 & 0x3fff) << 4};
  o.mn_major = mn_major, o.size = size;
  o.swizzle = (4 - static_cast<int>(d >> 62)) % 4;  // 1: 128 bytes, 2: 64, 3: 32
  if ((d >> 46 & 7) || (d >> 52 & 0x3ff)) report("descriptor", &w, &i, 0, "unused bits");
  // Eight rows (K-major) or k begin where the pattern does.
  const u32 pattern = 128u << o.swizzle;
  if (o.swizzle && (o.stride % pattern || (o.mn_major && o.leading % pattern)))
    report("descriptor", &w, &i, 0, "offsets %u and %u that cut a swizzle's pattern", o.leading,
           o.stride);
  if (o.swizzle && (o.start & (pattern - 1) & ~(pattern / 8 - 1)))
    report("descriptor", &w, &i, 0, "start %u within a swizzle's pattern", o.start);
  if (d >> 49 & 7) report("descriptor", &w, &i, 0, "base offset");
  if ((d >> 14 & 3) || (d >> 30 & 3)) report("descriptor", &w, &i, 0, "unused bits");
  return o;
}
// What happens to the 16-byte lines of `rows` rows from `first` on.
template <class Do> void each_line(const SharedOperand& o, int first, int rows, Do what) {
  if (o.mn_major) {
    for (int r = first; r < first + rows; r += 16 / o.size)
      for (int k = 0; k < o.values(); ++k) what(o.at(r, k));
  } else {
    for (int r = first; r < first + rows; ++r)
      for (int k = 0; k < o.values(); k += 16 / o.size) what(o.at(r, k));
  }
}
void begin_reads(Warp& w, const Ins& i, const SharedOperand& o, int rows, int first = 0) {
  each_line(o, first, rows, [&](u32 at) {
    if (at < kReserved || at + 16 > w.block->shared_end) {
      report("operand out of bounds of shared memory", &w, &i, 0, "byte %d",
             static_cast<int>(at) - static_cast<int>(kReserved));
      return;
    }
    for (u32 word = at / 4; word < at / 4 + 4; ++word) {
      Shadow& s = w.block->shadow[word];
      if (s.pending)
        report("an operand whose copy has not ended", &w, &i, 0, "byte %u", at - kReserved);
      // The write must happen before a fence that happens before this: of the writer, of this warp
      // or of another one.
      if (s.wclock >= first_clock()) {
        if (s.wwarp != w.id && w.vc[s.wwarp] < s.wclock)
          report("an operand without a barrier after its write", &w, &i, 0, "byte %u of warp %d",
                 at - kReserved, s.wwarp);
        else if (w.published[s.wwarp] < s.wclock)
          report("an operand that was not published (fence.proxy.async)", &w, &i, 0,
                 "byte %u of warp %d", at - kReserved, s.wwarp);
      }
      if (s.async_reads < 255) ++s.async_reads;
    }
  });
}
void end_reads(Warp& w, const SharedOperand& o, int rows, int first = 0) {
  each_line(o, first, rows, [&](u32 at) {
    if (at < kReserved || at + 16 > w.block->shared_end) return;
    for (u32 word = at / 4; word < at / 4 + 4; ++word) {
      Shadow& s = w.block->shadow[word];
      if (s.async_reads) --s.async_reads;
      s.rclock[w.id] = w.vc[w.id];
    }
  });
}
// Row-major, 16 or 8 values in a row.
void read_operand(const Block& b, const SharedOperand& o, int rows, bool bfloat,
                  std::vector<float>& out, int first = 0) {
  const int n = o.values();
  out.resize(static_cast<size_t>(rows * n));
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < n; ++k) {
      const u32 at = o.at(first + r, k);
      u32 bits = 0xffffffffu;
      if (at >= kReserved && at + static_cast<u32>(o.size) <= b.shared_end)
        std::memcpy(&bits, b.shared + at, static_cast<size_t>(o.size));
      out[static_cast<size_t>(r * n + k)] = o.size == 4 ? as_float(bits & ~0x1fffu)
                                            : bfloat    ? bfloat_to_float(static_cast<u16>(bits))
                                                        : half_to_float(static_cast<u16>(bits));
    }
}

// ---- wgmma

SharedOperand operand_a(Warp& w, const Product& p) {
  return decode(w, *p.ins, p.a_descriptor, p.a_transposed, p.tf32 ? 4 : 2);
}
SharedOperand operand_b(Warp& w, const Product& p) {
  return decode(w, *p.ins, p.b, p.b_transposed, p.tf32 ? 4 : 2);
}

void wgmma_run(Warp& w, const Product& p) {
  static std::vector<float> b;
  float a[16][16];
  read_operand(*w.block, operand_b(w, p), p.n, p.bfloat, b);
  if (p.a_in_shared) {
    static std::vector<float> rows;
    read_operand(*w.block, operand_a(w, p), 16, p.bfloat, rows, p.a_row);
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < p.k; ++k) a[r][k] = rows[static_cast<size_t>(r * p.k + k)];
  } else {
    // The registers as they are now.
    const s32* regs = p.ins->regs.data() + p.d.size();
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r) {
        const u32 word = w.reg<u32>(regs[r])[l];
        if (p.tf32) {
          a[l / 4 + 8 * (r % 2)][l % 4 + 4 * (r / 2)] = as_float(word & ~0x1fffu);
          continue;
        }
        for (int h = 0; h < 2; ++h) {
          const u16 bits = static_cast<u16>(word >> (16 * h));
          a[l / 4 + 8 * (r % 2)][2 * (l % 4) + h + 8 * (r / 2)] =
              p.bfloat ? bfloat_to_float(bits) : half_to_float(bits);
        }
      }
  }
  for (int l = 0; l < 32; ++l)
    for (size_t e = 0; e < p.d.size(); ++e) {
      const int row = l / 4 + 8 * (static_cast<int>(e) / 2 % 2),
                column = 8 * (static_cast<int>(e) / 4) + 2 * (l % 4) + static_cast<int>(e) % 2;
      double terms[16];
      for (int k = 0; k < p.k; ++k)
        terms[k] = static_cast<double>(p.scale_a * a[row][k]) *
                   (p.scale_b * b[static_cast<size_t>(column * p.k + k)]);
      float& d = w.reg<float>(p.d[e])[l];
      d = gpu_nan(static_cast<float>(sum_of(p.adds ? d : 0, terms, p.k)));
    }
}

// o: a descriptor (64 bits) or −1, b descriptor, scale-d; x: 0 f16, 1 bf16, 2 tf32; y: a in shared;
// z: bits: a negated, b negated, a transposed, b transposed; regs: d, a
void wgmma(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  Product p;
  p.n = static_cast<int>(i.imm), p.ins = &i, p.bfloat = i.x == 1, p.tf32 = i.x == 2,
  p.k = p.tf32 ? 8 : 16, p.a_in_shared = i.y;
  p.a_transposed = i.z & 4, p.b_transposed = i.z & 8;
  p.d.assign(i.regs.begin(), i.regs.begin() + p.n / 2);
  p.adds = w.reg<u8>(i.o[2])[0] != 0;
  p.b = w.reg<u64>(i.o[1])[0];
  p.scale_a = static_cast<float>(static_cast<s8>(i.z & 1 ? -1 : 1)),
  p.scale_b = static_cast<float>(i.z & 2 ? -1 : 1);
  if (i.y) p.a_descriptor = w.reg<u64>(i.o[0])[0], p.a_row = 16 * (w.id % 4);
  for (int l = 1; l < 32; ++l)
    if (w.reg<u64>(i.o[1])[l] != p.b || (i.y && w.reg<u64>(i.o[0])[l] != p.a_descriptor))
      report("wgmma: descriptors differ", &w, &i, l, "");
  {
    // The warps of a warpgroup must issue the same products with the same descriptors.
    auto& issued = w.block->issued[w.id / 4];
    const size_t turn = w.issued++;
    if (issued.size() <= turn)
      issued.push_back({&i, p.b, p.a_descriptor, p.adds});
    else if (issued[turn].ins != &i || issued[turn].descriptor != p.b ||
             issued[turn].a_descriptor != p.a_descriptor || issued[turn].adds != p.adds)
      report("wgmma: warps of a warpgroup differ", &w, &i, 0, "");
  }
  {
    // Operands in registers must be as they were at the last fence, but for what products write.
    bool chained = false;
    for (const auto& g : w.products)
      for (const auto& q : g) chained |= q.d[0] == p.d[0];
    for (size_t r = 0; r < i.regs.size(); ++r) {
      if (r < p.d.size() && (chained || !p.adds)) continue;
      if (w.at_fence.empty() || std::memcmp(w.R + i.regs[r], w.at_fence.data() + i.regs[r], 128)) {
        report("wgmma: a register was written after the fence", &w, &i, 0, "%s %zu",
               r < p.d.size() ? "d" : "a", r);
        break;
      }
    }
    if (chained && !p.adds)
      report("wgmma: a result is replaced that nobody has waited for", &w, &i, 0, "");
    // Threads may have read what was waited for. A product may overwrite it after a fence.
    if (!chained && std::count(w.waited_for.begin(), w.waited_for.end(), p.d[0]) > 0)
      report("wgmma: no fence since its registers were waited for", &w, &i, 0, "");
  }
  begin_reads(w, i, operand_b(w, p), p.n);
  if (p.a_in_shared) begin_reads(w, i, operand_a(w, p), 16, p.a_row);
  if (!options.late) {
    wgmma_run(w, p);
  } else {
    // Nothing may use d before the wait; the first product of a chain may read it.
    bool chained = false;
    for (const auto& g : w.products)
      for (const auto& q : g) chained |= q.d[0] == p.d[0];
    if (!chained && p.adds) {
      // keeps the old values beside the registers
      for (const s32 at : p.d)
        for (int l = 0; l < 32; ++l) p.now.push_back(w.reg<float>(at)[l]);
    }
    for (const s32 at : p.d)
      for (int l = 0; l < 32; ++l) w.reg<u32>(at)[l] = kPoison;
  }
  w.products.back().push_back(std::move(p));
}
void wgmma_commit(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  w.products.emplace_back();
}
void wgmma_wait(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  while (static_cast<s64>(w.products.size()) - 1 > i.imm) {
    auto& group = w.products.front();
    for (size_t n = 0; n < group.size(); ++n) {
      Product& p = group[n];
      if (options.late) {
        for (size_t e = 0; e < p.d.size(); ++e)
          for (int l = 0; l < 32; ++l)
            if (w.reg<u32>(p.d[e])[l] != kPoison)
              report("wgmma: a register changed before the wait", &w, p.ins, l, "");
        if (!p.now.empty())
          for (size_t e = 0; e < p.d.size(); ++e)
            for (int l = 0; l < 32; ++l)
              w.reg<float>(p.d[e])[l] = p.now[e * 32 + static_cast<size_t>(l)];
        wgmma_run(w, p);
        // The next product of a chain goes on with the result; nothing else may use it.
        Product* next = nullptr;
        for (size_t g = 0; g < w.products.size() && !next; ++g)
          for (size_t q = g == 0 ? n + 1 : 0; q < w.products[g].size() && !next; ++q)
            if (w.products[g][q].d[0] == p.d[0]) next = &w.products[g][q];
        if (next) {
          next->now.clear();
          for (const s32 at : p.d)
            for (int l = 0; l < 32; ++l) {
              if (next->adds) next->now.push_back(w.reg<float>(at)[l]);
              w.reg<u32>(at)[l] = kPoison;
            }
        }
      }
      w.waited_for.push_back(p.d[0]);
      end_reads(w, operand_b(w, p), p.n);
      if (p.a_in_shared) end_reads(w, operand_a(w, p), 16, p.a_row);
    }
    w.products.erase(w.products.begin());
  }
}
void wgmma_fence(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  w.at_fence.assign(w.R, w.R + w.kernel->registers);
  w.waited_for.clear();
}

// ---- building

void set_address(Builder& b, Ins& i, Operand& a) {
  Operand& base = a.parts.at(0);
  i.imm = a.offset;
  if (base.kind == Operand::reg)
    i.o[5] = base.at, i.y = static_cast<u8>(base.size);
  else
    i.o[5] = -1, i.imm += static_cast<s64>(base.value);
  (void)b;
}

}  // namespace

bool build_matrix(Builder& b, Ins& i) {
  const std::string& n = b.op[0];
  const auto list = [&](int operand) {
    Operand& o = b.operands.at(static_cast<size_t>(operand));
    if (o.kind == Operand::vec)
      for (auto& part : o.parts) i.regs.push_back(b.source(part, 4));
    else
      i.regs.push_back(b.source(o, 4));
  };
  if (n == "mma") {
    if (!b.has("row") || !b.has("col")) return false;
    int k = 0;
    for (const auto& part : b.op)
      if (part.compare(0, 6, "m16n8k") == 0) k = std::atoi(part.c_str() + 6);
    if (k == 0 || k > 16) return false;
    const Ty d = b.type(3), a = b.type(2), bt = b.type(1), c = b.type(0);
    if (a != bt || d != c) return false;
    i.x = a == Ty::tf32 ? 0 : a == Ty::f16 ? 1 : a == Ty::bf16 ? 2 : 255;
    if (i.x == 255 || (i.x == 0 && k > 8)) return false;
    i.y = static_cast<u8>(k), i.z = d == Ty::f16;
    for (int o = 0; o < 4; ++o) list(o);
    const size_t na = static_cast<size_t>(k / (i.x == 0 ? 2 : 4));
    if (i.regs.size() != 2 * (i.z ? 2 : 4) + na + na / 2) return false;
    i.fn = mma;
    return true;
  }
  if (n == "ldmatrix" || n == "stmatrix") {
    if (!b.has("m8n8") || !b.has("b16")) return false;
    const bool loads = n == "ldmatrix";
    set_address(b, i, b.operands.at(loads ? 1 : 0));
    list(loads ? 0 : 1);
    i.x = b.has("x4") ? 4 : b.has("x2") ? 2 : 1, i.z = b.has("trans");
    i.fn = loads ? ldmatrix : stmatrix;
    return i.regs.size() == i.x;
  }
  if (n == "wgmma") {
    if (b.has("fence")) return i.fn = wgmma_fence, true;
    if (b.has("commit_group")) return i.fn = wgmma_commit, true;
    if (b.has("wait_group"))
      return i.imm = static_cast<s64>(b.operands[0].value), i.fn = wgmma_wait, true;
    if (!b.has("mma_async")) return false;
    int k = 0;
    for (const auto& part : b.op)
      if (part.compare(0, 4, "m64n") == 0) {
        i.imm = std::atoi(part.c_str() + 4);
        k = std::atoi(part.c_str() + part.find('k') + 1);
      }
    if (i.imm < 8 || i.imm > 256 || i.imm % 8) return false;
    const Ty d = b.type(2), a = b.type(1);
    if (d != Ty::f32 || (a != Ty::f16 && a != Ty::bf16 && a != Ty::tf32) || a != b.type(0))
      return false;
    i.x = a == Ty::bf16 ? 1 : a == Ty::tf32 ? 2 : 0;
    if (k != (i.x == 2 ? 8 : 16) || b.op.size() != 8) return false;
    list(0);
    if (static_cast<s64>(i.regs.size()) != i.imm / 2) return false;
    i.y = b.operands[1].kind != Operand::vec;
    if (i.y)
      i.o[0] = b.source(1, 8);
    else {
      list(1);
      if (static_cast<s64>(i.regs.size()) != i.imm / 2 + 4) return false;
    }
    i.o[1] = b.source(2, 8), i.o[2] = b.source(3, 0);
    if (b.operands[3].negated) return false;
    // Signs; transposed operands, for values of 2 bytes, of a only if it is in shared memory.
    if (b.operands.size() != (i.x == 2 ? 6u : i.y ? 8u : 7u)) return false;
    const auto number = [&](size_t o) {
      if (b.operands[o].kind != Operand::imm) throw std::runtime_error("no number");
      return static_cast<s64>(b.operands[o].value);
    };
    const s64 sa = number(4), sb = number(5);
    const s64 ta = i.y && i.x != 2 ? number(6) : 0, tb = i.x != 2 ? number(i.y ? 7 : 6) : 0;
    if ((sa != 1 && sa != -1) || (sb != 1 && sb != -1) || (ta & ~1) || (tb & ~1)) return false;
    i.z = static_cast<u8>((sa < 0 ? 1 : 0) | (sb < 0 ? 2 : 0) | (ta ? 4 : 0) | (tb ? 8 : 0));
    i.fn = wgmma;
    return true;
  }
  return false;
}

}  // namespace ptx
