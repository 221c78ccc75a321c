// Products of quantised weights and tokens, for ggml's CPU backend on x86.
//
// For Q4_1, Q5_0, Q5_1 and Q8_0, ggml's kernels for x86 unpack weights again for each token or a few of them. Here
// sixteen rows of weights are unpacked once into a panel that stays in the cache, in which four neighbouring columns of
// the sixteen rows are a vector. One instruction multiplies such a vector by the same four columns of a token, so
// sixteen results are sums without any shuffling. For a few tokens, which take less time than unpacking, the rows are
// multiplied as they are. The activations are rounded to eight bits by ggml, as for its own kernels.
//
// A result is computed in the same order with any vectors, threads and other tokens: it depends on none of them.
//
// It is compiled into ggml-cpu by llama-cpp.cmake. ggml-cpu asks its extra buffer types who computes an operation; the
// one that is added here owns no buffers. workers.engine.bindings.gemm adds it.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>  // traits.h lacks it

#define GGML_COMMON_DECL_CPP
#include "ggml-backend-impl.h"
#include "ggml-common.h"
#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "traits.h"

#define AVX2   __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace {

constexpr int64_t BLOCK = 32;  // columns with one scale, of all these types
constexpr int64_t ROWS  = 16;  // of a panel
constexpr int64_t FEW   = 8;   // tokens with which rows are multiplied as they are, with AVX-512
// Bytes of the panels that a thread unpacks at a time: with the activations of some tokens they fit into the cache.
constexpr int64_t PANEL_BYTES = 128 * 1024, MOST_PANELS = 8;
// Bytes beyond the rows of a panel from which on weights are fetched from memory meanwhile.
constexpr int64_t AHEAD = 4096;
constexpr int64_t ALIGNMENT = 64;

// A block of a panel: values without signs, and what they are multiplied by and what is added to them.
struct alignas(64) PanelBlock {
    uint8_t values[8][ROWS][4];
    float   scales[ROWS], minima[ROWS];
};

// A block of the activations of a token.
struct TokenBlock {
    int8_t values[BLOCK];
    float  scale;
    union {
        float   sum;    // of the values, times the scale: what the minima are multiplied by
        int32_t start;  // of the sum of products, for weights with signs: they are stored with an offset
    };
};

// What is in a block of weights: bytes before the values, and how values are stored. `offset` is added to signed ones.
struct Format {
    int64_t bytes, high, values;
    bool    has_minima, has_bytes;
    int     offset;
};

constexpr Format Q4_1 = { 20, 0, 4, true, false, 0 };
constexpr Format Q5_0 = { 22, 2, 6, false, false, 16 };
constexpr Format Q5_1 = { 24, 4, 8, true, false, 0 };
constexpr Format Q8_0 = { 34, 0, 2, false, true, 128 };

AVX2 inline __m128i load_16(const void * address) { return _mm_loadu_si128(static_cast<const __m128i *>(address)); }
AVX2 inline __m256i load_32(const void * address) { return _mm256_loadu_si256(static_cast<const __m256i *>(address)); }

inline int32_t four_bytes(const void * address) {
    int32_t found;
    std::memcpy(&found, address, sizeof(found));
    return found;
}

// The first four bytes of a part of four rows' blocks.
AVX2 inline __m128i four_bytes_of(const char * const * rows, int64_t at) {
    return _mm_setr_epi32(four_bytes(rows[0] + at), four_bytes(rows[1] + at), four_bytes(rows[2] + at),
                          four_bytes(rows[3] + at));
}

// ---- unpacking ------------------------------------------------------------------------------------------------------

// Of four rows, 16 bytes each: four vectors with the same four bytes of each row.
AVX2 inline void transpose(const char * const * rows, int64_t at, __m128i * found) {
    const __m128i a = load_16(rows[0] + at), b = load_16(rows[1] + at);
    const __m128i c = load_16(rows[2] + at), d = load_16(rows[3] + at);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ab_high = _mm_unpackhi_epi32(a, b), cd_high = _mm_unpackhi_epi32(c, d);
    found[0] = _mm_unpacklo_epi64(ab, cd);
    found[1] = _mm_unpackhi_epi64(ab, cd);
    found[2] = _mm_unpacklo_epi64(ab_high, cd_high);
    found[3] = _mm_unpackhi_epi64(ab_high, cd_high);
}

