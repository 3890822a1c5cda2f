// What CUDA C++ lacks: PTX instructions for asynchronous copies and products in matrix units (PTX
// ISA, sections 9.7.9 and 9.7.14), and an atomic minimum of numbers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pfgm {

// The dynamic shared memory of the block, on a 16-byte boundary.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Starts a copy of BYTES (4 or 16, aligned to that) into shared memory. Bytes after the first
// `valid` become zero. They may be read after the thread that started the copy has waited for it,
// followed by a barrier.
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from, int valid = BYTES) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from),
                 "r"(valid), "n"(BYTES)
                 : "memory");
}

// commit_copies makes a group of the copies that this thread has started since the last commit.
// wait_copies waits until all but the newest PENDING groups have arrived.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// d += a b for a (16 × 8) and b (8 × 8), computed by all lanes of a warp. Operands are float32;
// their last 13 bits are ignored (TF32). With g = lane/4 and t = lane mod 4 a lane holds
//     a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4];
//     b[t][g], b[t + 4][g];
//     d[g][2t], d[g][2t + 1], d[g + 8][2t], d[g + 8][2t + 1].
__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4],
                                    const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b for a (16 × 16) and b (16 × 8) of float16 values, two in a word, the first in its lower
// half. With g = lane/4 and t = lane mod 4 a lane holds
//     a[g][2t…], a[g + 8][2t…], a[g][2t + 8…], a[g + 8][2t + 8…], each with the value after it;
//     b[2t…][g], b[2t + 8…][g];
//     d as above.
__device__ inline void multiply_add_halves(float (&d)[4], const std::uint32_t (&a)[4],
                                           const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a b, which needs no instruction that clears d.
__device__ inline void multiply_halves(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// *at becomes `value` if its bits are smaller: numbers ≥ 0 have the order of their bits, and −1
// comes before them. All threads of a grid may call this at once.
__device__ inline void atomic_least(double* at, double value) {
  atomicMin(reinterpret_cast<long long*>(at), __double_as_longlong(value));
}

}  // namespace pfgm
