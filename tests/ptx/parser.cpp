// Reads PTX. A kernel is parsed when it is first launched.
#include <cctype>
#include <stdexcept>

#include "machine.h"

namespace ptx {

int size_of(Ty t) {
  switch (t) {
    case Ty::none:
    case Ty::pred:
      return 0;
    case Ty::b8:
    case Ty::u8:
    case Ty::s8:
      return 1;
    case Ty::b16:
    case Ty::u16:
    case Ty::s16:
    case Ty::f16:
    case Ty::bf16:
      return 2;
    case Ty::b32:
    case Ty::u32:
    case Ty::s32:
    case Ty::f32:
    case Ty::tf32:
    case Ty::f16x2:
    case Ty::bf16x2:
      return 4;
    case Ty::b128:
      return 16;
    default:
      return 8;
  }
}

static Ty type_named(const std::string& s) {
  static const std::map<std::string, Ty> all = {
      {"pred", Ty::pred}, {"b8", Ty::b8},     {"u8", Ty::u8},       {"s8", Ty::s8},
      {"b16", Ty::b16},   {"u16", Ty::u16},   {"s16", Ty::s16},     {"f16", Ty::f16},
      {"bf16", Ty::bf16}, {"b32", Ty::b32},   {"u32", Ty::u32},     {"s32", Ty::s32},
      {"f32", Ty::f32},   {"tf32", Ty::tf32}, {"f16x2", Ty::f16x2}, {"bf16x2", Ty::bf16x2},
      {"b64", Ty::b64},   {"u64", Ty::u64},   {"s64", Ty::s64},     {"f64", Ty::f64},
      {"b128", Ty::b128}};
  const auto found = all.find(s);
  return found == all.end() ? Ty::none : found->second;
}

static bool name_char(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

[[noreturn]] static void bad(const std::string& what) { throw std::runtime_error("PTX: " + what); }

struct Reader {
  const std::string& t;
  size_t p, end;
  void space() {
    while (p < end && std::isspace(static_cast<unsigned char>(t[p]))) ++p;
  }
  bool done() {
    space();
    return p >= end;
  }
  char peek() {
    space();
    return p < end ? t[p] : 0;
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++p;
    return true;
  }
  void need(char c) {
    if (!take(c)) bad(std::string("expected ") + c + " at " + t.substr(p, 60));
  }
  std::string word() {  // letters, digits, dots
    space();
    const size_t from = p;
    while (p < end &&
           (name_char(t[p]) || t[p] == '.' || (t[p] == ':' && p + 1 < end && t[p + 1] == ':') ||
            (t[p] == ':' && p > from && t[p - 1] == ':')))
      ++p;
    return t.substr(from, p - from);
  }
  std::string name() {
    space();
    const size_t from = p;
    while (p < end && name_char(t[p])) ++p;
    return t.substr(from, p - from);
  }
  void line() {
    while (p < end && t[p] != '\n') ++p;
  }
  u64 number() {
    space();
    char* stop;
    const u64 v = std::strtoull(t.c_str() + p, &stop, 0);
    p = static_cast<size_t>(stop - t.c_str());
    return v;
  }
};

static std::string without_comments(const std::string& in) {
  std::string out = in;
  for (size_t i = 0; i + 1 < out.size(); ++i) {
    if (out[i] == '/' && out[i + 1] == '/')
      while (i < out.size() && out[i] != '\n') out[i++] = ' ';
    else if (out[i] == '/' && out[i + 1] == '*') {
      while (i + 1 < out.size() && !(out[i] == '*' && out[i + 1] == '/')) {
        if (out[i] != '\n') out[i] = ' ';
        ++i;
      }
      out[i] = out[i + 1] = ' ';
    }
  }
  return out;
}

static void skip_block(Reader& r) {  // to after the matching brace
  int depth = 0;
  for (; r.p < r.end; ++r.p) {
    if (r.t[r.p] == '"') {
      do ++r.p;
      while (r.p < r.end && r.t[r.p] != '"');
      continue;
    }
    if (r.t[r.p] == '{') ++depth;
    if (r.t[r.p] == '}' && --depth == 0) {
      ++r.p;
      return;
    }
  }
}

struct Declared {
  Ty type = Ty::none;
  u64 align = 0, count = 1;
  std::string name;
  bool array = false, open = false;
  int vec = 1;
};

// After the state space: [.align N] [.ptr …] .type name[count]
static Declared declaration(Reader& r) {
  Declared d;
  bool pointer = false;
  for (;;) {
    r.space();
    if (r.peek() != '.') break;
    ++r.p;
    const std::string part = r.name();
    if (part == "align") {
      const u64 n = r.number();
      if (!pointer) d.align = n;
    }  // .ptr: of what it points to
    else if (part == "v2")
      d.vec = 2;
    else if (part == "v4")
      d.vec = 4;
    else if (part == "ptr")
      pointer = true;
    else if (part == "global" || part == "shared" || part == "const" || part == "local") {
    } else if (Ty t = type_named(part); t != Ty::none)
      d.type = t;
    else
      bad("declaration " + part);
  }
  d.name = r.name();
  while (r.take('[')) {
    d.array = true;
    if (r.peek() == ']')
      d.open = true, d.count = 0;
    else
      d.count *= r.number();
    r.need(']');
  }
  if (!d.align) d.align = static_cast<u64>(size_of(d.type)) * d.vec;
  return d;
}
static u64 bytes_of(const Declared& d) {
  return static_cast<u64>(size_of(d.type)) * d.vec * d.count;
}
static u64 up(u64 v, u64 to) { return to ? (v + to - 1) / to * to : v; }

static u64 literal(const std::string& s, int size, bool* floating) {
  *floating = false;
  if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F') && s.size() == 10) {
    *floating = true;
    const u32 bits = static_cast<u32>(std::strtoul(s.c_str() + 2, nullptr, 16));
    return bits;
  }
  if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D') && s.size() == 18) {
    *floating = true;
    return std::strtoull(s.c_str() + 2, nullptr, 16);
  }
  if (s.find('.') != std::string::npos) {
    *floating = true;
    const double v = std::strtod(s.c_str(), nullptr);
    u64 bits = 0;
    if (size == 4) {
      const float f = static_cast<float>(v);
      std::memcpy(&bits, &f, 4);
    } else
      std::memcpy(&bits, &v, 8);
    return bits;
  }
  if (s[0] == '-')
    return static_cast<u64>(-static_cast<s64>(std::strtoull(s.c_str() + 1, nullptr, 0)));
  return std::strtoull(s.c_str(), nullptr, 0);
}