// Four rows of a block, at `first` of the panel.
template <const Format & F> AVX2 inline void unpack_rows(const char * const * rows, PanelBlock & block, int64_t first) {
    __m128i found[8];
    transpose(rows, F.values, found);
    if (F.has_bytes) {
        transpose(rows, F.values + 16, found + 4);
        const __m128i sign = _mm_set1_epi8(static_cast<char>(0x80));
        for (__m128i & each : found) { each = _mm_xor_si128(each, sign); }
    } else {  // the values of the columns from 16 on are in the high halves
        const __m128i low = _mm_set1_epi8(0x0f);
        for (int at = 0; at < 4; at++) {
            found[4 + at] = _mm_and_si128(_mm_srli_epi16(found[at], 4), low);
            found[at]     = _mm_and_si128(found[at], low);
        }
    }
    if (F.high) {  // a bit for each value, in the order of the columns
        const __m128i bits = four_bytes_of(rows, F.high), fifth = _mm_set1_epi8(0x10);
        for (int at = 0; at < 8; at++) {
            const __m128i first_byte = _mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
            const __m128i byte = _mm_add_epi8(first_byte, _mm_set1_epi8(at / 2));
            const __m128i mask = _mm_set1_epi32(at % 2 ? 0x80402010 : 0x08040201);
            const __m128i set  = _mm_cmpeq_epi8(_mm_and_si128(_mm_shuffle_epi8(bits, byte), mask), mask);
            found[at]          = _mm_or_si128(found[at], _mm_and_si128(set, fifth));
        }
    }
    for (int at = 0; at < 8; at++) {
        _mm_store_si128(reinterpret_cast<__m128i *>(block.values[at][first]), found[at]);
    }
    // The scale and the minimum are halves, one after the other.
    const __m128i order  = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m128i halves = _mm_shuffle_epi8(four_bytes_of(rows, 0), order);
    _mm_store_ps(block.scales + first, _mm_cvtph_ps(halves));
    if (F.has_minima) { _mm_store_ps(block.minima + first, _mm_cvtph_ps(_mm_unpackhi_epi64(halves, halves))); }
}

// While a block of sixteen rows is computed, as many bytes are fetched into the second cache: the processor by itself
// does not see sixteen rows as one stream.
template <const Format & F> inline void fetch(const char * next) {
    for (int64_t line = 0; line < ROWS * F.bytes; line += 64) { _mm_prefetch(next + line, _MM_HINT_T1); }
}

// All blocks of sixteen rows. The rows from `next` on are fetched meanwhile.
template <const Format & F>
AVX2 void unpack(const char ** rows, int64_t blocks, const char * next, PanelBlock * panel) {
    for (int64_t block = 0; block < blocks; block++) {
        fetch<F>(next + block * ROWS * F.bytes);
        for (int64_t first = 0; first < ROWS; first += 4) { unpack_rows<F>(rows + first, panel[block], first); }
        for (int64_t row = 0; row < ROWS; row++) { rows[row] += F.bytes; }
    }
}

// The activations of a token, rounded by ggml: so a token that ggml's kernels compute alone has the same.
AVX2 void round_activations(const float * activations, int64_t blocks, const Format & format, TokenBlock * found) {
    static const ggml_from_float_t round = ggml_get_type_traits_cpu(GGML_TYPE_Q8_1)->from_float;
    for (int64_t block = 0; block < blocks; block++, found++, activations += BLOCK) {
        block_q8_1 rounded;
        round(activations, &rounded, BLOCK);
        std::memcpy(found->values, rounded.qs, BLOCK);
        found->scale = _cvtsh_ss(rounded.data.data.d);
        if (format.has_minima) {
            found->sum = _cvtsh_ss(rounded.data.data.s);
        } else {
            int32_t sum = 0;
            for (const int8_t value : found->values) { sum += value; }
            found->start = -format.offset * sum;
        }
    }
}

// ---- multiplying ----------------------------------------------------------------------------------------------------

