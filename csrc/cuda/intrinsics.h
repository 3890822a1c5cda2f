// What CUDA C++ lacks: PTX instructions for asynchronous copies and products in matrix units (PTX
// ISA, sections 9.7.9 and 9.7.13 to 9.7.15), and an atomic minimum of numbers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace pfgm {

// Every kernel calls this first, in all threads. It returns when all earlier launches of the stream
// have ended and what they wrote is seen. Stream::launch lets a launch start before the one before
// has ended. A kernel that did not wait would be wrong:
// - It reads what earlier launches write, and writes where they may still read.
// - It waits for the launch before alone. That one must not end before those before it, so none of
//   its threads may return before it has waited.
// - The launch before may be of someone else, and may let others start at any time.
// If a launch did not start early, nothing waits.
__device__ inline void wait_for_earlier_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch start when all blocks of this one have come here, and not when they have
// ended. Its blocks take the room that is left, and wait. If that is little, they gather on the
// multiprocessors that have room first, and others have none: that costs more than a launch. So
// kernels whose blocks take much room do not call this, and large grids do nothing.
//
// It comes after the wait. A call before it would be safe for the kernels here, which wait for each
// other, but not for one of someone else that follows: it may count on the launches before this one
// to have ended, as soon as it has started.
__device__ inline void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr unsigned long long kSmall = 1 << 17;  // threads, half of those that an H100 holds
  if (static_cast<unsigned long long>(gridDim.x) * gridDim.y * gridDim.z * blockDim.x <= kSmall)
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

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

// The same with sums in float16, two in a word: d[g][2t…], d[g + 8][2t…]. GeForce cards multiply
// twice as fast with these.
__device__ inline void multiply_add_halves(std::uint32_t (&d)[2], const std::uint32_t (&a)[4],
                                           const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Asynchronous products of a warpgroup, which are four warps (wgmma; sm_90a alone). a is 64 × 16,
// and each warp holds 16 rows of it as in multiply_add_halves. b is 16 × 64 in shared memory: eight
// values of a column follow each other, for 64 columns, and the next eight values of the columns
// are `apart` bytes away. d is 64 × 64. Of its rows each warp holds those of its rows of a, and
// d[n] has columns 8n to 8n + 7 as in multiply_add_halves.
//
// begin_products(): before the first product, and after other instructions have read or changed d
// or a.
// begin_product: d += a b, or d = a b if it does not add, which needs no instruction that clears d.
// Until wait_products has waited for it, nothing may use d or change a or b. commit_products and
// wait_products<PENDING>: as for copies. publish_shared(): what this thread
// has written to shared memory is seen by products that begin after a barrier that follows.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
__device__ inline void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Keeps a compiler from moving uses of d across this place.
template <int COLUMNS>
__device__ inline void keep_in_place(float (&d)[COLUMNS][4]) {
#pragma unroll
  for (int n = 0; n < COLUMNS; ++n)
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
}
// Fields of 14 bits, in units of 16 bytes: the address of b, the distance between eights of values
// in a column, the distance between eights of columns. No swizzle.
__device__ inline std::uint64_t operand_at(const void* b, int apart) {
  const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(b));
  return static_cast<std::uint64_t>((at & 0x3ffff) >> 4) |
         static_cast<std::uint64_t>(apart >> 4) << 16 | std::uint64_t{128 >> 4} << 32;
}
__device__ inline void begin_product(float (&d)[8][4], const std::uint32_t (&a)[4], const void* b,
                                     int apart, bool adds = true) {
  asm volatile(
      "{.reg .pred adds; setp.ne.b32 adds, %37, 0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, adds, 1, 1, 0;}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
        "+f"(d[7][2]), "+f"(d[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand_at(b, apart)),
        "r"(static_cast<int>(adds)));
}

// *at becomes `value` if its bits are smaller: numbers ≥ 0 have the order of their bits, and −1
// comes before them. All threads of a grid may call this at once.
__device__ inline void atomic_least(double* at, double value) {
  atomicMin(reinterpret_cast<long long*>(at), __double_as_longlong(value));
}

}  // namespace pfgm