static void initialise(Reader& r, const Declared& d, u8* at) {
  const int each = size_of(d.type);
  u64 n = 0;
  if (r.take('{')) {
    while (!r.take('}')) {
      r.take('{');
      r.space();
      const size_t from = r.p;
      while (r.p < r.end && r.t[r.p] != ',' && r.t[r.p] != '}') ++r.p;
      std::string s = r.t.substr(from, r.p - from);
      while (!s.empty() && std::isspace(static_cast<unsigned char>(s.back()))) s.pop_back();
      bool floating;
      const u64 v = literal(s, each, &floating);
      std::memcpy(at + n * each, &v, each);
      ++n;
      r.take(',');
    }
  } else {
    r.space();
    const size_t from = r.p;
    while (r.p < r.end && r.t[r.p] != ';') ++r.p;
    bool floating;
    const u64 v = literal(r.t.substr(from, r.p - from), each, &floating);
    std::memcpy(at, &v, each);
  }
}

std::unique_ptr<Module> load_module(const std::string& given) {
  auto m = std::make_unique<Module>();
  m->text = without_comments(given);
  Reader r{m->text, 0, m->text.size()};
  while (!r.done()) {
    if (r.peek() != '.') {
      if (r.take(';')) continue;
      bad("at module scope: " + m->text.substr(r.p, 80));
    }
    const std::string word = r.word();
    if (word == ".version" || word == ".address_size" || word == ".file" || word == ".loc") {
      r.line();
      continue;
    }
    if (word == ".target") {
      r.space();
      m->target = std::atoi(r.name().c_str() + 3);  // sm_80
      r.line();
      continue;
    }
    if (word == ".section") {
      while (r.peek() != '{') ++r.p;
      skip_block(r);
      continue;
    }
    if (word == ".visible" || word == ".weak" || word == ".common") continue;
    if (word == ".extern") {
      if (r.peek() == '.' && m->text.compare(r.p, 7, ".shared") == 0) {
        r.word();
        const Declared d = declaration(r);
        m->extern_shared = d.name;
        r.need(';');
      } else {
        while (!r.take(';')) ++r.p;
      }
      continue;
    }
    if (word == ".global" || word == ".const" || word == ".shared") {
      const Declared d = declaration(r);
      const u64 bytes = bytes_of(d);
      if (word == ".shared") {
        m->module_shared = static_cast<u32>(up(m->module_shared, d.align));
        m->symbols[d.name] = {Symbol::shared, kReserved + m->module_shared, bytes};
        m->module_shared += static_cast<u32>(bytes);
      } else {
        m->memory.emplace_back(new u8[bytes + 64]());
        u8* at = reinterpret_cast<u8*>(up(reinterpret_cast<u64>(m->memory.back().get()), 64));
        if (r.take('=')) initialise(r, d, at);
        m->symbols[d.name] = {Symbol::global, reinterpret_cast<u64>(at), bytes};
        m->memory.push_back(nullptr);
        add_range(at, bytes, d.name.c_str());
      }
      r.need(';');
      continue;
    }
    if (word == ".entry") {
      auto k = std::make_unique<Kernel>();
      k->name = r.name();
      k->module = m.get();
      k->header = r.p;
      while (r.p < r.end && r.t[r.p] != '{') ++r.p;
      k->body = r.p;
      skip_block(r);
      k->end = r.p;
      m->kernels[k->name] = std::move(k);
      continue;
    }
    if (word == ".func") {
      while (r.p < r.end && r.t[r.p] != '{' && r.t[r.p] != ';') ++r.p;
      if (r.t[r.p] == '{')
        skip_block(r);
      else
        ++r.p;
      continue;
    }
    bad("directive " + word);
  }
  return m;
}