// A panel by N tokens. The results of a token are `rows` neighbouring floats.
struct Factors {
    const PanelBlock * panel;
    const TokenBlock * tokens;
    int64_t            blocks;
    float *            results;
    int64_t            stride, rows;
};
using Multiply = void (*)(const Factors & factors);
// The same, of rows of the weights as they are. The rows from `next` on are fetched meanwhile.
using MultiplyFew = void (*)(const char ** rows, const char * next, const Factors & factors);

template <const Format & F, int N>
AVX512 void multiply_few(const char ** rows, const char * next, const Factors & factors);

template <int N, bool HAS_MINIMA> struct Avx512 {
    static constexpr bool TAKES_BYTES = true;
    template <const Format & F> static constexpr MultiplyFew few() { return multiply_few<F, N>; }

    AVX512 static void multiply(const Factors & factors) {
        const __mmask16 some = static_cast<__mmask16>((1u << factors.rows) - 1);
        __m512 sums[N];
        for (__m512 & sum : sums) { sum = _mm512_setzero_ps(); }
        for (int64_t block = 0; block < factors.blocks; block++) {
            const PanelBlock & left = factors.panel[block];
            __m512i values[8];
#pragma GCC unroll 8
            for (int at = 0; at < 8; at++) { values[at] = _mm512_load_si512(left.values[at]); }
            const __m512 scales = _mm512_load_ps(left.scales);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                const TokenBlock & right = factors.tokens[n * factors.blocks + block];
                __m512i products = HAS_MINIMA ? _mm512_setzero_si512() : _mm512_set1_epi32(right.start);
#pragma GCC unroll 8
                for (int at = 0; at < 8; at++) {
                    const __m512i four = _mm512_set1_epi32(four_bytes(right.values + 4 * at));
                    products = _mm512_dpbusd_epi32(products, values[at], four);
                }
                const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(right.scale));
                sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[n]);
                if (HAS_MINIMA) {
                    sums[n] = _mm512_fmadd_ps(_mm512_load_ps(left.minima), _mm512_set1_ps(right.sum), sums[n]);
                }
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) { _mm512_mask_storeu_ps(factors.results + n * factors.stride, some, sums[n]); }
    }
};

// A block of two rows.
template <const Format & F> AVX512 inline __m512i two_rows(const char * a, const char * b) {
    __m512i values;
    if (F.has_bytes) {
        values = _mm512_inserti64x4(_mm512_castsi256_si512(load_32(a + F.values)), load_32(b + F.values), 1);
        return _mm512_xor_si512(values, _mm512_set1_epi8(static_cast<char>(0x80)));
    }
    // Each row twice: the low halves of its bytes are its first values, the high ones the others.
    const __m256i twice = _mm256_broadcastsi128_si256(load_16(a + F.values));
    const __m256i other = _mm256_broadcastsi128_si256(load_16(b + F.values));
    const int64_t high = 0x0004000400040004;
    values = _mm512_inserti64x4(_mm512_castsi256_si512(twice), other, 1);
    values = _mm512_srlv_epi16(values, _mm512_set_epi64(high, high, 0, 0, high, high, 0, 0));
    values = _mm512_and_si512(values, _mm512_set1_epi8(0x0f));
    if (F.high) {
        const uint32_t low_bits = four_bytes(a + F.high), high_bits = four_bytes(b + F.high);
        const __mmask64 fifth = _cvtu64_mask64(low_bits | static_cast<uint64_t>(high_bits) << 32);
        values = _mm512_mask_add_epi8(values, fifth, values, _mm512_set1_epi8(0x10));
    }
    return values;
}

