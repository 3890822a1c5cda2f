// Chooses the kernels for this machine. Only this file asks the processor what it supports.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api/ode_step.h"
#include "api/posterior_mean.h"

namespace pfgm {

namespace portable {
extern const Kernels kernels;
void ode_step(const OdeStep&);
}  // namespace portable
#ifdef PFGM_HAS_AVX2
namespace avx2 {
extern const Kernels kernels;
void ode_step(const OdeStep&);
}  // namespace avx2
#endif
#ifdef PFGM_HAS_AVX512
namespace avx512 {
extern const Kernels kernels;
void ode_step(const OdeStep&);
}  // namespace avx512
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  void (*ode_step)(const OdeStep&);
  bool (*runs_here)();
};

// The best comes first.
const Candidate candidates[] = {
#ifdef PFGM_HAS_AVX512
    {&avx512::kernels, &avx512::ode_step,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#ifdef PFGM_HAS_AVX2
    {&avx2::kernels, &avx2::ode_step,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&portable::kernels, &portable::ode_step, [] { return true; }},
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

}  // namespace pfgm
