// Instructions but those of matrix units.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "machine.h"

namespace ptx {

// ---- numbers ------------------------------------------------------------------------------------

float half_to_float(u16 bits) { return _cvtsh_ss(bits); }
u16 float_to_half(float v) {
  if (std::isnan(v)) return 0x7fff;
  return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
}
float bfloat_to_float(u16 bits) {
  const u32 b = static_cast<u32>(bits) << 16;
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
u16 float_to_bfloat(float v) {
  u32 b;
  std::memcpy(&b, &v, 4);
  if (std::isnan(v)) return 0x7fff;
  return static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
// Toward zero.
float cut(double v) {
  float f = static_cast<float>(v);
  if (std::fabs(static_cast<double>(f)) > std::fabs(v)) f = std::nextafterf(f, 0.0f);
  return f;
}

namespace {

template <class T> T bits_as(u64 v) {
  T t;
  std::memcpy(&t, &v, sizeof t);
  return t;
}

inline float canonical(float v) {  // NaN of the GPU in float32
  u32 b;
  std::memcpy(&b, &v, 4);
  b = (b & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : b;
  std::memcpy(&v, &b, 4);
  return v;
}
inline double canonical(double v) { return v; }
template <class T> inline T canonical(T v) { return v; }
inline float flush(float v) {
  u32 b;
  std::memcpy(&b, &v, 4);
  b = (b & 0x7f800000u) == 0 ? b & 0x80000000u : b;
  std::memcpy(&v, &b, 4);
  return v;
}

struct Half {
  u16 bits;
};
struct BHalf {
  u16 bits;
};
inline float value(Half h) { return half_to_float(h.bits); }
inline float value(BHalf h) { return bfloat_to_float(h.bits); }

// ---- elementwise operations ----------------------------------------------------------------

template <class D, class A, D (*F)(A)> void one(Warp& w, const Ins& i) {
  D* d = w.reg<D>(i.o[0]);
  const A* a = w.reg<A>(i.o[1]);
  PTX_LANES(d[l] = F(a[l]));
}
template <class D, class A, class B, D (*F)(A, B)> void two(Warp& w, const Ins& i) {
  D* d = w.reg<D>(i.o[0]);
  const A* a = w.reg<A>(i.o[1]);
  const B* b = w.reg<B>(i.o[2]);
  PTX_LANES(d[l] = F(a[l], b[l]));
}
template <class D, class A, class C, D (*F)(A, A, C)> void three(Warp& w, const Ins& i) {
  D* d = w.reg<D>(i.o[0]);
  const A* a = w.reg<A>(i.o[1]);
  const A* b = w.reg<A>(i.o[2]);
  const C* c = w.reg<C>(i.o[3]);
  PTX_LANES(d[l] = F(a[l], b[l], c[l]));
}

template <class T> T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b)));
  } else
    return canonical(a + b);
}
template <class T> T sub(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(static_cast<U>(a) - static_cast<U>(b)));
  } else
    return canonical(a - b);
}
template <class T> T mul(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
  else
    return canonical(a * b);
}
template <class T> T ftz2_add(T a, T b) { return canonical(flush(flush(a) + flush(b))); }
template <class T> T ftz2_sub(T a, T b) { return canonical(flush(flush(a) - flush(b))); }
template <class T> T ftz2_mul(T a, T b) { return canonical(flush(flush(a) * flush(b))); }
template <class T> T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    if constexpr (std::is_signed_v<T>)
      return static_cast<T>((static_cast<__int128>(a) * b) >> 64);
    else
      return static_cast<T>((static_cast<unsigned __int128>(a) * b) >> 64);
  } else {
    using W = std::conditional_t<std::is_signed_v<T>, s64, u64>;
    return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T)));
  }
}
template <class D, class T> D mul_wide(T a, T b) {
  return static_cast<D>(static_cast<D>(a) * static_cast<D>(b));
}
template <class T> T mad_lo(T a, T b, T c) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b) + static_cast<u64>(c));
}
template <class T> T mad_hi(T a, T b, T c) {
  return static_cast<T>(static_cast<u64>(mul_hi(a, b)) + static_cast<u64>(c));
}
template <class D, class T> D mad_wide(T a, T b, D c) {
  return static_cast<D>(static_cast<u64>(mul_wide<D, T>(a, b)) + static_cast<u64>(c));
}
template <class T> T fma_rn(T a, T b, T c) { return canonical(std::fma(a, b, c)); }
template <class T> T fma_ftz(T a, T b, T c) {
  return canonical(flush(std::fma(flush(a), flush(b), flush(c))));
}
template <class T> T divide(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return static_cast<T>(sub<T>(0, a));
    return static_cast<T>(a / b);
  } else
    return canonical(a / b);
}
template <class T> T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <class T> T least(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return a < b ? a : b;
  else {
    if (std::isnan(a)) return canonical(b);
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? a : b;
    return a < b ? a : b;
  }
}
template <class T> T most(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return a > b ? a : b;
  else {
    if (std::isnan(a)) return canonical(b);
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? b : a;
    return a > b ? a : b;
  }
}
template <class T> T least_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? canonical(std::numeric_limits<T>::quiet_NaN())
                                        : least(a, b);
}
template <class T> T most_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? canonical(std::numeric_limits<T>::quiet_NaN())
                                        : most(a, b);
}
template <class T> T absolute(T a) {
  if constexpr (std::is_integral_v<T>)
    return a < 0 ? sub<T>(0, a) : a;
  else
    return canonical(std::fabs(a));
}
template <class T> T negative(T a) {
  if constexpr (std::is_integral_v<T>)
    return sub<T>(0, a);
  else
    return canonical(-a);
}
template <class T> T bit_and(T a, T b) { return a & b; }
template <class T> T bit_or(T a, T b) { return a | b; }
template <class T> T bit_xor(T a, T b) { return a ^ b; }
template <class T> T bit_not(T a) { return static_cast<T>(~a); }
inline u8 pred_not(u8 a) { return a ^ 1; }
template <class T> T identity(T a) { return a; }
template <class T> T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n);
}
template <class T> T shift_right(T a, u32 n) {
  const u32 most = 8 * sizeof(T) - 1;
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(a >> (n > most ? most : n));
  else
    return n > most ? T{0} : static_cast<T>(a >> n);
}
inline u32 funnel_left(u32 lo, u32 hi, u32 n) {
  return static_cast<u32>(((static_cast<u64>(hi) << 32 | lo) << (n & 31)) >> 32);
}
inline u32 funnel_right(u32 lo, u32 hi, u32 n) {
  return static_cast<u32>((static_cast<u64>(hi) << 32 | lo) >> (n & 31));
}
inline u32 funnel_left_clamp(u32 lo, u32 hi, u32 n) {
  n = n > 32 ? 32 : n;
  return static_cast<u32>(n == 32 ? lo : ((static_cast<u64>(hi) << 32 | lo) << n) >> 32);
}
inline u32 funnel_right_clamp(u32 lo, u32 hi, u32 n) {
  n = n > 32 ? 32 : n;
  return static_cast<u32>((static_cast<u64>(hi) << 32 | lo) >> n);
}
inline u32 popc32(u32 a) { return static_cast<u32>(__builtin_popcount(a)); }
inline u32 popc64(u64 a) { return static_cast<u32>(__builtin_popcountll(a)); }
inline u32 clz32(u32 a) { return a ? static_cast<u32>(__builtin_clz(a)) : 32; }
inline u32 clz64(u64 a) { return a ? static_cast<u32>(__builtin_clzll(a)) : 64; }
template <class T> u32 find_top(T v) {
  using U = std::make_unsigned_t<T>;
  U a = static_cast<U>(v);
  if constexpr (std::is_signed_v<T>)
    if (v < 0) a = static_cast<U>(~a);
  return a ? static_cast<u32>(63 - __builtin_clzll(static_cast<u64>(a))) : 0xffffffffu;
}
template <class T> u32 find_top_shift(T v) {
  const u32 at = find_top(v);
  return at == 0xffffffffu ? at : static_cast<u32>(8 * sizeof(T)) - 1 - at;
}
inline u32 reverse32(u32 v) {
  u32 r = 0;
  for (int k = 0; k < 32; ++k) r |= (v >> k & 1) << (31 - k);
  return r;
}
template <class T> T extract(T a, u32 at, u32 n) {
  at &= 0xff, n &= 0xff;
  using U = std::make_unsigned_t<T>;
  const u32 bits = 8 * sizeof(T);
  u64 sign = 0;
  if constexpr (std::is_signed_v<T>) {
    const u32 top = n == 0 ? 0 : std::min(at + n - 1, bits - 1);
    sign = n == 0 ? 0 : (static_cast<U>(a) >> top) & 1;
  }
  U out = 0;
  for (u32 k = 0; k < bits; ++k) {
    const u64 bit = k < n && at + k < bits ? (static_cast<U>(a) >> (at + k)) & 1 : sign;
    out |= static_cast<U>(bit) << k;
  }
  return static_cast<T>(out);
}
template <class T> T insert_bits(T a, T b, u32 at, u32 n) {
  at &= 0xff, n &= 0xff;
  T out = b;
  for (u32 k = 0; k < n && at + k < 8 * sizeof(T); ++k) {
    out &= ~(T{1} << (at + k));
    out |= (a >> k & 1) << (at + k);
  }
  return out;
}
template <class T> void h_insert(Warp& w, const Ins& i) {
  T* d = w.reg<T>(i.o[0]);
  const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
  const u32 *at = w.reg<u32>(i.o[3]), *n = w.reg<u32>(i.o[4]);
  PTX_LANES(d[l] = insert_bits(a[l], b[l], at[l], n[l]));
}
template <class T> void h_extract(Warp& w, const Ins& i) {
  T* d = w.reg<T>(i.o[0]);
  const T* a = w.reg<T>(i.o[1]);
  const u32 *at = w.reg<u32>(i.o[2]), *n = w.reg<u32>(i.o[3]);
  PTX_LANES(d[l] = extract(a[l], at[l], n[l]));
}
inline u32 permute(u32 a, u32 b, u32 c) {
  const u64 all = static_cast<u64>(b) << 32 | a;
  u32 out = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 s = c >> (4 * k) & 15;
    u32 byte = static_cast<u32>(all >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * k);
  }
  return out;
}
void h_lop3(Warp& w, const Ins& i) {
  u32* d = w.reg<u32>(i.o[0]);
  const u32 *a = w.reg<u32>(i.o[1]), *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
  const u32 t = static_cast<u32>(i.imm);
  const auto look = [t](u32 a, u32 b, u32 c) {
    u32 r = 0;
    if (t & 1) r |= ~a & ~b & ~c;
    if (t & 2) r |= ~a & ~b & c;
    if (t & 4) r |= ~a & b & ~c;
    if (t & 8) r |= ~a & b & c;
    if (t & 16) r |= a & ~b & ~c;
    if (t & 32) r |= a & ~b & c;
    if (t & 64) r |= a & b & ~c;
    if (t & 128) r |= a & b & c;
    return r;
  };
  PTX_LANES(d[l] = look(a[l], b[l], c[l]));
}