AVX512 inline __m512i add_pairs_32(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

AVX512 inline __m512i add_pairs_64(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

AVX512 inline __m512i add_pairs_128(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
}

// Sixteen rows by a few tokens, of which nothing is unpacked into memory: a vector has a block of two rows, and its
// sums are added in pairs until each result has its place. Blocks are added as above, so the results are the same.
template <const Format & F, int N>
AVX512 void multiply_few(const char ** rows, const char * next, const Factors & factors) {
    __m512 sums[N];
    for (__m512 & sum : sums) { sum = _mm512_setzero_ps(); }
    for (int64_t block = 0; block < factors.blocks; block++) {
        fetch<F>(next + block * ROWS * F.bytes);
        const int64_t at = block * F.bytes;
        const TokenBlock * right = factors.tokens + block;
        __m512i eight[2][N];
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            __m512i four[2][N];
#pragma GCC unroll 2
            for (int two = 0; two < 2; two++) {
                const char ** some = rows + 8 * odd + 2 * two;
                const __m512i a = two_rows<F>(some[0] + at, some[4] + at);
                const __m512i b = two_rows<F>(some[1] + at, some[5] + at);
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) {
                    const __m512i activations = _mm512_broadcast_i64x4(load_32(right[n * factors.blocks].values));
                    four[two][n] = add_pairs_32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), a, activations),
                                                _mm512_dpbusd_epi32(_mm512_setzero_si512(), b, activations));
                }
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) { eight[odd][n] = add_pairs_64(four[0][n], four[1][n]); }
        }
        const __m256i head = _mm256_set_m128i(four_bytes_of(rows + 4, at), four_bytes_of(rows, at));
        const __m256i tail = _mm256_set_m128i(four_bytes_of(rows + 12, at), four_bytes_of(rows + 8, at));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(head), tail, 1);
        const __m512 scales = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
        const __m512 minima = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const TokenBlock & token = right[n * factors.blocks];
            __m512i products = add_pairs_128(eight[0][n], eight[1][n]);
            if (!F.has_minima) { products = _mm512_add_epi32(products, _mm512_set1_epi32(token.start)); }
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(token.scale));
            sums[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[n]);
            if (F.has_minima) { sums[n] = _mm512_fmadd_ps(minima, _mm512_set1_ps(token.sum), sums[n]); }
        }
    }
    const __mmask16 some = static_cast<__mmask16>((1u << factors.rows) - 1);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) { _mm512_mask_storeu_ps(factors.results + n * factors.stride, some, sums[n]); }
}

// Values of up to five bits: sums of eight products of them and of activations fit into 16 bits.
template <int N, bool HAS_MINIMA> struct Avx2 {
    static constexpr bool TAKES_BYTES = false;
    template <const Format &> static constexpr MultiplyFew few() { return nullptr; }

    AVX2 static void multiply(const Factors & factors) {
        const __m256i ones = _mm256_set1_epi16(1), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for (int64_t half = 0; half < factors.rows; half += 8) {
            const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32(factors.rows - half), lanes);
            __m256 sums[N];
            for (__m256 & sum : sums) { sum = _mm256_setzero_ps(); }
            for (int64_t block = 0; block < factors.blocks; block++) {
                const PanelBlock & left = factors.panel[block];
                const __m256 scales = _mm256_load_ps(left.scales + half);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    const TokenBlock & right = factors.tokens[n * factors.blocks + block];
                    __m256i products = HAS_MINIMA ? _mm256_setzero_si256() : _mm256_set1_epi32(right.start);
#pragma GCC unroll 2
                    for (int first = 0; first < 8; first += 4) {
                        __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 4
                        for (int at = first; at < first + 4; at++) {
                            const __m256i values = load_32(left.values[at][half]);
                            const __m256i four   = _mm256_set1_epi32(four_bytes(right.values + 4 * at));
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(values, four));
                        }
                        products = _mm256_add_epi32(products, _mm256_madd_epi16(pairs, ones));
                    }
                    const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(right.scale));
                    sums[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), scale, sums[n]);
                    if (HAS_MINIMA) {
                        const __m256 minima = _mm256_load_ps(left.minima + half);
                        sums[n] = _mm256_fmadd_ps(minima, _mm256_set1_ps(right.sum), sums[n]);
                    }
                }
            }
            for (int n = 0; n < N; n++) {
                _mm256_maskstore_ps(factors.results + half + n * factors.stride, some, sums[n]);
            }
        }
    }
};

// ---- an operation ---------------------------------------------------------------------------------------------------

