// Matrix units: mma.sync, ldmatrix.
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

float as_float(u32 b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
float gpu_nan(float v) { return std::isnan(v) ? as_float(0x7fffffffu) : v; }

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
// CS 7:e330; Khattak and Mikaitis, arXiv 2512.07004). They cut each of these sums to float32.
double sum_of(double c, const double* terms, int n) {
  bool finite = std::isfinite(c);
  double sum = c;
  for (int i = 0; i < n; ++i) finite &= std::isfinite(terms[i]), sum += terms[i];
  if (!options.truncate || !finite) return sum;
  const bool at_once = device.capability >= 90;
  const int together = at_once ? n : n / 2;
  for (int i = 0; i < n; i += together) {
    c = cut(aligned_sum(c, terms + i, together, at_once ? 25 : 24));
  }
  return c;
}

// ---- mma.sync -------------------------------------------------------------------------------

// x: 0 tf32, 1 f16, 2 bf16; y: k. regs: d, a, b, c
void mma(Warp& w, const Ins& i) {
  if (!converge(w, i, FULL)) return;
  if (w.mask != FULL) {
    report("mma without all lanes", &w, &i, 0, "%08x", w.mask);
    return;
  }
  const int k = i.y;
  const bool tf32 = i.x == 0;
  const int na = k / (tf32 ? 2 : 4), nb = na / 2;
  static thread_local double A[16][16], B[8][16];
  const s32 *d = i.regs.data(), *a = d + 4, *b = a + na, *c = b + nb;
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
      out[e][l] = gpu_nan(static_cast<float>(sum_of(w.reg<float>(c[e])[l], terms, k)));
    }
  }
  for (int e = 0; e < 4; ++e)
    for (int l = 0; l < 32; ++l) w.reg<float>(d[e])[l] = out[e][l];
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

// x: matrices; z: transposed
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

// ---- building ------------------------------------------------------------------------------

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
    if (a != bt || d != Ty::f32 || c != Ty::f32) return false;
    i.x = a == Ty::tf32 ? 0 : a == Ty::f16 ? 1 : a == Ty::bf16 ? 2 : 255;
    if (i.x == 255 || (i.x == 0 && k > 8)) return false;
    i.y = static_cast<u8>(k);
    for (int o = 0; o < 4; ++o) list(o);
    const size_t na = static_cast<size_t>(k / (i.x == 0 ? 2 : 4));
    if (i.regs.size() != 8 + na + na / 2) return false;
    i.fn = mma;
    return true;
  }
  if (n == "ldmatrix") {
    if (!b.has("m8n8") || !b.has("b16")) return false;
    set_address(b, i, b.operands.at(1));
    list(0);
    i.x = b.has("x4") ? 4 : b.has("x2") ? 2 : 1, i.z = b.has("trans");
    i.fn = ldmatrix;
    return i.regs.size() == i.x;
  }
  return false;
}

}  // namespace ptx