// float16 and bfloat16, in float32 or float64, then rounded once: a product of two has 22 bits, so
// that float64 holds a fused sum well enough to round it.
template <class H> H rounded(double v);
template <> Half rounded<Half>(double v) {
  // by way of float32 rounded to odd
  float f = static_cast<float>(v);
  if (static_cast<double>(f) != v && !std::isnan(v) && !std::isinf(f)) {
    f = cut(v);
    u32 b;
    std::memcpy(&b, &f, 4);
    b |= 1;
    std::memcpy(&f, &b, 4);
  }
  return {float_to_half(f)};
}
template <> BHalf rounded<BHalf>(double v) {
  float f = static_cast<float>(v);
  if (static_cast<double>(f) != v && !std::isnan(v) && !std::isinf(f)) {
    f = cut(v);
    u32 b;
    std::memcpy(&b, &f, 4);
    b |= 1;
    std::memcpy(&f, &b, 4);
  }
  return {float_to_bfloat(f)};
}
template <class H, int OP> H half_op(H a, H b, H c) {
  const double x = value(a), y = value(b), z = value(c);
  if constexpr (OP == 0) return rounded<H>(x + y);
  if constexpr (OP == 1) return rounded<H>(x - y);
  if constexpr (OP == 2) return rounded<H>(x * y);
  if constexpr (OP == 3) return rounded<H>(x * y + z);
  if constexpr (OP == 4) return rounded<H>(least(x, y));
  if constexpr (OP == 5) return rounded<H>(most(x, y));
  if constexpr (OP == 6) return {static_cast<u16>(a.bits ^ 0x8000)};
  if constexpr (OP == 7) return {static_cast<u16>(a.bits & 0x7fff)};
}
template <class H, int OP, int N> void h_half(Warp& w, const Ins& i) {  // N in a register
  H* d = w.reg<H>(i.o[0]);
  const H *a = w.reg<H>(i.o[1]), *b = w.reg<H>(i.o[2] < 0 ? i.o[1] : i.o[2]),
          *c = w.reg<H>(i.o[3] < 0 ? i.o[1] : i.o[3]);
  PTX_LANES(for (int e = 0; e < N; ++e) d[l * N + e] =
                (half_op<H, OP>(a[l * N + e], b[l * N + e], c[l * N + e])));
}

// ---- approximations -----------------------------------------------------------------------------

// Rounded, or with options.noise up to 2^-22 off, by the bits of the result.
inline double noisy(double v) {
  if (!options.noise || !std::isfinite(v)) return v;
  u64 b;
  std::memcpy(&b, &v, 8);
  b = (b ^ b >> 29 ^ static_cast<u64>(options.noise)) * 0x9e3779b97f4a7c15ull;
  return v * (1 + (static_cast<double>(b >> 11) * 0x1p-52 - 1) * 0x1p-22);
}
inline float approx(double v) { return canonical(flush(static_cast<float>(noisy(v)))); }
float ex2(float a) { return approx(std::exp2(static_cast<double>(flush(a)))); }
float ex2_full(float a) {
  return canonical(static_cast<float>(noisy(std::exp2(static_cast<double>(a)))));
}
float lg2(float a) { return approx(std::log2(static_cast<double>(flush(a)))); }
float lg2_full(float a) {
  return canonical(static_cast<float>(noisy(std::log2(static_cast<double>(a)))));
}
float rcp_ftz(float a) { return approx(1 / static_cast<double>(flush(a))); }
float rcp_f(float a) { return canonical(static_cast<float>(1 / static_cast<double>(a))); }
float sqrt_ftz(float a) { return approx(std::sqrt(static_cast<double>(flush(a)))); }
float sqrt_f(float a) { return canonical(std::sqrt(a)); }
float rsqrt_ftz(float a) { return approx(1 / std::sqrt(static_cast<double>(flush(a)))); }
float rsqrt_f(float a) {
  return canonical(static_cast<float>(1 / std::sqrt(static_cast<double>(a))));
}
float sin_f(float a) { return canonical(static_cast<float>(std::sin(static_cast<double>(a)))); }
float cos_f(float a) { return canonical(static_cast<float>(std::cos(static_cast<double>(a)))); }
float tanh_f(float a) { return canonical(static_cast<float>(std::tanh(static_cast<double>(a)))); }
float div_full(float a, float b) {
  return canonical(static_cast<float>(noisy(static_cast<double>(a) / b)));
}
double upper(double v) {
  u64 b;
  std::memcpy(&b, &v, 8);
  b &= 0xffffffff00000000ull;
  std::memcpy(&v, &b, 8);
  return v;
}
double rcp_gross(double a) { return upper(1 / upper(a)); }
double rsqrt_gross(double a) { return upper(1 / std::sqrt(upper(a))); }
double rcp_d(double a) { return 1 / a; }
double sqrt_d(double a) { return std::sqrt(a); }

// ---- comparisons -----------------------------------------------------------------------------

enum Cmp { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NAN_ };
template <class T, int C> inline bool compare(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const bool nan = std::isnan(a) || std::isnan(b);
    switch (C) {
      case EQ:
        return a == b;
      case NE:
        return !nan && a != b;
      case LT:
        return a < b;
      case LE:
        return a <= b;
      case GT:
        return a > b;
      case GE:
        return a >= b;
      case EQU:
        return nan || a == b;
      case NEU:
        return a != b;
      case LTU:
        return !(a >= b);
      case LEU:
        return !(a > b);
      case GTU:
        return !(a <= b);
      case GEU:
        return !(a < b);
      case NUM:
        return !nan;
      default:
        return nan;
    }
  } else {
    switch (C) {
      case EQ:
        return a == b;
      case NE:
        return a != b;
      case LT:
        return a < b;
      case LE:
        return a <= b;
      case GT:
        return a > b;
      default:
        return a >= b;
    }
  }
}
template <class T> T number(T v) { return v; }
inline float number(Half h) { return value(h); }
// x: 0 no other predicate, 1 and, 2 or, 3 xor; y: whether that one is negated
template <class T, int C> void setp(Warp& w, const Ins& i) {
  u8* d = i.o[0] < 0 ? nullptr : w.reg<u8>(i.o[0]);
  u8* q = i.o[4] < 0 ? nullptr : w.reg<u8>(i.o[4]);
  const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
  using Number = decltype(number(T{}));
  if (i.x == 0 && d && !q) {
    PTX_LANES(d[l] = (compare<Number, C>(number(a[l]), number(b[l]))));
    return;
  }
  const u8* c = i.o[3] < 0 ? nullptr : w.reg<u8>(i.o[3]);
  const auto combine = [&](bool t, int l) {
    const bool s = c ? (c[l] != 0) != (i.y != 0) : true;
    return i.x == 1 ? t && s : i.x == 2 ? t || s : i.x == 3 ? t != s : t;
  };
  PTX_LANES(const bool t = (compare<Number, C>(number(a[l]), number(b[l])));
            const bool p0 = combine(t, l); const bool p1 = combine(!t, l); if (d) d[l] = p0;
            if (q) q[l] = p1);
}
template <class T> Handler setp_of(const std::string& c, bool is_unsigned) {
  if (c == "eq") return setp<T, EQ>;
  if (c == "ne") return setp<T, NE>;
  if (c == "lt" || c == "lo") return setp<T, LT>;
  if (c == "le" || c == "ls") return setp<T, LE>;
  if (c == "gt" || c == "hi") return setp<T, GT>;
  if (c == "ge" || c == "hs") return setp<T, GE>;
  (void)is_unsigned;
  if constexpr (std::is_floating_point_v<decltype(number(T{}))>) {
    if (c == "equ") return setp<T, EQU>;
    if (c == "neu") return setp<T, NEU>;
    if (c == "ltu") return setp<T, LTU>;
    if (c == "leu") return setp<T, LEU>;
    if (c == "gtu") return setp<T, GTU>;
    if (c == "geu") return setp<T, GEU>;
    if (c == "num") return setp<T, NUM>;
    if (c == "nan") return setp<T, NAN_>;
  }
  throw std::runtime_error("comparison " + c);
}
template <class T> void selp(Warp& w, const Ins& i) {
  T* d = w.reg<T>(i.o[0]);
  const T *a = w.reg<T>(i.o[1]), *b = w.reg<T>(i.o[2]);
  const u8* p = w.reg<u8>(i.o[3]);
  PTX_LANES(d[l] = p[l] ? a[l] : b[l]);
}

// ---- moves

