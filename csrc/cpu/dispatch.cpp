// Chooses the kernels for this machine. Only this file asks the processor what it supports.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "api/posterior_mean.h"

namespace pfgm {

#define PFGM_DECLARE(isa)                                                                 \
  namespace isa {                                                                         \
  extern const Kernels kernels;                                                           \
  void ode_step(const OdeStep&);                                                          \
  void normalised_field(const NormalisedField&);                                          \
  void normalised_field_backward(const NormalisedField&, const NormalisedFieldBackward&); \
  }
PFGM_DECLARE(portable)
PFGM_DECLARE(avx2)
PFGM_DECLARE(avxvnni)
PFGM_DECLARE(avx512)
PFGM_DECLARE(avx512vnni)

namespace {

struct Candidate {
  const Kernels* kernels;
  void (*ode_step)(const OdeStep&);
  void (*normalised_field)(const NormalisedField&);
  void (*normalised_field_backward)(const NormalisedField&, const NormalisedFieldBackward&);
  bool (*runs_here)();
};

#define PFGM_CANDIDATE(isa, runs_here)                                                     \
  {&isa::kernels, &isa::ode_step, &isa::normalised_field, &isa::normalised_field_backward, \
   runs_here}

#ifdef __x86_64__
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
[[maybe_unused]] bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The best comes first.
const Candidate candidates[] = {
#ifdef PFGM_HAS_AVX512VNNI
    PFGM_CANDIDATE(avx512vnni, [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }),
#endif
#ifdef PFGM_HAS_AVX512
    PFGM_CANDIDATE(avx512, has_avx512),
#endif
#ifdef PFGM_HAS_AVXVNNI
    PFGM_CANDIDATE(avxvnni, [] { return has_avx2() && __builtin_cpu_supports("avxvnni"); }),
#endif
#ifdef PFGM_HAS_AVX2
    PFGM_CANDIDATE(avx2, has_avx2),
#endif
    PFGM_CANDIDATE(portable, [] { return true; }),
};

const Candidate& chosen() {
  const char* forced = std::getenv("PFGM_CPU_ISA");
  if (forced != nullptr && *forced == '\0') forced = nullptr;
  std::string usable;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs_here()) continue;
    if (forced == nullptr || std::strcmp(forced, candidate.kernels->isa) == 0) return candidate;
    usable += (usable.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
  }
  throw std::invalid_argument("PFGM_CPU_ISA is '" + std::string(forced) +
                              "'; this machine and build can run " + usable + ".");
}

}  // namespace

const Kernels& cpu_kernels() { return *chosen().kernels; }

void ode_step(const OdeStep& step) { chosen().ode_step(step); }

void normalised_field(const NormalisedField& field) { chosen().normalised_field(field); }

void normalised_field_backward(const NormalisedField& field, const NormalisedFieldBackward& io) {
  chosen().normalised_field_backward(field, io);
}

}  // namespace pfgm