// ---- bodies

s32 Builder::constant(int size, u64 value) {
  if (size < 8 && size > 0) value &= (u64{1} << (8 * size)) - 1;
  for (auto& [at, c] : k.constants)
    if (c.first == size && c.second == value) return at;
  const s32 at = static_cast<s32>(k.registers);
  k.registers += static_cast<u32>(size == 0 ? 64 : up(32 * size, 64));
  k.constants.push_back({at, {size, value}});
  return at;
}
s32 Builder::scratch(int size) {
  const s32 at = static_cast<s32>(k.registers);
  k.registers += static_cast<u32>(size == 0 ? 64 : up(32 * size, 64));
  return at;
}
bool Builder::has(const char* part) const {
  for (const auto& each : op)
    if (each == part) return true;
  return false;
}
int Builder::types() const {
  int n = 0;
  for (size_t i = 1; i < op.size(); ++i) n += type_named(op[i]) != Ty::none;
  return n;
}
Ty Builder::type(int from_end) const {
  for (size_t i = op.size(); i-- > 1;)
    if (Ty t = type_named(op[i]); t != Ty::none && from_end-- == 0) return t;
  return Ty::none;
}
s32 Builder::source(Operand& o, int size) {
  if (o.kind == Operand::reg) {
    if (o.size != size)
      bad("operand " + o.text + " has " + std::to_string(o.size) + " bytes, not " +
          std::to_string(size));
    return o.at;
  }
  if (o.kind == Operand::imm) return constant(size, o.value);
  bad("operand " + o.text + " is no register");
}
s32 Builder::source(int operand, int size) {
  if (operand >= static_cast<int>(operands.size())) bad("too few operands");
  return source(operands[operand], size);
}
s32 Builder::target(int operand) {
  if (operands[operand].kind != Operand::reg)
    bad("target " + operands[operand].text + " is no register");
  return operands[operand].at;
}

static Counted kind_of(const Builder& b) {
  if (b.op[0] == "mma") return b.has("tf32") ? kMmaOfTf32 : kMma;
  if (b.op[0] == "shfl") return b.has("bfly") ? kShuffle : kOthers;
  return b.op[0] == "vote" && b.has("ballot") ? kBallot : kOthers;
}

struct Body {
  Kernel& k;
  Reader r;
  struct Reg {
    s32 at;
    int size;
  };
  std::vector<std::unordered_map<std::string, Reg>> scopes;
  std::unordered_map<std::string, Symbol> symbols;  // of the kernel
  std::unordered_map<std::string, s32> labels;
  std::vector<std::pair<size_t, std::string>> jumps;
  s32 line_number = 0;
  size_t counted = 0;
  u16 used = 0;  // of the next instruction