template <class T> void mov(Warp& w, const Ins& i) {
  T* d = w.reg<T>(i.o[0]);
  const T* a = w.reg<T>(i.o[1]);
  PTX_LANES(d[l] = a[l]);
}
template <class D, class T, int N> void pack(Warp& w, const Ins& i) {
  D* d = w.reg<D>(i.o[0]);
  const T* a[N];
  for (int e = 0; e < N; ++e) a[e] = w.reg<T>(i.o[1 + e]);
  PTX_LANES(D v = 0; for (int e = 0; e < N; ++e) v |=
                     static_cast<D>(static_cast<D>(a[e][l]) << (8 * sizeof(T) * e));
            d[l] = v);
}
template <class D, class T, int N> void unpack(Warp& w, const Ins& i) {
  const D* d = w.reg<D>(i.o[0]);
  PTX_LANES(const D v = d[l]; for (int e = 0; e < N; ++e) if (i.o[1 + e] >= 0) w.reg<T>(
                                  i.o[1 + e])[l] = static_cast<T>(v >> (8 * sizeof(T) * e)));
}
void cvta(Warp& w, const Ins& i) {  // x: 0 none, 1 shared, 2 local, 3 param; y: to
  u64* d = w.reg<u64>(i.o[0]);
  const u64* a = w.reg<u64>(i.o[1]);
  if (i.z) {  // 32 bits of shared memory
    throw std::runtime_error("cvta of 32 bits");
  }
  const u64 base = i.x == 1   ? reinterpret_cast<u64>(w.block->shared)
                   : i.x == 3 ? reinterpret_cast<u64>(w.block->launch->params.data())
                              : 0;
  const u64 local = reinterpret_cast<u64>(w.local.data());
  PTX_LANES(const u64 b = i.x == 2 ? local + static_cast<u64>(l) * w.kernel->local : base;
            d[l] = i.y ? a[l] - b : a[l] + b);
}
void isspace(Warp& w, const Ins& i) {
  u8* d = w.reg<u8>(i.o[0]);
  const u64* a = w.reg<u64>(i.o[1]);
  const u64 from = reinterpret_cast<u64>(w.block->shared);
  PTX_LANES(const bool shared = a[l] >= from && a[l] < from + (1 << 18);
            d[l] = i.x == 1 ? shared : !shared);
}

// ---- conversions

enum Round { kNone, kRn, kRz, kRm, kRp, kRni, kRzi, kRmi, kRpi, kRna };
template <class I> I to_integer(double v, int mode) {
  if (std::isnan(v)) return sizeof(I) == 8 ? static_cast<I>(u64{1} << 63) : I{0};
  v = mode == kRni   ? std::nearbyint(v)
      : mode == kRmi ? std::floor(v)
      : mode == kRpi ? std::ceil(v)
                     : std::trunc(v);
  const double low = static_cast<double>(std::numeric_limits<I>::min()),
               high = static_cast<double>(std::numeric_limits<I>::max());
  if (v <= low) return std::numeric_limits<I>::min();
  if (v >= high) return std::numeric_limits<I>::max();
  return static_cast<I>(v);
}
template <class D, class S> void cvt_int(Warp& w,
                                         const Ins& i) {  // registers may be wider: o[2], o[3] say
  // read S from a register of i.y bytes, write D to one of i.x bytes
  const u8* s = w.R + i.o[1];
  u8* d = w.R + i.o[0];
  const int ss = i.y, ds = i.x;
  PTX_LANES(S v; std::memcpy(&v, s + l * ss, sizeof v); D r; if (i.z) {
    const __int128 wide = v;
    const __int128 lo = std::numeric_limits<D>::min();
    const __int128 hi = std::numeric_limits<D>::max();
    r = static_cast<D>(wide < lo ? lo : wide > hi ? hi : wide);
  } else r = static_cast<D>(v);
            s64 out = static_cast<s64>(r);
            if (!std::is_signed_v<D>) out = static_cast<s64>(static_cast<u64>(r));
            std::memcpy(d + l * ds, &out, ds));
}
template <class D, class S> void cvt_same(Warp& w, const Ins& i) {  // registers of the types' sizes
  D* d = w.reg<D>(i.o[0]);
  const S* a = w.reg<S>(i.o[1]);
  PTX_LANES(d[l] = static_cast<D>(a[l]));
}
template <class D, class S> void cvt_to_int(Warp& w, const Ins& i) {
  const S* a = w.reg<S>(i.o[1]);
  u8* d = w.R + i.o[0];
  const int ds = i.x;
  PTX_LANES(double v;
            if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, BHalf>) v = value(a[l]);
            else v = static_cast<double>(a[l]); if (i.z) v = flush(static_cast<float>(v));
            const D r = to_integer<D>(v, i.y); s64 out = static_cast<s64>(r);
            std::memcpy(d + l * ds, &out, ds));
}
template <class D, class S> void cvt_from_int(Warp& w, const Ins& i) {
  const u8* s = w.R + i.o[1];
  D* d = w.reg<D>(i.o[0]);
  const int ss = i.y;
  PTX_LANES(
      S v; std::memcpy(&v, s + l * ss, sizeof v);
      if constexpr (std::is_same_v<D, Half>) d[l] = rounded<Half>(static_cast<double>(v));
      else if constexpr (std::is_same_v<D, BHalf>) d[l] = rounded<BHalf>(static_cast<double>(v));
      else if (i.z == kRz && sizeof(D) == 4) d[l] = static_cast<D>(cut(static_cast<double>(v)));
      else d[l] = static_cast<D>(v));
}
template <class D, class S> void cvt_float(Warp& w, const Ins& i) {  // x: round, y: ftz, z: sat
  D* d = w.reg<D>(i.o[0]);
  const S* a = w.reg<S>(i.o[1]);
  PTX_LANES(
      double v; if constexpr (std::is_same_v<S, Half> || std::is_same_v<S, BHalf>) v = value(a[l]);
      else v = static_cast<double>(a[l]);
      if (i.x >= kRni && i.x <= kRpi) v = i.x == kRni   ? std::nearbyint(v)
                                          : i.x == kRzi ? std::trunc(v)
                                          : i.x == kRmi ? std::floor(v)
                                                        : std::ceil(v);
      if (i.z) v = v > 0 ? (v < 1 ? v : 1) : 0; if constexpr (std::is_same_v<D, Half>) {
        d[l] = i.x == kRz ? Half{static_cast<u16>(_cvtss_sh(cut(v), _MM_FROUND_TO_ZERO))}
                          : rounded<Half>(v);
      } else if constexpr (std::is_same_v<D, BHalf>) {
        if (i.x == kRz) {
          const float c = cut(v);
          u32 b;
          std::memcpy(&b, &c, 4);
          d[l] = BHalf{static_cast<u16>(b >> 16)};
        } else
          d[l] = rounded<BHalf>(v);
      } else if constexpr (sizeof(D) == 4) {
        float r = i.x == kRz ? cut(v) : static_cast<float>(v);
        if (i.x == kRm && static_cast<double>(r) > v) r = std::nextafterf(r, -INFINITY);
        if (i.x == kRp && static_cast<double>(r) < v) r = std::nextafterf(r, INFINITY);
        if (i.y) r = flush(r);
        d[l] = canonical(r);
      } else d[l] = v);
}
template <class H> void cvt_pair(Warp& w,
                                 const Ins& i) {  // d = {upper a, lower b}; x: round, y: relu
  u32* d = w.reg<u32>(i.o[0]);
  const float *a = w.reg<float>(i.o[1]), *b = w.reg<float>(i.o[2]);
  const auto half = [&](float v) -> u32 {
    if (i.y && !(v > 0) && !std::isnan(v)) v = 0;
    if (i.x == kRz && std::is_same_v<H, Half>)
      return static_cast<u16>(_cvtss_sh(v, _MM_FROUND_TO_ZERO));
    if (i.x == kRz) {
      u32 bits;
      std::memcpy(&bits, &v, 4);
      return bits >> 16;
    }
    if constexpr (std::is_same_v<H, Half>)
      return float_to_half(v);
    else
      return float_to_bfloat(v);
  };
  PTX_LANES(d[l] = half(a[l]) << 16 | half(b[l]));
}
void cvt_tf32(Warp& w, const Ins& i) {  // x: rna or rn
  u32* d = w.reg<u32>(i.o[0]);
  const u32* a = w.reg<u32>(i.o[1]);
  const auto round = [&](u32 v) -> u32 {
    if ((v & 0x7f800000u) == 0x7f800000u) return (v & 0x7fffffu) ? 0x7fffffffu : v;
    if (i.x == kRna) return (v + 0x1000u) & ~0x1fffu;
    return (v + 0xfffu + (v >> 13 & 1)) & ~0x1fffu;
  };
  PTX_LANES(d[l] = round(a[l]));
}

// ---- memory

enum Space : u8 { kGlobal, kShared, kLocal, kParam, kGeneric };
alignas(64) u8 nowhere[256];
void check_global(Warp& w, const Ins& i, int lane, Range& range, u64 at, u32 bytes, bool writes,
                  bool atomic) {
  if (range.words.empty()) range.words.resize((range.to - range.from + 3) / 4 + 1);
  const u32 me = w.block->number;
  for (u64 word = (at - range.from) / 4; word <= (at + bytes - 1 - range.from) / 4; ++word) {
    auto& s = range.words[word];
    if (s.launch != launch_number) s = {launch_number};
    // flags: 1 the write was atomic, 2 several blocks read, 4 it wrote a part of the word
    if (s.wblock && s.wblock != me && !(atomic && (s.flags & 1)))
      report(writes ? "global write after write" : "global read after write", &w, &i, lane,
             "%s + %llu: block %u and block %u", range.name.c_str(),
             (unsigned long long)(at - range.from), s.wblock, me);
    if (writes && !atomic && s.rblock && (s.rblock != me || (s.flags & 2)))
      report("global write after read", &w, &i, lane, "%s + %llu: block %u and block %u",
             range.name.c_str(), (unsigned long long)(at - range.from), s.rblock, me);
    const bool other = s.wwarp != w.id, at_once = s.wlane != lane && s.wsync == w.syncs;
    if (!writes && s.wblock == me && !(s.flags & 5) && (other ? w.vc[s.wwarp] < s.wclock : at_once))
      report("global read after write in a block", &w, &i, lane, "%s + %llu: warp %d lane %d",
             range.name.c_str(), (unsigned long long)(at - range.from), s.wwarp, s.wlane);
    if (writes) {
      s.wblock = me;
      s.flags = static_cast<u8>((s.flags & 2) | (atomic ? 1 : 0) | (bytes < 4 ? 4 : 0));
      s.wwarp = static_cast<u8>(w.id), s.wlane = static_cast<u8>(lane);
      s.wclock = w.vc[w.id], s.wsync = w.syncs;
    } else {
      if (s.rblock && s.rblock != me) s.flags |= 2;
      s.rblock = me;
    }
  }
}

