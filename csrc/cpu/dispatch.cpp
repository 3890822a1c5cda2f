// Chooses the kernels for this machine. Only this file asks the processor what it supports.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api/normalised_field.h"
#include "api/ode_step.h"
#include "api/posterior_mean.h"

namespace pfgm {

namespace portable {
extern const Kernels kernels;
void ode_step(const OdeStep&);
void normalised_field(const NormalisedField&);
void normalised_field_backward(const NormalisedField&, const NormalisedFieldBackward&);
}  // namespace portable
#ifdef PFGM_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
void ode_step(const OdeStep&);
void normalised_field(const NormalisedField&);
void normalised_field_backward(const NormalisedField&, const NormalisedFieldBackward&);
}  // namespace avx2
#endif
#ifdef PFGM_HAS_AVX512
namespace avx512 {
extern const Kernels kernels;
void ode_step(const OdeStep&);
void normalised_field(const NormalisedField&);
void normalised_field_backward(const NormalisedField&, const NormalisedFieldBackward&);
}  // namespace avx512
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  void (*ode_step)(const OdeStep&);
  void (*normalised_field)(const NormalisedField&);
  void (*normalised_field_backward)(const NormalisedField&, const NormalisedFieldBackward&);
  bool (*runs_here)();
};

// The best comes first.
const Candidate candidates[] = {
#ifdef PFGM_HAS_AVX512
    {&avx512::kernels, &avx512::ode_step, &avx512::normalised_field,
     &avx512::normalised_field_backward,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef PFGM_HAS_AVX2
    {&avx2::kernels, &avx2::ode_step, &avx2::normalised_field, &avx2::normalised_field_backward,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&portable::kernels, &portable::ode_step, &portable::normalised_field,
     &portable::normalised_field_backward, [] { return true; }},
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