  void declare_register(const std::string& name, Ty type) {
    const int size = size_of(type);
    const s32 at = static_cast<s32>(k.registers);
    k.registers += static_cast<u32>(size == 0 ? 64 : up(32 * size, 64));
    scopes.back()[name] = {at, size};
  }
  const Reg* find(const std::string& name) {
    for (size_t i = scopes.size(); i-- > 0;) {
      const auto f = scopes[i].find(name);
      if (f != scopes[i].end()) return &f->second;
    }
    return nullptr;
  }
  const Symbol* find_symbol(const std::string& name) {
    const auto f = symbols.find(name);
    if (f != symbols.end()) return &f->second;
    const auto g = k.module->symbols.find(name);
    return g == k.module->symbols.end() ? nullptr : &g->second;
  }
  int line_at(size_t p) {
    for (; counted < p; ++counted) line_number += r.t[counted] == '\n';
    return line_number;
  }

  Operand operand() {
    Operand o;
    r.space();
    if (r.take('{')) {
      o.kind = Operand::vec;
      while (!r.take('}')) {
        o.parts.push_back(operand());
        r.take(',');
      }
      return o;
    }
    if (r.take('[')) {
      o.kind = Operand::addr;
      Operand base = operand();
      o.parts.push_back(base);
      while (r.peek() == '+' || r.peek() == '-') {
        const bool minus = r.t[r.p++] == '-';
        r.space();
        bool negative = false;
        if (r.t[r.p] == '-') negative = true, ++r.p;
        const s64 v = static_cast<s64>(r.number());
        o.offset += minus != negative ? -v : v;
      }
      if (r.take(',')) {  // tensor coordinates: not supported
        bad("tensor operand");
      }
      r.need(']');
      return o;
    }
    if (r.take('!')) {
      o = operand();
      o.negated = true;
      return o;
    }
    const char c = r.peek();
    if (std::isdigit(static_cast<unsigned char>(c)) || c == '-' || c == '+') {
      const size_t from = r.p++;
      while (r.p < r.end && (std::isalnum(static_cast<unsigned char>(r.t[r.p])) || r.t[r.p] == '.'))
        ++r.p;
      o.kind = Operand::imm;
      o.text = r.t.substr(from, r.p - from);
      o.value = literal(o.text, 8, &o.floating);
      return o;
    }
    o.text = r.word();
    if (o.text.empty()) bad("operand at " + r.t.substr(r.p, 60));
    if (o.text == "_") {
      o.kind = Operand::sink;
    } else if (const Reg* g = find(o.text))
      o.kind = Operand::reg, o.at = g->at, o.size = g->size;
    else if (const Symbol* s = find_symbol(o.text))
      o.kind = Operand::imm, o.value = s->at;
    else if (o.text == "WARP_SZ")
      o.kind = Operand::imm, o.value = 32;
    else
      o.kind = Operand::label;
    if (r.peek() == '|') {
      ++r.p;
      Operand second = operand();
      o.pair = second.at;
    }
    return o;
  }

  void statement() {
    const size_t start = r.p;
    if (r.take('{')) {
      scopes.emplace_back();
      return;
    }
    if (r.take('}')) {
      scopes.pop_back();
      return;
    }
    if (r.take(';')) return;
    if (r.peek() == '.') {
      const std::string word = r.word();
      if (word == ".reg") {
        r.space();
        ++r.p;
        const Ty type = type_named(r.name());
        do {
          const std::string name = r.name();
          if (r.take('<')) {
            const u64 n = r.number();
            r.need('>');
            for (u64 i = 0; i < n; ++i) declare_register(name + std::to_string(i), type);
          } else {
            declare_register(name, type);
          }
        } while (r.take(','));
        r.need(';');
      } else if (word == ".local" || word == ".shared") {
        const Declared d = declaration(r);
        const u64 bytes = bytes_of(d);
        if (word == ".local") {
          k.local = static_cast<u32>(up(k.local, d.align ? d.align : 8));
          symbols[d.name] = {Symbol::local, k.local, bytes};
          k.local += static_cast<u32>(bytes);
        } else {
          k.static_shared = static_cast<u32>(up(k.static_shared, d.align));
          symbols[d.name] = {Symbol::shared, kReserved + k.static_shared, bytes};
          k.static_shared += static_cast<u32>(bytes);
        }
        r.need(';');
      } else if (word == ".pragma") {
        const size_t from = r.p;
        while (!r.take(';')) ++r.p;
        const std::string text = r.t.substr(from, r.p - from);
        const size_t at = text.find("used_bytes_mask");
        if (at != std::string::npos)
          used = static_cast<u16>(std::strtoul(text.c_str() + at + 15, nullptr, 0));
      } else if (word == ".loc" || word == ".file") {
        r.line();
      } else {
        bad("statement " + word);
      }
      return;
    }
    // A label?
    if (r.peek() != '@') {
      const std::string name = r.name();
      if (r.peek() == ':' && r.t[r.p + 1] != ':') {
        ++r.p;
        labels[name] = static_cast<s32>(k.code.size());
        return;
      }
      r.p = start;
    }
    Ins i;
    i.line = line_at(start);
    i.used = used, used = 0;
    if (r.take('@')) {
      i.negated = r.take('!');
      const std::string name = r.name();
      const Reg* g = find(name);
      if (!g) bad("predicate " + name);
      i.guard = g->at;
    }
    const std::string mnemonic = r.word();
    Builder b{k, {}, {}};
    size_t from = 0;
    for (size_t p = 0; p <= mnemonic.size(); ++p)
      if (p == mnemonic.size() || mnemonic[p] == '.') {
        b.op.push_back(mnemonic.substr(from, p - from));
        from = p + 1;
      }
    while (!r.take(';')) {
      b.operands.push_back(operand());
      r.take(',');
    }
    try {
      if (!build(b, i) && !build_matrix(b, i)) bad("instruction");
    } catch (const std::exception& e) {
      bad(std::string(e.what()) + " in: " + r.t.substr(start, r.p - start) + " (line " +
          std::to_string(i.line) + ")");
    }
    i.counted = kind_of(b);
    if (b.op[0] == "bra") jumps.push_back({k.code.size(), b.operands[0].text});
    k.code.push_back(std::move(i));
  }
};