template <int SPACE> u8* place(Warp& w, const Ins& i, int lane, u64 at, u32 bytes, bool writes,
                               bool atomic = false) {
  if (at % bytes != 0 && !(SPACE == kGeneric)) {
    report("misaligned", &w, &i, lane, "address 0x%llx of %u bytes", (unsigned long long)at, bytes);
    return nowhere;
  }
  if constexpr (SPACE == kShared) {
    at &= 0xffffffffu;
    if (at < kReserved || at + bytes > w.block->shared_end) {
      report("shared memory out of bounds", &w, &i, lane, "%s address %lld of %u",
             writes ? "write" : "read", (long long)at - kReserved, w.block->shared_end - kReserved);
      return nowhere;
    }
    touch_shared(w, i, lane, static_cast<u32>(at), bytes, writes);
    return w.block->shared + at;
  } else if constexpr (SPACE == kParam) {
    if (at + bytes > w.block->launch->params.size()) {
      report("parameter out of bounds", &w, &i, lane, "at %llu", (unsigned long long)at);
      return nowhere;
    }
    return const_cast<u8*>(w.block->launch->params.data()) + at;
  } else if constexpr (SPACE == kLocal) {
    if (at + bytes > w.kernel->local) {
      report("local memory out of bounds", &w, &i, lane, "at %llu", (unsigned long long)at);
      return nowhere;
    }
    return w.local.data() + static_cast<u64>(lane) * w.kernel->local + at;
  } else if constexpr (SPACE == kGeneric) {
    const u64 from = reinterpret_cast<u64>(w.block->shared),
              local = reinterpret_cast<u64>(w.local.data());
    const u64 params = reinterpret_cast<u64>(w.block->launch->params.data());
    if (at >= from && at < from + (1 << 18))
      return place<kShared>(w, i, lane, at - from, bytes, writes);
    if (!w.local.empty() && at >= local && at < local + w.local.size())
      return place<kLocal>(w, i, lane, at - local - static_cast<u64>(lane) * w.kernel->local, bytes,
                           writes);
    if (at >= params && at < params + w.block->launch->params.size())
      return reinterpret_cast<u8*>(at);
    return place<kGlobal>(w, i, lane, at, bytes, writes, atomic);
  } else {
    Range* const r = find_range(at, bytes);
    if (!r || at + bytes > r->to) {
      report("global memory out of bounds", &w, &i, lane, "%s of %u bytes at 0x%llx%s%s",
             writes ? "write" : "read", bytes, (unsigned long long)at,
             r ? ", past the end of " : "", r ? r->name.c_str() : "");
      return nowhere;
    }
    if (!options.anywhere) check_global(w, i, lane, *r, at, bytes, writes, atomic);
    return reinterpret_cast<u8*>(at);
  }
}

inline u64 address(const Warp& w, const Ins& i, int l) {
  if (i.o[5] < 0) return static_cast<u64>(i.imm);
  if (i.y == 4)
    return static_cast<u64>(static_cast<u32>(w.reg<u32>(i.o[5])[l] + static_cast<u32>(i.imm)));
  return w.reg<u64>(i.o[5])[l] + static_cast<u64>(i.imm);
}

// Values of type T in memory, registers of type R.
template <int SPACE, class T, class R> void load(Warp& w, const Ins& i) {
  const int n = i.vec;
  const s32* o = n > 4 ? i.regs.data() : i.o;
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (i.used) {  // the other values are not read
      const u64 at = address(w, i, l);
      if (at % (n * sizeof(T)))
        report("misaligned", &w, &i, l, "address 0x%llx", (unsigned long long)at);
      for (int e = 0; e < n; ++e) {
        T v{};
        if (i.used >> (e * sizeof(T)) & 1)
          std::memcpy(&v,
                      place<SPACE>(w, i, l, at + static_cast<u64>(e) * sizeof(T), sizeof(T), false),
                      sizeof v);
        else
          std::memset(&v, 0xff, sizeof v);
        if (o[e] >= 0) w.reg<R>(o[e])[l] = static_cast<R>(v);
      }
      continue;
    }
    const u8* p = place<SPACE>(w, i, l, address(w, i, l), static_cast<u32>(n * sizeof(T)), false);
    for (int e = 0; e < n; ++e) {
      T v;
      std::memcpy(&v, p + e * sizeof(T), sizeof v);
      if (o[e] >= 0) w.reg<R>(o[e])[l] = static_cast<R>(v);
    }
  }
}
template <int SPACE, class T, class R> void store(Warp& w, const Ins& i) {
  const int n = i.vec;
  const s32* o = n > 4 ? i.regs.data() : i.o;
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    T values[8];
    for (int e = 0; e < n; ++e) values[e] = static_cast<T>(w.reg<R>(o[e])[l]);
    if (SPACE == kShared) {
      const u32 at = static_cast<u32>(address(w, i, l));
      w.same_value = at + n * sizeof(T) <= w.block->shared_end &&
                     std::memcmp(w.block->shared + at, values, n * sizeof(T)) == 0;
    }
    u8* p = place<SPACE>(w, i, l, address(w, i, l), static_cast<u32>(n * sizeof(T)), true);
    w.same_value = false;
    std::memcpy(p, values, n * sizeof(T));
  }
}
template <template <int, class, class> class Access, class T, class R> Handler in_space(int space) {
  switch (space) {
    case kGlobal:
      return Access<kGlobal, T, R>::run;
    case kShared:
      return Access<kShared, T, R>::run;
    case kLocal:
      return Access<kLocal, T, R>::run;
    case kParam:
      return Access<kParam, T, R>::run;
    default:
      return Access<kGeneric, T, R>::run;
  }
}
template <int SPACE, class T, class R> struct Load {
  static void run(Warp& w, const Ins& i) { load<SPACE, T, R>(w, i); }
};
template <int SPACE, class T, class R> struct Store {
  static void run(Warp& w, const Ins& i) { store<SPACE, T, R>(w, i); }
};
template <template <int, class, class> class Access> Handler access_of(Ty t, int reg, int space) {
  const bool sign = t == Ty::s8 || t == Ty::s16 || t == Ty::s32 || t == Ty::s64;
  switch (size_of(t) * 100 + reg * 10 + (sign ? 1 : 0)) {
    case 120:
      return in_space<Access, u8, u16>(space);
    case 121:
      return in_space<Access, s8, s16>(space);
    case 140:
      return in_space<Access, u8, u32>(space);
    case 141:
      return in_space<Access, s8, s32>(space);
    case 180:
      return in_space<Access, u8, u64>(space);
    case 181:
      return in_space<Access, s8, s64>(space);
    case 220:
    case 221:
      return in_space<Access, u16, u16>(space);
    case 240:
      return in_space<Access, u16, u32>(space);
    case 241:
      return in_space<Access, s16, s32>(space);
    case 280:
      return in_space<Access, u16, u64>(space);
    case 281:
      return in_space<Access, s16, s64>(space);
    case 440:
    case 441:
      return in_space<Access, u32, u32>(space);
    case 480:
      return in_space<Access, u32, u64>(space);
    case 481:
      return in_space<Access, s32, s64>(space);
    case 880:
    case 881:
      return in_space<Access, u64, u64>(space);
  }
  throw std::runtime_error("type of an access");
}

// ---- atomics

enum AtomOp : u8 { kAdd, kMin, kMax, kExch, kCas, kAnd, kOr, kXor, kInc, kDec };
template <class T> T apply(int op, T old, T b, T c) {
  switch (op) {
    case kAdd:
      return add<T>(old, b);
    case kMin:
      return least<T>(old, b);
    case kMax:
      return most<T>(old, b);
    case kExch:
      return b;
    case kCas:
      return old == b ? c : old;
    default:
      break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case kAnd:
        return static_cast<T>(old & b);
      case kOr:
        return static_cast<T>(old | b);
      case kXor:
        return static_cast<T>(old ^ b);
      case kInc:
        return old >= b ? T{0} : static_cast<T>(old + 1);
      case kDec:
        return old == 0 || old > b ? b : static_cast<T>(old - 1);
    }
  }
  return old;
}
template <class T> void atom(Warp& w, const Ins& i) {  // o: d, b, c, -, -, address; x: op; z: space
  std::vector<int> lanes;
  for (u32 m = w.mask; m; m &= m - 1) lanes.push_back(__builtin_ctz(m));
  if (options.order == 1) std::reverse(lanes.begin(), lanes.end());
  for (const int l : lanes) {
    u8* p = i.z == kShared
                ? w.block->shared + (address(w, i, l) & 0xffffffff)  // races of atomics are none
                : place<kGeneric>(w, i, l, address(w, i, l), sizeof(T), true, true);
    T old;
    std::memcpy(&old, p, sizeof old);
    const T b = w.reg<T>(i.o[1])[l], c = i.o[2] < 0 ? T{} : w.reg<T>(i.o[2])[l];
    const T now = apply<T>(i.x, old, b, c);
    std::memcpy(p, &now, sizeof now);
    if (i.o[0] >= 0) w.reg<T>(i.o[0])[l] = old;
  }
}

// ---- asynchronous copies