// How weights of a type are multiplied.
struct Kernels {
    const Format * format = nullptr;
    void        (*unpack)(const char ** rows, int64_t blocks, const char * next, PanelBlock * panel) = nullptr;
    int64_t     most = 0;  // tokens at a time
    Multiply    multiply[8] = {};
    MultiplyFew multiply_few[8] = {};  // without them, a single token is left to ggml
};

template <const Format & F, template <int, bool> class K, int... N>
constexpr Kernels kernels_of(std::integer_sequence<int, N...>) {
    return { &F, unpack<F>, sizeof...(N), { K<N + 1, F.has_minima>::multiply... },
             { K<N + 1, F.has_minima>::template few<F>()... } };
}

template <template <int, bool> class K, int MOST> const Kernels & kernels_for(enum ggml_type type) {
    constexpr std::make_integer_sequence<int, MOST> numbers;
    static const Kernels q4_1 = kernels_of<Q4_1, K>(numbers), q5_0 = kernels_of<Q5_0, K>(numbers);
    static const Kernels q5_1 = kernels_of<Q5_1, K>(numbers), q8_0 = kernels_of<Q8_0, K>(numbers), none;
    switch (type) {
        case GGML_TYPE_Q4_1: return q4_1;
        case GGML_TYPE_Q5_0: return q5_0;
        case GGML_TYPE_Q5_1: return q5_1;
        case GGML_TYPE_Q8_0: return K<1, true>::TAKES_BYTES ? q8_0 : none;
        default:             return none;
    }
}

// Bits of the vectors of this processor that the kernels can use.
int find_bits() {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
        return 512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 256 : 0;
}

// Bits of the vectors that are used; 0 while ggml's kernels compute everything.
std::atomic<int> used_bits{ 0 };

const Kernels & kernels_for(enum ggml_type type) {
    static const Kernels none;
    switch (used_bits.load(std::memory_order_relaxed)) {
        case 512: return kernels_for<Avx512, 8>(type);
        case 256: return kernels_for<Avx2, 4>(type);
        default:  return none;
    }
}

// How an operation is divided among threads.
struct Division {
    int64_t blocks, panels;  // of a row; those that a thread unpacks at a time

    Division(const ggml_tensor * op, int threads) {
        blocks = op->src[0]->ne[0] / BLOCK;
        const int64_t fitting = PANEL_BYTES / (blocks * static_cast<int64_t>(sizeof(PanelBlock)));
        panels = std::clamp<int64_t>(std::min(fitting, op->ne[0] / ROWS / (4 * threads)), 1, MOST_PANELS);
    }

    // For the rounded activations, and for what each thread unpacks.
    size_t work_bytes(const ggml_tensor * op, int threads) const {
        return 2 * ALIGNMENT + op->ne[1] * blocks * sizeof(TokenBlock) + threads * panels * blocks * sizeof(PanelBlock);
    }
};

template <class T> T * aligned(void * address) {
    return reinterpret_cast<T *>(GGML_PAD(reinterpret_cast<uintptr_t>(address), ALIGNMENT));
}

// Weights are one matrix in host memory, as the file has it, and so are tokens and results.
bool computes(const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT) { return false; }
    const ggml_tensor * weights = op->src[0];
    const ggml_tensor * tokens  = op->src[1];
    const Kernels & kernels = kernels_for(weights->type);
    return kernels.format && (op->ne[1] > 1 || kernels.multiply_few[0]) && !weights->extra && weights->buffer &&
           ggml_backend_buffer_is_host(weights->buffer) && weights->nb[0] == ggml_type_size(weights->type) &&
           tokens->type == GGML_TYPE_F32 && tokens->nb[0] == sizeof(float) && op->nb[0] == sizeof(float) &&
           op->ne[2] == 1 && op->ne[3] == 1 && ggml_get_op_params_i32(op, 1) != GGML_HINT_SRC0_IS_HADAMARD;
}