void parse_kernel(Kernel& k) {
  if (k.parsed) return;
  Module& m = *k.module;
  Body body{k, {m.text, k.header, k.end}, {}, {}, {}, {}, 0, k.header};
  Reader& r = body.r;
  body.scopes.emplace_back();
  // Special registers come first; run.cpp knows their order.
  for (const char* each :
       {"%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
        "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%lanemask_lt",
        "%cluster_ctarank", "%smid", "%clock", "%dynamic_smem_size"})
    body.declare_register(each, Ty::b32);
  if (r.take('(')) {
    while (!r.take(')')) {
      if (r.word() != ".param") {
        bad("parameter");
      }
      // word() takes .param and what follows without a space; the rest is a declaration
      Declared d = declaration(r);
      k.params_size = up(k.params_size, d.align);
      body.symbols[d.name] = {Symbol::param, k.params_size, bytes_of(d)};
      k.params.push_back({k.params_size, bytes_of(d)});
      k.params_size += bytes_of(d);
      r.take(',');
    }
  }
  while (r.peek() != '{') {
    const std::string word = r.word();
    if (word == ".maxntid" || word == ".reqntid") {
      int n = 0;
      int* to = k.max_threads;
      do to[n++] = static_cast<int>(r.number());
      while (r.take(','));
      for (; n < 3; ++n) to[n] = 1;
      if (word == ".reqntid") k.required_threads = to[0] * to[1] * to[2];
    } else if (word == ".minnctapersm" || word == ".maxnreg") {
      r.number();
    } else {
      bad("of an entry: " + word);
    }
  }
  r.need('{');
  k.static_shared = m.module_shared;
  // The dynamic memory comes after all static memory, whose declarations come first in a body.
  {
    Reader ahead{m.text, r.p, k.end};
    u32 total = k.static_shared;
    for (size_t p = m.text.find(".shared .align", r.p); p != std::string::npos && p < k.end;
         p = m.text.find(".shared .align", p + 5)) {
      ahead.p = p + 7;
      const Declared d = declaration(ahead);
      total = static_cast<u32>(up(total, d.align) + bytes_of(d));
    }
    k.dynamic_at = static_cast<u32>(up(kReserved + total, 16));
    if (!m.extern_shared.empty()) body.symbols[m.extern_shared] = {Symbol::shared, k.dynamic_at, 0};
  }
  while (true) {
    r.space();
    if (r.p >= k.end - 1) break;
    body.statement();
  }
  Ins end;
  Builder b{k, {"ret"}, {}};
  build(b, end);
  k.code.push_back(end);
  for (const auto& [at, name] : body.jumps) {
    const auto f = body.labels.find(name);
    if (f == body.labels.end()) bad("label " + name);
    k.code[at].target = f->second;
  }
  k.parsed = true;
}

}  // namespace ptx