void arrive(Warp& w, const Ins& i, int lane, const Copy& c) {
  u8* to = w.block->shared + c.to;
  if (c.valid) std::memcpy(to, reinterpret_cast<const u8*>(c.from), c.valid);
  std::memset(to + c.valid, 0, c.size - c.valid);
  for (u32 word = c.to / 4; word < (c.to + c.size) / 4; ++word) {
    Shadow& s = w.block->shadow[word];
    if (s.pending) --s.pending;
    s.wwarp = static_cast<u8>(w.id), s.wlane = static_cast<u8>(lane), s.wclock = w.vc[w.id],
    s.wsync = w.syncs;
  }
  (void)i;
}
void cp_async(Warp& w, const Ins& i) {  // o: valid, -, -, -, to, from; x: bytes
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const u32 to = w.reg<u32>(i.o[4])[l] + static_cast<u32>(i.target);
    const u32 valid = i.o[0] < 0 ? i.x : w.reg<u32>(i.o[0])[l];
    if (valid > i.x) report("cp.async", &w, &i, l, "source size %u", valid);
    const u64 from = address(w, i, l);
    if (from % i.x)
      report("misaligned", &w, &i, l, "cp.async from 0x%llx", (unsigned long long)from);
    u8* at = place<kShared>(w, i, l, to, i.x, true);
    if (at == nowhere) continue;
    if (valid) {
      // Bytes beyond `valid` are not read.
      const u8* p = place<kGlobal>(w, i, l, from & ~u64{0}, 1, false);
      if (p == nowhere) continue;
      if (valid > 1 && place<kGlobal>(w, i, l, from + valid - 1, 1, false) == nowhere) continue;
    }
    const Copy c = {to, i.x, static_cast<u8>(valid), from};
    if (!options.late) {
      arrive(w, i, l, c);
      continue;
    }
    std::memset(at, 0xff, i.x);
    for (u32 word = to / 4; word < (to + i.x) / 4; ++word) ++w.block->shadow[word].pending;
    w.copies[l].open.push_back(c);
  }
}
void cp_commit(Warp& w, const Ins&) {
  for (u32 m = w.mask; m; m &= m - 1) {
    auto& c = w.copies[__builtin_ctz(m)];
    c.groups.push_back(std::move(c.open));
    c.open.clear();
  }
}
void cp_wait(Warp& w, const Ins& i) {  // imm: groups that may be pending; x: wait_all
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    auto& c = w.copies[l];
    if (i.x) c.groups.push_back(std::move(c.open)), c.open.clear();
    while (static_cast<s64>(c.groups.size()) > i.imm) {
      for (const Copy& each : c.groups.front()) arrive(w, i, l, each);
      c.groups.pop_front();
    }
  }
}

// ---- a warp together

// x: mode (0 up, 1 down, 2 bfly, 3 idx); o: d, a, b, c, members, p
void shfl(Warp& w, const Ins& i) {
  const u32 first = static_cast<u32>(__builtin_ctz(w.mask));
  const u32 members = w.reg<u32>(i.o[4])[first];
  if (!converge(w, i, members)) return;
  u32 source[32];
  std::memcpy(source, w.R + i.o[1], sizeof source);
  u32* d = i.o[0] < 0 ? nullptr : w.reg<u32>(i.o[0]);
  u8* p = i.o[5] < 0 ? nullptr : w.reg<u8>(i.o[5]);
  const u32 *b = w.reg<u32>(i.o[2]), *c = w.reg<u32>(i.o[3]);
  u32 bs[32], cs[32];
  std::memcpy(bs, b, sizeof bs), std::memcpy(cs, c, sizeof cs);
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const int bv = static_cast<int>(bs[l] & 31), seg = static_cast<int>(cs[l] >> 8 & 31),
              cv = static_cast<int>(cs[l] & 31);
    const int max = (l & seg) | (cv & ~seg), min = l & seg;
    int j;
    bool in;
    switch (i.x) {
      case 0:
        j = l - bv, in = j >= max;
        break;
      case 1:
        j = l + bv, in = j <= max;
        break;
      case 2:
        j = l ^ bv, in = j <= max;
        break;
      default:
        j = min | (bv & ~seg), in = j <= max;
    }
    if (!in) j = l;
    if (!(w.mask >> j & 1))
      report("shfl from a lane that does not take part", &w, &i, l, "lane %d", j);
    if (d) d[l] = source[j];
    if (p) p[l] = in;
  }
}
u32 ballot(const Warp& w, const u8* p, bool negated) {
  u32 out = 0;
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if ((p[l] != 0) != negated) out |= 1u << l;
  }
  return out;
}
void vote(Warp& w, const Ins& i) {  // x: 0 ballot, 1 all, 2 any, 3 uni; o: d, p, members
  const u32 members = w.reg<u32>(i.o[2])[__builtin_ctz(w.mask)];
  if (!converge(w, i, members)) return;
  const u32 all = ballot(w, w.reg<u8>(i.o[1]), i.y);
  const u32 mask = w.mask;
  for (u32 m = mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (i.x == 0)
      w.reg<u32>(i.o[0])[l] = all;
    else
      w.reg<u8>(i.o[0])[l] = i.x == 1 ? all == mask : i.x == 2 ? all != 0 : all == 0 || all == mask;
  }
}
template <class T> void redux(Warp& w, const Ins& i) {  // x: op
  const u32 members = w.reg<u32>(i.o[2])[__builtin_ctz(w.mask)];
  if (!converge(w, i, members)) return;
  T all{};
  bool first = true;
  for (u32 m = w.mask; m; m &= m - 1) {
    const T v = w.reg<T>(i.o[1])[__builtin_ctz(m)];
    all = first ? v : apply<T>(i.x, all, v, T{});
    first = false;
  }
  for (u32 m = w.mask; m; m &= m - 1) w.reg<T>(i.o[0])[__builtin_ctz(m)] = all;
}
void match_any(Warp& w, const Ins& i) {
  const u32 members = w.reg<u32>(i.o[2])[__builtin_ctz(w.mask)];
  if (!converge(w, i, members)) return;
  u64 v[32];
  for (int l = 0; l < 32; ++l) v[l] = i.y == 8 ? w.reg<u64>(i.o[1])[l] : w.reg<u32>(i.o[1])[l];
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    u32 same = 0;
    for (u32 n = w.mask; n; n &= n - 1)
      if (v[__builtin_ctz(n)] == v[l]) same |= 1u << __builtin_ctz(n);
    w.reg<u32>(i.o[0])[l] = same;
  }
}
void activemask(Warp& w, const Ins& i) {
  u32* d = w.reg<u32>(i.o[0]);
  PTX_LANES(d[l] = w.mask);
}
void elect(Warp& w, const Ins& i) {
  const u32 members = w.reg<u32>(i.o[1])[__builtin_ctz(w.mask)];
  if (!converge(w, i, members)) return;
  // Which lane is chosen is not specified: the last one in one of the orders.
  const int leader = options.order % 2 ? 31 - __builtin_clz(w.mask) : __builtin_ctz(w.mask);
  for (u32 m = w.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    w.reg<u8>(i.o[5])[l] = l == leader;
    if (i.o[0] >= 0) w.reg<u32>(i.o[0])[l] = static_cast<u32>(leader);
  }
}
void bar_warp(Warp& w, const Ins& i) {
  const u32 members = w.reg<u32>(i.o[0])[__builtin_ctz(w.mask)];
  if (!converge(w, i, members)) return;
  ++w.syncs;
}

// ---- control

void bra(Warp& w, const Ins& i) {
  const u32 taken = w.mask;
  if (taken == w.here) {
    w.pc = i.target;
    if (w.here != w.alive) set_here(w, w.here, w.pc), w.select = true;
    return;
  }
  for (u32 m = taken; m; m &= m - 1) w.pcs[__builtin_ctz(m)] = i.target;
  for (u32 m = w.here & ~taken; m; m &= m - 1) w.pcs[__builtin_ctz(m)] = w.pc;
  w.select = true;
}
void ret(Warp& w, const Ins& i) {
  w.alive &= ~w.mask;
  w.blocked &= ~w.mask;
  set_here(w, w.here & ~w.mask, w.pc);
  w.select = true;
}
void trap(Warp& w, const Ins& i) {
  report("trap", &w, &i, __builtin_ctz(w.mask), "");
  ret(w, i);
}
void bar(Warp& w, const Ins& i) {  // o: id, threads; x: 0 sync, 1 arrive
  if (w.mask != w.alive) {
    if (w.mask != w.here) report("barrier under a guard", &w, &i, 0, "");
    if (!converge(w, i, w.alive)) return;
  }
  const int l = __builtin_ctz(w.mask);
  w.barrier = static_cast<int>(w.reg<u32>(i.o[0])[l]);
  w.expected = i.o[1] < 0 ? 0 : w.reg<u32>(i.o[1])[l];
  if (i.x == 1) throw std::runtime_error("bar.arrive");
  w.state = State::barrier;
  w.stop = true;
  ++w.syncs;
}
void nothing(Warp&, const Ins&) {}
// ---- building -----------------------------------------------------------------------------------

bool is_float(Ty t) { return t == Ty::f32 || t == Ty::f64 || t == Ty::f16 || t == Ty::bf16; }

#define INTEGERS(F, ty) \
  switch (ty) {         \
    case Ty::u16:       \
    case Ty::b16:       \
      return F(u16);    \
    case Ty::s16:       \
      return F(s16);    \
    case Ty::u32:       \
    case Ty::b32:       \
      return F(u32);    \
    case Ty::s32:       \
      return F(s32);    \
    case Ty::u64:       \
    case Ty::b64:       \
      return F(u64);    \
    case Ty::s64:       \
      return F(s64);    \
    default:            \
      break;            \
  }
#define NUMBERS(F, ty)  \
  INTEGERS(F, ty)       \
  switch (ty) {         \
    case Ty::f32:       \
      return F(float);  \
    case Ty::f64:       \
      return F(double); \
    default:            \
      break;            \
  }

template <int OP> Handler halves(Ty t) {
  switch (t) {
    case Ty::f16:
      return h_half<Half, OP, 1>;
    case Ty::bf16:
      return h_half<BHalf, OP, 1>;
    case Ty::f16x2:
      return h_half<Half, OP, 2>;
    case Ty::bf16x2:
      return h_half<BHalf, OP, 2>;
    default:
      return nullptr;
  }
}

// add, sub and fma of float32 and shorter types. OP: 0 add, 1 sub, 2 fma
template <class H, int OP> void mixed(Warp& w, const Ins& i) {
  float* d = w.reg<float>(i.o[0]);
  const H *a = w.reg<H>(i.o[1]), *b = w.reg<H>(i.o[2]);
  const float* c = w.reg<float>(i.o[3]);
  PTX_LANES(d[l] = canonical(OP == 0   ? value(a[l]) + c[l]
                             : OP == 1 ? value(a[l]) - c[l]
                                       : std::fma(value(a[l]), value(b[l]), c[l])));
}
template <class T> T most3(T a, T b, T c) { return most(most(a, b), c); }
template <class T> T least3(T a, T b, T c) { return least(least(a, b), c); }

