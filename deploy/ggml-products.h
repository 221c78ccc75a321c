// What the parts of the products for ggml's CPU backend share.
#pragma once

#include <atomic>
#include <cstdint>

#include "ggml-impl.h"
#include "ggml.h"
#include "traits.h"

#define AVX2   __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace arriero {

constexpr int64_t ALIGNMENT = 64;

struct alignas(ALIGNMENT) Counter {
    std::atomic<int64_t> value;
};

// The first aligned address from this one on.
template <class T> T * aligned(void * address) {
    return reinterpret_cast<T *>(GGML_PAD(reinterpret_cast<uintptr_t>(address), ALIGNMENT));
}

// Memory for so many values at an aligned address, which moves on.
template <class T> T * take(char *& at, int64_t count) {
    T * found = reinterpret_cast<T *>(at);
    at += GGML_PAD(count * sizeof(T), ALIGNMENT);
    return found;
}

// How an operation of attention is computed with AVX-512, or null: by ggml's kernels.
ggml::cpu::tensor_traits * attention_of(const ggml_tensor * op);

}  // namespace arriero