class Traits : public ggml::cpu::tensor_traits {
    bool work_size(int threads, const ggml_tensor * op, size_t & size) override {
        size = Division(op, threads).work_bytes(op, threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const ggml_tensor * tokens = op->src[1];
        const Kernels & kernels = kernels_for(op->src[0]->type);
        const Division division(op, params->nth);
        const int64_t count = op->ne[1], blocks = division.blocks;
        if (params->wsize < division.work_bytes(op, params->nth)) { return false; }  // planned for ggml's kernels
        auto * rounded = aligned<TokenBlock>(params->wdata);
        auto * panels  = aligned<PanelBlock>(rounded + count * blocks) + params->ith * division.panels * blocks;
        for (int64_t token = params->ith; token < count; token += params->nth) {
            const char * activations = static_cast<const char *>(tokens->data) + token * tokens->nb[1];
            round_activations(reinterpret_cast<const float *>(activations), blocks, *kernels.format,
                              rounded + token * blocks);
        }
        if (params->ith == 0) { ggml_threadpool_chunk_set(params->threadpool, params->nth); }
        ggml_barrier(params->threadpool);

        const int64_t step = division.panels * ROWS;
        int64_t chunk = params->ith;
        while (chunk * step < op->ne[0]) {
            multiply(kernels, op, chunk * step, std::min((chunk + 1) * step, op->ne[0]), rounded, panels);
            chunk = ggml_threadpool_chunk_add(params->threadpool, 1);
        }
        return true;
    }

    // The rows from `first` to `last`. Where a panel has fewer than sixteen, the last one is repeated.
    static void multiply(const Kernels & kernels, ggml_tensor * op, int64_t first, int64_t last,
                         const TokenBlock * rounded, PanelBlock * panels) {
        const ggml_tensor * weights = op->src[0];
        const int64_t blocks = weights->ne[0] / BLOCK, stride = op->nb[1] / sizeof(float);
        const auto * data = static_cast<const char *>(weights->data);
        auto * results = static_cast<float *>(op->data);
        const MultiplyFew few = op->ne[1] <= FEW ? kernels.multiply_few[op->ne[1] - 1] : nullptr;
        for (int64_t row = first; row < last; row += ROWS) {
            const char * rows[ROWS];
            for (int64_t n = 0; n < ROWS; n++) { rows[n] = data + std::min(row + n, last - 1) * weights->nb[1]; }
            const char * next = data + (row + ROWS) * weights->nb[1] + AHEAD;
            if (few) {
                few(rows, next, { nullptr, rounded, blocks, results + row, stride, std::min(ROWS, last - row) });
            } else {
                kernels.unpack(rows, blocks, next, panels + (row - first) / ROWS * blocks);
            }
        }
        if (few) { return; }
        for (int64_t token = 0; token < op->ne[1]; token += kernels.most) {
            const Multiply multiply = kernels.multiply[std::min(kernels.most, op->ne[1] - token) - 1];
            for (int64_t row = first; row < last; row += ROWS) {
                multiply({ panels + (row - first) / ROWS * blocks, rounded + token * blocks, blocks,
                           results + token * stride + row, stride, std::min(ROWS, last - row) });
            }
        }
    }
};

// The interface of ggml-cpu for kernels that it does not have itself. No tensor is ever in a buffer of this type.
class Products : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static Traits traits;
        return computes(op) ? &traits : nullptr;
    }
};

const char * name_of(ggml_backend_buffer_type_t) { return "CPU_PRODUCTS"; }
ggml_backend_buffer_t no_buffer(ggml_backend_buffer_type_t, size_t) { return nullptr; }
size_t alignment_of(ggml_backend_buffer_type_t) { return ALIGNMENT; }

}  // namespace

// Have ggml-cpu use these products from now on, with vectors of so many bits at most: 512, 256, or 0 for none. Returns
// how many it uses; 0 where the processor lacks the instructions.
extern "C" __attribute__((visibility("default"))) int arriero_products_use(int bits) {
    static std::once_flag once;
    std::call_once(once, [] {
        static Products products;
        static ggml_backend_buffer_type type = {};
        type.iface.get_name      = name_of;
        type.iface.alloc_buffer  = no_buffer;
        type.iface.get_alignment = alignment_of;
        type.device  = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        type.context = &products;
        ggml_backend_cpu_get_extra_buffer_types().push_back(&type);
    });
    used_bits = std::min(bits, find_bits()) / 256 * 256;
    return used_bits;
}