Handler arithmetic(const Builder& b, Ty t) {
  const std::string& n = b.op[0];
  const bool ftz = b.has("ftz"), hi = b.has("hi");
  if (b.has("rz") || b.has("rm") || b.has("rp") || b.has("sat") || b.has("cc") || b.has("relu"))
    throw std::runtime_error("modifier");
  if (ftz && t == Ty::f32) {
    if (n == "add") return two<float, float, float, ftz2_add<float>>;
    if (n == "sub") return two<float, float, float, ftz2_sub<float>>;
    if (n == "mul") return two<float, float, float, ftz2_mul<float>>;
    if (n == "fma" || n == "mad") return three<float, float, float, fma_ftz<float>>;
  }
  if (n == "add") {
    if (Handler h = halves<0>(t)) return h;
#define F(T) (two<T, T, T, add<T>>)
    NUMBERS(F, t)
#undef F
  } else if (n == "sub") {
    if (Handler h = halves<1>(t)) return h;
#define F(T) (two<T, T, T, sub<T>>)
    NUMBERS(F, t)
#undef F
  } else if (n == "mul" && b.has("wide")) {
    switch (t) {
      case Ty::u16:
        return two<u32, u16, u16, mul_wide<u32, u16>>;
      case Ty::s16:
        return two<s32, s16, s16, mul_wide<s32, s16>>;
      case Ty::u32:
        return two<u64, u32, u32, mul_wide<u64, u32>>;
      case Ty::s32:
        return two<s64, s32, s32, mul_wide<s64, s32>>;
      default:
        break;
    }
  } else if (n == "mul" && hi) {
#define F(T) (two<T, T, T, mul_hi<T>>)
    INTEGERS(F, t)
#undef F
  } else if (n == "mul") {
    if (Handler h = halves<2>(t)) return h;
#define F(T) (two<T, T, T, mul<T>>)
    NUMBERS(F, t)
#undef F
  } else if (n == "mad" && b.has("wide")) {
    switch (t) {
      case Ty::u16:
        return three<u32, u16, u32, mad_wide<u32, u16>>;
      case Ty::s16:
        return three<s32, s16, s32, mad_wide<s32, s16>>;
      case Ty::u32:
        return three<u64, u32, u64, mad_wide<u64, u32>>;
      case Ty::s32:
        return three<s64, s32, s64, mad_wide<s64, s32>>;
      default:
        break;
    }
  } else if (n == "mad" && hi) {
#define F(T) (three<T, T, T, mad_hi<T>>)
    INTEGERS(F, t)
#undef F
  } else if (n == "mad" && !is_float(t)) {
#define F(T) (three<T, T, T, mad_lo<T>>)
    INTEGERS(F, t)
#undef F
  } else if (n == "fma" || n == "mad") {
    if (Handler h = halves<3>(t)) return h;
    if (t == Ty::f32) return three<float, float, float, fma_rn<float>>;
    if (t == Ty::f64) return three<double, double, double, fma_rn<double>>;
  } else if (n == "div" && !is_float(t)) {
#define F(T) (two<T, T, T, divide<T>>)
    INTEGERS(F, t)
#undef F
  } else if (n == "div") {
    if (t == Ty::f64) return two<double, double, double, divide<double>>;
    if (t == Ty::f32)
      return b.has("rn") ? two<float, float, float, divide<float>>
                         : two<float, float, float, div_full>;
  } else if (n == "rem") {
#define F(T) (two<T, T, T, remainder<T>>)
    INTEGERS(F, t)
#undef F
  } else if (n == "min" || n == "max") {
    const bool min = n == "min";
    if (b.has("NaN")) {
      if (t == Ty::f32)
        return min ? two<float, float, float, least_nan<float>>
                   : two<float, float, float, most_nan<float>>;
      throw std::runtime_error("NaN");
    }
    if (Handler h = min ? halves<4>(t) : halves<5>(t)) return h;
    if (min) {
#define F(T) (two<T, T, T, least<T>>)
      NUMBERS(F, t)
#undef F
    } else {
#define F(T) (two<T, T, T, most<T>>)
      NUMBERS(F, t)
#undef F
    }
  }
  return nullptr;
}

Handler conversion(Builder& b, Ins& i) {
  const Ty d = b.type(1), s = b.type(0);
  int round = kNone;
  const std::pair<const char*, int> names[] = {{"rn", kRn},   {"rz", kRz},   {"rm", kRm},
                                               {"rp", kRp},   {"rni", kRni}, {"rzi", kRzi},
                                               {"rmi", kRmi}, {"rpi", kRpi}, {"rna", kRna}};
  for (const auto& [name, value] : names)
    if (b.has(name)) round = value;
  if (d == Ty::f16x2 || d == Ty::bf16x2) {
    i.o[0] = b.target(0), i.o[1] = b.source(1, 4), i.o[2] = b.source(2, 4);
    i.x = static_cast<u8>(round), i.y = b.has("relu");
    if (b.has("satfinite")) throw std::runtime_error("satfinite");
    return d == Ty::f16x2 ? cvt_pair<Half> : cvt_pair<BHalf>;
  }
  if (d == Ty::tf32) {
    i.o[0] = b.target(0), i.o[1] = b.source(1, 4), i.x = static_cast<u8>(round);
    return cvt_tf32;
  }
  i.o[0] = b.target(0);
  const int ds = b.operands[0].size;
  const int ss = b.operands[1].kind == Operand::reg ? b.operands[1].size : std::max(2, size_of(s));
  i.o[1] = b.source(1, ss);
  if (!is_float(d) && !is_float(s)) {
    i.x = static_cast<u8>(ds), i.y = static_cast<u8>(ss), i.z = b.has("sat");
    // The common ones are fast.
    if (!i.z && ds == size_of(d) && ss == size_of(s)) {
      if (d == Ty::s64 && s == Ty::s32) return cvt_same<s64, s32>;
      if (d == Ty::u64 && s == Ty::u32) return cvt_same<u64, u32>;
      if (size_of(d) == 4 && size_of(s) == 8) return cvt_same<u32, u64>;
      if (size_of(d) == 2 && size_of(s) == 4) return cvt_same<u16, u32>;
    }
#define TO(S)                 \
  switch (d) {                \
    case Ty::u8:              \
      return cvt_int<u8, S>;  \
    case Ty::s8:              \
      return cvt_int<s8, S>;  \
    case Ty::u16:             \
      return cvt_int<u16, S>; \
    case Ty::s16:             \
      return cvt_int<s16, S>; \
    case Ty::u32:             \
      return cvt_int<u32, S>; \
    case Ty::s32:             \
      return cvt_int<s32, S>; \
    case Ty::u64:             \
      return cvt_int<u64, S>; \
    case Ty::s64:             \
      return cvt_int<s64, S>; \
    default:                  \
      return nullptr;         \
  }
    switch (s) {
      case Ty::u8:
        TO(u8)
      case Ty::s8:
        TO(s8)
      case Ty::u16:
        TO(u16)
      case Ty::s16:
        TO(s16)
      case Ty::u32:
        TO(u32)
      case Ty::s32:
        TO(s32)
      case Ty::u64:
        TO(u64)
      case Ty::s64:
        TO(s64)
      default:
        return nullptr;
    }
#undef TO
  }
  if (!is_float(d)) {
    i.x = static_cast<u8>(ds), i.y = static_cast<u8>(round), i.z = b.has("ftz");
#define TO(S)                    \
  switch (d) {                   \
    case Ty::u8:                 \
      return cvt_to_int<u8, S>;  \
    case Ty::s8:                 \
      return cvt_to_int<s8, S>;  \
    case Ty::u16:                \
      return cvt_to_int<u16, S>; \
    case Ty::s16:                \
      return cvt_to_int<s16, S>; \
    case Ty::u32:                \
      return cvt_to_int<u32, S>; \
    case Ty::s32:                \
      return cvt_to_int<s32, S>; \
    case Ty::u64:                \
      return cvt_to_int<u64, S>; \
    case Ty::s64:                \
      return cvt_to_int<s64, S>; \
    default:                     \
      return nullptr;            \
  }
    switch (s) {
      case Ty::f32:
        TO(float)
      case Ty::f64:
        TO(double)
      case Ty::f16:
        TO(Half)
      case Ty::bf16:
        TO(BHalf)
      default:
        return nullptr;
    }
#undef TO
  }
  if (!is_float(s)) {
    i.y = static_cast<u8>(ss), i.z = static_cast<u8>(round);
#define TO(D)                      \
  switch (s) {                     \
    case Ty::u8:                   \
      return cvt_from_int<D, u8>;  \
    case Ty::s8:                   \
      return cvt_from_int<D, s8>;  \
    case Ty::u16:                  \
      return cvt_from_int<D, u16>; \
    case Ty::s16:                  \
      return cvt_from_int<D, s16>; \
    case Ty::u32:                  \
      return cvt_from_int<D, u32>; \
    case Ty::s32:                  \
      return cvt_from_int<D, s32>; \
    case Ty::u64:                  \
      return cvt_from_int<D, u64>; \
    case Ty::s64:                  \
      return cvt_from_int<D, s64>; \
    default:                       \
      return nullptr;              \
  }
    switch (d) {
      case Ty::f32:
        TO(float)
      case Ty::f64:
        TO(double)
      case Ty::f16:
        TO(Half)
      case Ty::bf16:
        TO(BHalf)
      default:
        return nullptr;
    }
#undef TO
  }
  i.x = static_cast<u8>(round), i.y = b.has("ftz"), i.z = b.has("sat");
  if (b.has("relu")) throw std::runtime_error("relu");
#define TO(D)                      \
  switch (s) {                     \
    case Ty::f32:                  \
      return cvt_float<D, float>;  \
    case Ty::f64:                  \
      return cvt_float<D, double>; \
    case Ty::f16:                  \
      return cvt_float<D, Half>;   \
    case Ty::bf16:                 \
      return cvt_float<D, BHalf>;  \
    default:                       \
      return nullptr;              \
  }
  switch (d) {
    case Ty::f32:
      TO(float)
    case Ty::f64:
      TO(double)
    case Ty::f16:
      TO(Half)
    case Ty::bf16:
      TO(BHalf)
    default:
      return nullptr;
  }
#undef TO
}

void set_address(Builder& b, Ins& i, int operand) {
  Operand& a = b.operands.at(operand);
  if (a.kind != Operand::addr) throw std::runtime_error("no address");
  Operand& base = a.parts[0];
  i.imm = a.offset;
  if (base.kind == Operand::reg)
    i.o[5] = base.at, i.y = static_cast<u8>(base.size);
  else
    i.o[5] = -1, i.imm += static_cast<s64>(base.value), i.y = 8;
}

int space_of(const Builder& b) {
  for (const auto& part : b.op) {
    if (part == "global" || part == "const") return kGlobal;
    if (part == "shared" || part == "shared::cta" || part == "shared::cluster") return kShared;
    if (part == "local") return kLocal;
    if (part == "param" || part == "param::entry") return kParam;
  }
  return kGeneric;
}

}  // namespace

bool build(Builder& b, Ins& i) {
  const std::string& n = b.op[0];
  const Ty t = b.type();
  const int size = size_of(t);
  const auto simple = [&](int sources, int each) {
    i.o[0] = b.target(0);
    for (int s = 0; s < sources; ++s) i.o[1 + s] = b.source(1 + s, each);
  };
  if (n == "add" || n == "sub" || n == "mul" || n == "mad" || n == "fma" || n == "div" ||
      n == "rem" || n == "min" || n == "max") {
    const int sources = static_cast<int>(b.operands.size()) - 1;
    i.o[0] = b.target(0);
    if (b.types() == 2 && b.type(1) == Ty::f32 && (t == Ty::f16 || t == Ty::bf16)) {
      const bool half = t == Ty::f16;
      i.o[1] = b.source(1, 2), i.o[2] = n == "fma" ? b.source(2, 2) : i.o[1],
      i.o[3] = b.source(n == "fma" ? 3 : 2, 4);
      if (n == "add") i.fn = half ? mixed<Half, 0> : mixed<BHalf, 0>;
      if (n == "sub") i.fn = half ? mixed<Half, 1> : mixed<BHalf, 1>;
      if (n == "fma") i.fn = half ? mixed<Half, 2> : mixed<BHalf, 2>;
      return i.fn != nullptr;
    }
    const bool wide = b.has("wide");
    for (int s = 0; s < sources; ++s)
      i.o[1 + s] = b.source(1 + s, wide && s == 2 ? 2 * size : size);
    if (sources == 3 && (n == "min" || n == "max")) {
      if (t != Ty::f32 || b.has("NaN") || b.has("ftz")) throw std::runtime_error("three operands");
      i.fn = n == "min" ? three<float, float, float, least3<float>>
                        : three<float, float, float, most3<float>>;
      return true;
    }
    i.fn = arithmetic(b, t);
    return i.fn != nullptr;
  }
  if (n == "neg" || n == "abs") {
    simple(1, size);
    const bool neg = n == "neg";
    if (Handler h = neg ? halves<6>(t) : halves<7>(t)) return i.fn = h, true;
    const auto of = [&]() -> Handler {
      if (neg) {
#define F(T) (one<T, T, negative<T>>)
        NUMBERS(F, t)
#undef F
      } else {
        switch (t) {
          case Ty::s16:
            return one<s16, s16, absolute<s16>>;
          case Ty::s32:
            return one<s32, s32, absolute<s32>>;
          case Ty::s64:
            return one<s64, s64, absolute<s64>>;
          case Ty::f32:
            return one<float, float, absolute<float>>;
          case Ty::f64:
            return one<double, double, absolute<double>>;
          default:
            break;
        }
      }
      return nullptr;
    };
    return (i.fn = of()) != nullptr;
  }
  if (n == "and" || n == "or" || n == "xor" || n == "not") {
    if (t == Ty::pred) {
      simple(n == "not" ? 1 : 2, 0);
      for (size_t s = 1; s < b.operands.size(); ++s)
        if (b.operands[s].negated) throw std::runtime_error("negated");
      i.fn = n == "and"   ? two<u8, u8, u8, bit_and<u8>>
             : n == "or"  ? two<u8, u8, u8, bit_or<u8>>
             : n == "xor" ? two<u8, u8, u8, bit_xor<u8>>
                          : one<u8, u8, pred_not>;
      return true;
    }
    simple(n == "not" ? 1 : 2, size);
    const auto of = [&]() -> Handler {
      if (n == "and") {
#define F(T) (two<T, T, T, bit_and<T>>)
        INTEGERS(F, t)
#undef F
      } else if (n == "or") {
#define F(T) (two<T, T, T, bit_or<T>>)
        INTEGERS(F, t)
#undef F
      } else if (n == "xor") {
#define F(T) (two<T, T, T, bit_xor<T>>)
        INTEGERS(F, t)
#undef F
      } else {
#define F(T) (one<T, T, bit_not<T>>)
        INTEGERS(F, t)
#undef F
      }
      return nullptr;
    };
    return (i.fn = of()) != nullptr;
  }
  if (n == "shl" || n == "shr") {
    i.o[0] = b.target(0), i.o[1] = b.source(1, size), i.o[2] = b.source(2, 4);
    const auto of = [&]() -> Handler {
      if (n == "shl") {
#define F(T) (two<T, T, u32, shift_left<T>>)
        INTEGERS(F, t)
#undef F
      } else {
#define F(T) (two<T, T, u32, shift_right<T>>)
        INTEGERS(F, t)
#undef F
      }
      return nullptr;
    };
    return (i.fn = of()) != nullptr;
  }
  if (n == "shf") {
    simple(3, 4);
    const bool left = b.has("l"), clamp = b.has("clamp");
    i.fn =
        left ? (clamp ? three<u32, u32, u32, funnel_left_clamp> : three<u32, u32, u32, funnel_left>)
             : (clamp ? three<u32, u32, u32, funnel_right_clamp>
                      : three<u32, u32, u32, funnel_right>);
    return true;
  }
  if (n == "popc" || n == "clz") {
    simple(1, size);
    if (n == "popc")
      i.fn = size == 4 ? one<u32, u32, popc32> : one<u32, u64, popc64>;
    else
      i.fn = size == 4 ? one<u32, u32, clz32> : one<u32, u64, clz64>;
    return true;
  }
  if (n == "bfind") {
    simple(1, size);
    const bool shift = b.has("shiftamt");
#define F(T)                                                    \
  (shift ? static_cast<Handler>(one<u32, T, find_top_shift<T>>) \
         : static_cast<Handler>(one<u32, T, find_top<T>>))
    const auto of = [&]() -> Handler { INTEGERS(F, t) return nullptr; };
#undef F
    return (i.fn = of()) != nullptr;
  }
  if (n == "brev") return simple(1, 4), i.fn = one<u32, u32, reverse32>, size == 4;
  if (n == "bfe") {
    i.o[0] = b.target(0), i.o[1] = b.source(1, size), i.o[2] = b.source(2, 4),
    i.o[3] = b.source(3, 4);
    i.fn = t == Ty::u32   ? h_extract<u32>
           : t == Ty::s32 ? h_extract<s32>
           : t == Ty::u64 ? h_extract<u64>
                          : h_extract<s64>;
    return true;
  }
  if (n == "bfi") {
    i.o[0] = b.target(0), i.o[1] = b.source(1, size), i.o[2] = b.source(2, size),
    i.o[3] = b.source(3, 4), i.o[4] = b.source(4, 4);
    i.fn = size == 4 ? h_insert<u32> : h_insert<u64>;
    return true;
  }
  if (n == "prmt") {
    if (b.op.size() != 2) throw std::runtime_error("mode");
    simple(3, 4);
    i.fn = three<u32, u32, u32, permute>;
    return true;
  }
  if (n == "lop3") {
    simple(3, 4);
    i.imm = static_cast<s64>(b.operands.at(4).value);
    i.fn = h_lop3;
    return true;
  }
  if (n == "setp") {
    const std::string& c = b.op[1];
    Operand& d = b.operands[0];
    i.o[0] = d.kind == Operand::sink ? -1 : d.at;
    i.o[4] = d.pair;
    i.o[1] = b.source(1, size), i.o[2] = b.source(2, size);
    if (b.has("ftz")) throw std::runtime_error("ftz");
    if (b.operands.size() > 3) {
      i.x = b.has("and") ? 1 : b.has("or") ? 2 : 3;
      i.o[3] = b.source(3, 0), i.y = b.operands[3].negated;
    }
    switch (t) {
      case Ty::u16:
      case Ty::b16:
        i.fn = setp_of<u16>(c, true);
        break;
      case Ty::s16:
        i.fn = setp_of<s16>(c, false);
        break;
      case Ty::u32:
      case Ty::b32:
        i.fn = setp_of<u32>(c, true);
        break;
      case Ty::s32:
        i.fn = setp_of<s32>(c, false);
        break;
      case Ty::u64:
      case Ty::b64:
        i.fn = setp_of<u64>(c, true);
        break;
      case Ty::s64:
        i.fn = setp_of<s64>(c, false);
        break;
      case Ty::f32:
        i.fn = setp_of<float>(c, false);
        break;
      case Ty::f64:
        i.fn = setp_of<double>(c, false);
        break;
      case Ty::f16:
        i.fn = setp_of<Half>(c, false);
        break;
      default:
        return false;
    }
    return true;
  }
  if (n == "selp") {
    i.o[0] = b.target(0), i.o[1] = b.source(1, size), i.o[2] = b.source(2, size),
    i.o[3] = b.source(3, 0);
    if (b.operands[3].negated) throw std::runtime_error("negated");
    i.fn = size == 2 ? selp<u16> : size == 4 ? selp<u32> : selp<u64>;
    return true;
  }
  if (n == "mov") {
    Operand &d = b.operands[0], &s = b.operands[1];
    if (t == Ty::pred) {
      i.o[0] = b.target(0),
      i.o[1] = s.kind == Operand::imm ? b.constant(0, s.value & 1) : b.source(1, 0);
      i.fn = mov<u8>;
      return true;
    }
    if (s.kind == Operand::vec || d.kind == Operand::vec) {
      const bool packs = s.kind == Operand::vec;
      Operand& v = packs ? s : d;
      const int parts = static_cast<int>(v.parts.size()), each = size / parts;
      i.o[0] = packs ? b.target(0) : b.source(1, size);
      for (int e = 0; e < parts; ++e) {
        if (!packs && v.parts[e].kind == Operand::sink) continue;
        i.o[1 + e] = b.source(v.parts[e], each);
      }
      if (size == 8 && parts == 2)
        i.fn = packs ? pack<u64, u32, 2> : unpack<u64, u32, 2>;
      else if (size == 8 && parts == 4)
        i.fn = packs ? pack<u64, u16, 4> : unpack<u64, u16, 4>;
      else if (size == 4 && parts == 2)
        i.fn = packs ? pack<u32, u16, 2> : unpack<u32, u16, 2>;
      else
        return false;
      return true;
    }
    i.o[0] = b.target(0), i.o[1] = b.source(1, size);
    i.fn = size == 2 ? mov<u16> : size == 4 ? mov<u32> : mov<u64>;
    return true;
  }
  if (n == "cvta") {
    if (size != 8) throw std::runtime_error("size");
    simple(1, 8);
    i.y = b.has("to");
    i.x = b.has("shared") || b.has("shared::cta") ? 1 : b.has("local") ? 2 : b.has("param") ? 3 : 0;
    i.fn = cvta;
    return true;
  }
  if (n == "isspacep") {
    simple(1, 8);
    i.x = b.has("shared") ? 1 : 0;
    i.fn = isspace;
    return true;
  }
  if (n == "cvt") return (i.fn = conversion(b, i)) != nullptr;
  if (n == "rcp" || n == "sqrt" || n == "rsqrt" || n == "ex2" || n == "lg2" || n == "sin" ||
      n == "cos" || n == "tanh") {
    simple(1, size);
    const bool ftz = b.has("ftz"), rn = b.has("rn");
    if (t == Ty::f64) {
      if (n == "rcp")
        i.fn = rn ? one<double, double, rcp_d> : one<double, double, rcp_gross>;
      else if (n == "sqrt" && rn)
        i.fn = one<double, double, sqrt_d>;
      else if (n == "rsqrt")
        i.fn = one<double, double, rsqrt_gross>;
      return i.fn != nullptr;
    }
    if (t != Ty::f32) return false;
    if (n == "rcp") i.fn = ftz ? one<float, float, rcp_ftz> : one<float, float, rcp_f>;
    if (n == "sqrt") i.fn = ftz ? one<float, float, sqrt_ftz> : one<float, float, sqrt_f>;
    if (n == "rsqrt") i.fn = ftz ? one<float, float, rsqrt_ftz> : one<float, float, rsqrt_f>;
    if (n == "ex2") i.fn = ftz ? one<float, float, ex2> : one<float, float, ex2_full>;
    if (n == "lg2") i.fn = ftz ? one<float, float, lg2> : one<float, float, lg2_full>;
    if (n == "sin") i.fn = one<float, float, sin_f>;
    if (n == "cos") i.fn = one<float, float, cos_f>;
    if (n == "tanh") i.fn = one<float, float, tanh_f>;
    return true;
  }
  if (n == "ld" || n == "ldu" || n == "st") {
    const bool loads = n != "st";
    set_address(b, i, loads ? 1 : 0);
    Operand& v = b.operands[loads ? 0 : 1];
    Ty each = t;
    const int n_values = v.kind == Operand::vec ? static_cast<int>(v.parts.size()) : 1;
    i.vec = static_cast<u8>(n_values);
    int reg = 0;
    std::vector<s32> regs;
    for (int e = 0; e < n_values; ++e) {
      Operand& o = v.kind == Operand::vec ? v.parts[e] : v;
      if (o.kind == Operand::reg) reg = o.size;
    }
    if (reg == 0) reg = std::max(2, size);
    for (int e = 0; e < n_values; ++e) {
      Operand& o = v.kind == Operand::vec ? v.parts[e] : v;
      if (loads && o.kind == Operand::sink) {
        regs.push_back(-1);
        continue;
      }
      regs.push_back(b.source(o, reg));
    }
    if (n_values > 4)
      i.regs = regs;
    else
      for (int e = 0; e < n_values; ++e) i.o[e] = regs[e];
    if (n_values == 8 && false) return false;
    const int space = space_of(b);
    i.fn = loads ? access_of<Load>(each, reg, space) : access_of<Store>(each, reg, space);
    return true;
  }
  if (n == "atom" || n == "red") {
    const bool returns = n == "atom";
    set_address(b, i, returns ? 1 : 0);
    if (returns) i.o[0] = b.operands[0].kind == Operand::sink ? -1 : b.target(0);
    const int at = returns ? 2 : 1;
    i.o[1] = b.source(at, size);
    if (b.has("cas")) i.o[2] = b.source(at + 1, size);
    const std::pair<const char*, AtomOp> ops[] = {
        {"add", kAdd}, {"min", kMin}, {"max", kMax}, {"exch", kExch}, {"cas", kCas},
        {"and", kAnd}, {"or", kOr},   {"xor", kXor}, {"inc", kInc},   {"dec", kDec}};
    bool found = false;
    for (const auto& [name, op] : ops)
      if (b.has(name)) i.x = op, found = true;
    i.z = static_cast<u8>(space_of(b));
    if (i.z == kShared && i.y != 4 && i.o[5] >= 0 && b.operands.empty()) return false;
    switch (t) {
      case Ty::u32:
      case Ty::b32:
        i.fn = atom<u32>;
        break;
      case Ty::s32:
        i.fn = atom<s32>;
        break;
      case Ty::u64:
      case Ty::b64:
        i.fn = atom<u64>;
        break;
      case Ty::s64:
        i.fn = atom<s64>;
        break;
      case Ty::f32:
        i.fn = atom<float>;
        break;
      case Ty::f64:
        i.fn = atom<double>;
        break;
      default:
        return false;
    }
    return found;
  }
  if (n == "cp" && b.has("async")) {
    if (b.has("commit_group")) return i.fn = cp_commit, true;
    if (b.has("wait_group"))
      return i.imm = static_cast<s64>(b.operands[0].value), i.fn = cp_wait, true;
    if (b.has("wait_all")) return i.imm = 0, i.x = 1, i.fn = cp_wait, true;
    if (b.has("bulk") || b.has("mbarrier")) return false;
    Operand& to = b.operands[0];
    if (to.parts[0].kind == Operand::reg && to.parts[0].size == 4)
      i.o[4] = to.parts[0].at, i.target = static_cast<s32>(to.offset);
    else if (to.parts[0].kind == Operand::imm)
      i.o[4] = b.constant(4, to.parts[0].value), i.target = static_cast<s32>(to.offset);
    else
      throw std::runtime_error("address of cp.async");
    set_address(b, i, 1);
    i.x = static_cast<u8>(b.operands[2].value);
    if (b.operands.size() > 3) i.o[0] = b.source(3, 4);
    if (b.operands.size() > 4) throw std::runtime_error("cp.async operands");
    i.fn = cp_async;
    return true;
  }
  if (n == "shfl") {
    Operand& d = b.operands[0];
    i.o[0] = d.kind == Operand::sink ? -1 : d.at, i.o[5] = d.pair;
    for (int s = 1; s <= 4; ++s) i.o[s] = b.source(s, 4);
    i.x = b.has("up") ? 0 : b.has("down") ? 1 : b.has("bfly") ? 2 : 3;
    i.fn = shfl;
    return true;
  }
  if (n == "vote") {
    i.o[0] = b.target(0), i.o[1] = b.source(1, 0), i.y = b.operands[1].negated,
    i.o[2] = b.source(2, 4);
    i.x = b.has("ballot") ? 0 : b.has("all") ? 1 : b.has("any") ? 2 : 3;
    i.fn = vote;
    return true;
  }
  if (n == "redux") {
    simple(2, 4);
    i.x = b.has("add")   ? kAdd
          : b.has("min") ? kMin
          : b.has("max") ? kMax
          : b.has("and") ? kAnd
          : b.has("or")  ? kOr
                         : kXor;
    if (t == Ty::f32)
      i.fn = redux<float>;
    else
      i.fn = t == Ty::s32 ? redux<s32> : redux<u32>;
    return true;
  }
  if (n == "match") {
    if (!b.has("any")) return false;
    i.o[0] = b.target(0), i.o[1] = b.source(1, size), i.o[2] = b.source(2, 4),
    i.y = static_cast<u8>(size);
    i.fn = match_any;
    return true;
  }
  if (n == "activemask") return i.o[0] = b.target(0), i.fn = activemask, true;
  if (n == "elect") {
    Operand& d = b.operands[0];
    i.o[0] = d.kind == Operand::sink ? -1 : d.at, i.o[5] = d.pair, i.o[1] = b.source(1, 4);
    i.fn = elect;
    return true;
  }
  if (n == "bar" || n == "barrier") {
    if (b.has("warp")) return i.o[0] = b.source(0, 4), i.fn = bar_warp, true;
    if (b.has("red") || b.has("cluster")) return false;
    i.x = b.has("arrive");
    i.o[0] = b.source(0, 4);
    if (b.operands.size() > 1) i.o[1] = b.source(1, 4);
    i.fn = bar;
    return true;
  }
  if (n == "bra") return i.fn = bra, true;
  if (n == "ret" || n == "exit") return i.fn = ret, true;
  if (n == "trap") return i.fn = trap, true;
  if (n == "membar" || (n == "fence" && !b.has("proxy")) || n == "nanosleep" || n == "prefetch" ||
      n == "discard" || n == "applypriority" || n == "brkpt")
    return i.fn = nothing, true;
  return false;
}

}  // namespace ptx
