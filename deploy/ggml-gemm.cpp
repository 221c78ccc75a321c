// Products of quantised weights and tokens, for ggml's CPU backend on x86.
//
// ggml's kernels for x86 unpack weights again for each token or a few of them, or have them in another order that is
// made when a file is loaded. Here sixteen rows of weights, as the file has them, are unpacked into a panel that stays
// in the cache, in which four neighbouring columns of the sixteen rows are a vector. One instruction multiplies such a
// vector by the same four columns of a token, so sixteen results are sums without any shuffling. For a few tokens, for
// which unpacking takes longer, rows are multiplied as they are. Activations are rounded to eight bits as by ggml.
//
// A result is computed in the same order with any vectors, threads and other tokens: it depends on none of them. Single
// tokens are left to ggml with AVX2, and those of Q6_K: there its own kernel is faster, as it reads one row after the
// other.
//
// It is compiled into ggml-cpu by llama-cpp.cmake. ggml-cpu asks its extra buffer types who computes an operation; the
// one that is added here owns no buffers. workers.engine.bindings.gemm adds it.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
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
#include "ggml-products.h"

namespace {

using arriero::aligned;
using arriero::ALIGNMENT;
using arriero::Counter;
using arriero::take;

constexpr int64_t BLOCK = 32;  // columns with one scale, of all these types
constexpr int64_t ROWS  = 16;  // of a panel
// Bytes of the panels that a thread unpacks at a time: with the activations of some tokens they fit into the cache.
constexpr int64_t PANEL_BYTES = 128 * 1024, MOST_PANELS = 8;
// Bytes beyond the rows of a panel from which on weights are fetched from memory meanwhile.
constexpr int64_t AHEAD = 4096;

// How weights are scaled. What has no minimum was stored without a sign by adding an offset.
enum class Scaling {
    HALF,          // a scale
    HALVES,        // a scale and a minimum
    OFFSETS,       // a scale for eight blocks, and six bits with an offset for each of them
    SIX_BITS,      // a scale and a minimum for eight blocks, and six bits of both for each of them
    SIXTEEN_EACH,  // a scale for eight blocks, and eight bits for each sixteen columns
    EXPONENT,      // a power of two
};

// Where the low bits of the 32 values of a block are.
enum class Layout {
    BYTES,   // not only the low ones, with a sign
    HALVES,  // of sixteen bytes: the values of the columns from 16 on are in the high ones
    SHARED,  // in the low or the high halves of 32 bytes: two blocks share them
};

// The values that numbers of four bits stand for, with the offset: of IQ4_NL and IQ4_XS, and of MXFP4.
constexpr uint8_t IQ4_TABLE[] = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };
constexpr uint8_t FP4_TABLE[] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };

// A type of weights: so many blocks of 32 columns take so many bytes together. `values` and `high` are where the low
// and the high bits begin; 0 as `high` of types that have none.
struct Format {
    int64_t bytes, blocks, values, high;
    Scaling scaling;
    Layout  layout;
    int     offset;
    const uint8_t * table = nullptr;

    constexpr bool has_minima() const { return scaling == Scaling::HALVES || scaling == Scaling::SIX_BITS; }
    constexpr bool has_two_scales() const { return scaling == Scaling::SIXTEEN_EACH; }
    constexpr bool has_bytes() const { return offset == 128; }
};

constexpr Format Q4_0   = { 18, 1, 2, 0, Scaling::HALF, Layout::HALVES, 8 };
constexpr Format Q4_1   = { 20, 1, 4, 0, Scaling::HALVES, Layout::HALVES, 0 };
constexpr Format Q5_0   = { 22, 1, 6, 2, Scaling::HALF, Layout::HALVES, 16 };
constexpr Format Q5_1   = { 24, 1, 8, 4, Scaling::HALVES, Layout::HALVES, 0 };
constexpr Format Q8_0   = { 34, 1, 2, 0, Scaling::HALF, Layout::BYTES, 128 };
constexpr Format IQ4_NL = { 18, 1, 2, 0, Scaling::HALF, Layout::HALVES, 128, IQ4_TABLE };
constexpr Format MXFP4  = { 17, 1, 1, 0, Scaling::EXPONENT, Layout::HALVES, 12, FP4_TABLE };
constexpr Format IQ4_XS = { 136, 8, 8, 0, Scaling::OFFSETS, Layout::HALVES, 128, IQ4_TABLE };
constexpr Format Q4_K   = { 144, 8, 16, 0, Scaling::SIX_BITS, Layout::SHARED, 0 };
constexpr Format Q5_K   = { 176, 8, 48, 16, Scaling::SIX_BITS, Layout::SHARED, 0 };
constexpr Format Q6_K   = { 210, 8, 0, 128, Scaling::SIXTEEN_EACH, Layout::SHARED, 32 };

// Where Q6_K has its scales: a byte for each sixteen columns, and a half.
constexpr int64_t Q6_K_SCALES = 192, Q6_K_SCALE = 208;

// What the values of sixteen rows of a block are multiplied by, and the minima that are added, or the scales of the
// columns from 16 on.
struct alignas(64) Scales {
    float first[ROWS], second[ROWS];
};

// A block of a panel: values without signs, four neighbouring columns of each row.
struct alignas(64) PanelBlock {
    uint8_t values[8][ROWS][4];
    Scales  scales;
};

// A block of the activations of a token.
struct TokenBlock {
    int8_t values[BLOCK];
    float  scale;
    union {
        float   sum;       // of the values, times the scale: what the minima are multiplied by
        int32_t start[2];  // of the sums of products, for weights with an offset; the second for the columns from 16 on
    };
};

AVX2 inline __m128i load_16(const void * address) { return _mm_loadu_si128(static_cast<const __m128i *>(address)); }
AVX2 inline __m256i load_32(const void * address) { return _mm256_loadu_si256(static_cast<const __m256i *>(address)); }
AVX2 inline void store_16(void * address, __m128i bytes) { _mm_store_si128(static_cast<__m128i *>(address), bytes); }

inline int32_t four_bytes(const void * address) {
    int32_t found;
    std::memcpy(&found, address, sizeof(found));
    return found;
}

// Four bytes of eight rows' blocks.
AVX2 inline __m256i four_bytes_of(const char * const * rows, int64_t at) {
    return _mm256_setr_epi32(four_bytes(rows[0] + at), four_bytes(rows[1] + at), four_bytes(rows[2] + at),
                             four_bytes(rows[3] + at), four_bytes(rows[4] + at), four_bytes(rows[5] + at),
                             four_bytes(rows[6] + at), four_bytes(rows[7] + at));
}

// ---- unpacking ------------------------------------------------------------------------------------------------------

// Of the halves of four vectors: four vectors with the same four bytes of each half.
AVX2 inline void transpose(const __m256i * four, __m256i * found) {
    const __m256i ab = _mm256_unpacklo_epi32(four[0], four[1]), cd = _mm256_unpacklo_epi32(four[2], four[3]);
    const __m256i ab_high = _mm256_unpackhi_epi32(four[0], four[1]), cd_high = _mm256_unpackhi_epi32(four[2], four[3]);
    found[0] = _mm256_unpacklo_epi64(ab, cd);
    found[1] = _mm256_unpackhi_epi64(ab, cd);
    found[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
    found[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

// Sixteen bytes of eight rows: four vectors with the same four bytes of each row.
AVX2 inline void transpose(const char * const * rows, int64_t at, __m256i * found) {
    __m256i pairs[4];
    for (int n = 0; n < 4; n++) { pairs[n] = _mm256_set_m128i(load_16(rows[n + 4] + at), load_16(rows[n] + at)); }
    transpose(pairs, found);
}

// Eight halves, in the low or the high parts of four bytes each.
AVX2 inline __m256 floats_of(__m256i halves) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}

AVX2 inline __m256 low_floats(__m256i fours)  { return floats_of(_mm256_and_si256(fours, _mm256_set1_epi32(0xffff))); }
AVX2 inline __m256 high_floats(__m256i fours) { return floats_of(_mm256_srli_epi32(fours, 16)); }

// The scales of the blocks of eight rows: their first is `first`, and the scales of a block are `stride` bytes apart.
template <const Format & F>
AVX2 inline void unpack_scales(const char * const * rows, int64_t at, void * found, int64_t stride, int64_t first) {
    const auto scales = [&](int64_t block) -> Scales & {
        return *reinterpret_cast<Scales *>(static_cast<char *>(found) + block * stride);
    };
    if constexpr (F.scaling == Scaling::HALF) {
        _mm256_store_ps(scales(0).first + first, low_floats(four_bytes_of(rows, at)));
    } else if constexpr (F.scaling == Scaling::HALVES) {
        const __m256i both = four_bytes_of(rows, at);
        _mm256_store_ps(scales(0).first + first, low_floats(both));
        _mm256_store_ps(scales(0).second + first, high_floats(both));
    } else if constexpr (F.scaling == Scaling::SIX_BITS) {
        // A scale and a minimum, six bits of the first four scales and minima in bytes with the high two bits of the
        // last four, whose low four bits follow.
        __m256i parts[4];
        transpose(rows, at, parts);
        const __m256 scale = low_floats(parts[0]);
        const __m256 minimum = _mm256_sub_ps(_mm256_setzero_ps(), high_floats(parts[0]));
        const __m256i six = _mm256_set1_epi8(0x3f), four = _mm256_set1_epi8(0x0f), two = _mm256_set1_epi8(0x30);
        const __m256i lows[2] = { parts[3], _mm256_srli_epi16(parts[3], 4) };
        __m256i bits[4];  // of the first four scales, of the others, and of the minima alike
        for (int n = 0; n < 2; n++) {
            bits[2 * n] = _mm256_and_si256(parts[1 + n], six);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(parts[1 + n], 2), two);
            bits[2 * n + 1] = _mm256_or_si256(_mm256_and_si256(lows[n], four), high);
        }
        const __m256i byte = _mm256_set1_epi32(0xff);
        for (int64_t block = 0; block < 8; block++) {
            __m256i & first_bits = bits[block / 4], & second_bits = bits[2 + block / 4];
            const __m256 times = _mm256_cvtepi32_ps(_mm256_and_si256(first_bits, byte));
            const __m256 added = _mm256_cvtepi32_ps(_mm256_and_si256(second_bits, byte));
            _mm256_store_ps(scales(block).first + first, _mm256_mul_ps(scale, times));
            _mm256_store_ps(scales(block).second + first, _mm256_mul_ps(minimum, added));
            first_bits  = _mm256_srli_epi32(first_bits, 8);
            second_bits = _mm256_srli_epi32(second_bits, 8);
        }
    } else if constexpr (F.scaling == Scaling::EXPONENT) {  // the two least are no normal numbers
        const __m256i bits = _mm256_and_si256(four_bytes_of(rows, at), _mm256_set1_epi32(0xff));
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(1)), 23);
        const __m256i small  = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), bits);
        const __m256i either = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), bits));
        _mm256_store_ps(scales(0).first + first, _mm256_castsi256_ps(either));
    } else if constexpr (F.scaling == Scaling::OFFSETS) {
        // A half; the high two bits of each block, and the low four of each.
        const __m256i head = four_bytes_of(rows, at);
        const __m256 scale = low_floats(head);
        __m256i high = _mm256_srli_epi32(head, 16), low = four_bytes_of(rows, at + 4);
        for (int64_t block = 0; block < 8; block++) {
            const __m256i two  = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
            const __m256i bits = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), two);
            const __m256 times = _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(32)));
            _mm256_store_ps(scales(block).first + first, _mm256_mul_ps(scale, times));
            high = _mm256_srli_epi32(high, 2);
            low  = _mm256_srli_epi32(low, 4);
        }
    } else {
        __m256i bits[4];
        transpose(rows, at + Q6_K_SCALES, bits);
        const __m256 scale = high_floats(four_bytes_of(rows, at + Q6_K_SCALE - 2));
        for (int64_t block = 0; block < 8; block++) {
            for (float * target : { scales(block).first + first, scales(block).second + first }) {
                const __m256i times = _mm256_srai_epi32(_mm256_slli_epi32(bits[block / 2], 24), 24);
                _mm256_store_ps(target, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(times)));
                bits[block / 2] = _mm256_srli_epi32(bits[block / 2], 8);
            }
        }
    }
}

// Of blocks that share bytes: where their low and high bits are, and how far to the right in these bytes.
struct Place {
    int64_t values, high;
    int     shift, high_shift;
};

template <const Format & F> constexpr Place place_of(int block) {
    if (F.has_two_scales()) {
        return { F.values + 64 * (block / 4) + 32 * (block % 2), F.high + 32 * (block / 4), block / 2 % 2 * 4,
                 block % 4 * 2 };
    }
    return { F.values + 32 * (block / 2), F.high, block % 2 * 4, block };
}

// The 32 values of a block of a row, without signs.
template <const Format & F> AVX2 inline __m256i row_values(const char * row, int block) {
    const __m256i low = _mm256_set1_epi8(0x0f), fifth = _mm256_set1_epi8(0x10);
    if constexpr (F.layout == Layout::BYTES) {
        return _mm256_xor_si256(load_32(row + F.values), _mm256_set1_epi8(-128));
    } else if constexpr (F.layout == Layout::SHARED) {
        const Place place = place_of<F>(block);
        const __m256i values = _mm256_and_si256(_mm256_srli_epi16(load_32(row + place.values), place.shift), low);
        if constexpr (F.high == 0) { return values; }
        const __m256i high = _mm256_srli_epi16(load_32(row + place.high), place.high_shift);
        const __m256i some = _mm256_and_si256(high, _mm256_set1_epi8(F.has_two_scales() ? 3 : 1));
        return _mm256_or_si256(values, _mm256_slli_epi16(some, 4));
    } else {
        const __m256i twice  = _mm256_broadcastsi128_si256(load_16(row + F.values + 16 * block));
        const __m256i values = _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), low);
        if constexpr (F.table != nullptr) {
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_16(F.table)), values);
        }
        if constexpr (F.high == 0) { return values; }
        const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit  = _mm256_set1_epi64x(0x8040201008040201);
        const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(four_bytes(row + F.high)), byte);
        const __m256i some = _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), bit);
        return _mm256_or_si256(values, _mm256_and_si256(some, fifth));
    }
}

// Fetch so many bytes into the second cache. The addresses need not exist.
inline void fetch(const char * address, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) { _mm_prefetch(address + at, _MM_HINT_T1); }
}

// While a block of sixteen rows is computed, as many bytes are fetched: the processor by itself does not see sixteen
// rows as one stream.
template <const Format & F> inline void fetch_meanwhile(const char * next, int block) {
    constexpr int64_t COUNT = ROWS * F.bytes / F.blocks;
    fetch(next + block * COUNT, COUNT);
}

// All blocks of sixteen rows. The rows from `next` on are fetched meanwhile.
template <const Format & F>
AVX2 void unpack(const char * const * rows, int64_t blocks, const char * next, PanelBlock * panel) {
    for (int64_t at = 0; blocks > 0; blocks -= F.blocks, at += F.bytes, panel += F.blocks) {
        for (int64_t first = 0; first < ROWS; first += 8) {
            unpack_scales<F>(rows + first, at, &panel->scales, sizeof(PanelBlock), first);
        }
        for (int block = 0; block < F.blocks; block++) {
            fetch_meanwhile<F>(next + at * ROWS, block);
            for (int64_t first = 0; first < ROWS; first += 4) {
                __m256i four[4], found[4];
                for (int n = 0; n < 4; n++) { four[n] = row_values<F>(rows[first + n] + at, block); }
                transpose(four, found);
                for (int n = 0; n < 4; n++) {
                    store_16(panel[block].values[n][first], _mm256_castsi256_si128(found[n]));
                    store_16(panel[block].values[n + 4][first], _mm256_extracti128_si256(found[n], 1));
                }
            }
        }
    }
}

// A vector with the same in all lanes: the greatest.
AVX2 inline __m256 greatest_of(__m256 floats) {
    floats = _mm256_max_ps(floats, _mm256_permute2f128_ps(floats, floats, 1));
    floats = _mm256_max_ps(floats, _mm256_permute_ps(floats, 0x4e));
    return _mm256_max_ps(floats, _mm256_permute_ps(floats, 0xb1));
}

// Eight blocks of activations, rounded with one scale as by ggml's quantize_row_q8_K: the greatest becomes -127, and of
// two that are as great with different signs the first.
AVX2 inline void round_together(const float * activations, TokenBlock * found) {
    constexpr int64_t COUNT = 8 * BLOCK;
    __m256 most = _mm256_setzero_ps(), least = _mm256_setzero_ps();
    for (int64_t at = 0; at < COUNT; at += 8) {
        const __m256 some = _mm256_loadu_ps(activations + at);
        most  = _mm256_max_ps(some, most);
        least = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), some), least);
    }
    const float positive = _mm256_cvtss_f32(greatest_of(most)), negative = _mm256_cvtss_f32(greatest_of(least));
    float greatest = positive > negative ? positive : -negative;
    for (int64_t at = 0; positive == negative && at < COUNT; at++) {
        if (std::fabs(activations[at]) == positive) {
            greatest = activations[at];
            break;
        }
    }
    const float times = greatest == 0 ? 0 : -127.f / greatest, scale = greatest == 0 ? 0 : 1 / times;
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t at = 0; at < COUNT; at += BLOCK, activations += BLOCK, found++) {
        __m256i whole[4];
        for (int n = 0; n < 4; n++) {
            whole[n] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(activations + 8 * n), _mm256_set1_ps(times)));
        }
        const __m256i words = _mm256_packs_epi32(whole[0], whole[1]), more = _mm256_packs_epi32(whole[2], whole[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(found->values), bytes);
        found->scale = scale;
    }
}

// What the minima are multiplied by, or the sums start with.
AVX2 inline void add_up(const Format & format, TokenBlock & block) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_32(block.values));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    const __m256i twos  = _mm256_hadd_epi32(fours, fours), halves = _mm256_hadd_epi32(twos, twos);
    const int32_t first = _mm256_extract_epi32(halves, 0), second = _mm256_extract_epi32(halves, 4);
    if (format.has_minima()) {
        block.sum = block.scale * static_cast<float>(first + second);
    } else if (format.has_two_scales()) {
        block.start[0] = -format.offset * first;
        block.start[1] = -format.offset * second;
    } else {
        block.start[0] = -format.offset * (first + second);
    }
}

// The activations of a token, rounded as by ggml, so a token that ggml's kernels compute alone has the same: each block
// with a scale that is a half, and for K-quants eight blocks with one scale.
AVX2 void round_activations(const float * activations, int64_t blocks, const Format & format, TokenBlock * found) {
    static const ggml_from_float_t round = ggml_get_type_traits_cpu(GGML_TYPE_Q8_1)->from_float;
    for (int64_t block = 0; block < blocks; block += format.blocks, activations += BLOCK * format.blocks) {
        TokenBlock * rounded = found + block;
        if (format.blocks > 1) {
            round_together(activations, rounded);
        } else {
            block_q8_1 of_ggml;
            round(activations, &of_ggml, BLOCK);
            std::memcpy(rounded->values, of_ggml.qs, BLOCK);
            rounded->scale = _cvtsh_ss(of_ggml.data.data.d);
            rounded->sum   = _cvtsh_ss(of_ggml.data.data.s);
        }
        if (format.scaling == Scaling::HALVES) { continue; }
        for (int64_t n = 0; n < format.blocks; n++) { add_up(format, rounded[n]); }
    }
}

// ---- multiplying ----------------------------------------------------------------------------------------------------

// A panel by N tokens. The results of a token are `rows` neighbouring floats, from `row` on.
struct Factors {
    const PanelBlock * panel;
    const TokenBlock * tokens;
    int64_t            blocks;
    float * const *    results;
    int64_t            row, rows;
};
using Multiply = void (*)(const Factors & factors);
// The same, of rows of the weights as they are. The rows from `next` on are fetched meanwhile.
using MultiplyFew = void (*)(const char * const * rows, const char * next, const Factors & factors);

// The sum of results, with those of a block added. `low` and `high` are the sums of its products: of all columns, or of
// sixteen where these have scales of their own.
template <const Format & F>
AVX512 inline __m512 scaled(__m512i low, __m512i high, __m512 first, __m512 second, const TokenBlock & token,
                            __m512 sum) {
    const __m512 scale = _mm512_set1_ps(token.scale);
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), _mm512_mul_ps(first, scale), sum);
    if (F.has_minima()) { sum = _mm512_fmadd_ps(second, _mm512_set1_ps(token.sum), sum); }
    if (F.has_two_scales()) {
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_mul_ps(second, scale), sum);
    }
    return sum;
}

AVX512 inline __m512i two_vectors(__m256i a, __m256i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// The values of a block of two rows, without signs.
template <const Format & F> AVX512 inline __m512i two_rows(const char * a, const char * b, int block) {
    const __m512i low = _mm512_set1_epi8(0x0f), fifth = _mm512_set1_epi8(0x10);
    if constexpr (F.layout == Layout::BYTES) {
        const __m512i values = two_vectors(load_32(a + F.values), load_32(b + F.values));
        return _mm512_xor_si512(values, _mm512_set1_epi8(-128));
    } else if constexpr (F.layout == Layout::SHARED) {
        const Place place = place_of<F>(block);
        const __m512i both = two_vectors(load_32(a + place.values), load_32(b + place.values));
        const __m512i values = _mm512_and_si512(_mm512_srli_epi16(both, place.shift), low);
        if constexpr (F.high == 0) { return values; }
        __m512i high = two_vectors(load_32(a + place.high), load_32(b + place.high));
        if constexpr (F.has_two_scales()) {  // their bits to where they belong
            const int left = 4 - place.high_shift;
            high = left > 0 ? _mm512_slli_epi16(high, left) : _mm512_srli_epi16(high, -left);
            return _mm512_or_si512(values, _mm512_and_si512(high, _mm512_set1_epi8(0x30)));
        }
        const __mmask64 some = _mm512_test_epi8_mask(high, _mm512_set1_epi8(static_cast<char>(1 << block)));
        return _mm512_mask_add_epi8(values, some, values, fifth);
    } else {
        const __m256i twice = _mm256_broadcastsi128_si256(load_16(a + F.values + 16 * block));
        const __m256i other = _mm256_broadcastsi128_si256(load_16(b + F.values + 16 * block));
        const __m512i shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
        const __m512i values = _mm512_and_si512(_mm512_srlv_epi64(two_vectors(twice, other), shift), low);
        if constexpr (F.table != nullptr) {
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16(F.table)), values);
        }
        if constexpr (F.high == 0) { return values; }
        const uint32_t low_bits = four_bytes(a + F.high), high_bits = four_bytes(b + F.high);
        const __mmask64 some = _cvtu64_mask64(low_bits | static_cast<uint64_t>(high_bits) << 32);
        return _mm512_mask_add_epi8(values, some, values, fifth);
    }
}

AVX512 inline __m512i add_pairs_32(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}

AVX512 inline __m512i add_pairs_64(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

struct Avx512 {
    static constexpr int  MOST = 8, FEW = 4;  // tokens at a time; with which rows are multiplied as they are
    static constexpr bool TAKES_BYTES = true;

    template <const Format & F, int N> AVX512 static void multiply(const Factors & factors) {
        const __mmask16 some = static_cast<__mmask16>((1u << factors.rows) - 1);
        __m512 sums[N];
        for (__m512 & sum : sums) { sum = _mm512_setzero_ps(); }
        for (int64_t block = 0; block < factors.blocks; block++) {
            const PanelBlock & left = factors.panel[block];
            __m512i values[8];
#pragma GCC unroll 8
            for (int at = 0; at < 8; at++) { values[at] = _mm512_load_si512(left.values[at]); }
            const __m512 first  = _mm512_load_ps(left.scales.first);
            const __m512 second = _mm512_load_ps(left.scales.second);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                const TokenBlock & right = factors.tokens[n * factors.blocks + block];
                __m512i products[2] = { _mm512_set1_epi32(F.has_minima() ? 0 : right.start[0]),
                                        _mm512_set1_epi32(F.has_two_scales() ? right.start[1] : 0) };
#pragma GCC unroll 8
                for (int at = 0; at < 8; at++) {
                    const __m512i four = _mm512_set1_epi32(four_bytes(right.values + 4 * at));
                    __m512i & sum = products[F.has_two_scales() ? at / 4 : 0];
                    sum = _mm512_dpbusd_epi32(sum, values[at], four);
                }
                sums[n] = scaled<F>(products[0], products[1], first, second, right, sums[n]);
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) { _mm512_mask_storeu_ps(factors.results[n] + factors.row, some, sums[n]); }
    }

    // Sixteen rows by a few tokens, of which nothing but scales is unpacked into memory: a vector has a block of two
    // rows, and its sums are added in pairs until each result has its place. Blocks are added as above, so the results
    // are the same.
    template <const Format & F, int N>
    AVX512 static void multiply_few(const char * const * rows, const char * next, const Factors & factors) {
        __m512 sums[N];
        for (__m512 & sum : sums) { sum = _mm512_setzero_ps(); }
        int64_t at = 0;
        for (int64_t together = 0; together < factors.blocks; together += F.blocks, at += F.bytes) {
            constexpr bool IN_PLACE = F.scaling == Scaling::HALF || F.scaling == Scaling::HALVES;
            Scales scales[8];
            if constexpr (!IN_PLACE) {
                for (int64_t first = 0; first < ROWS; first += 8) {
                    unpack_scales<F>(rows + first, at, scales, sizeof(Scales), first);
                }
            }
#pragma GCC unroll 8
            for (int block = 0; block < F.blocks; block++) {
                fetch_meanwhile<F>(next + at * ROWS, block);
                const TokenBlock * right = factors.tokens + together + block;
                __m512i eight[2][N];
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; odd++) {
                    __m512i four[2][N];
#pragma GCC unroll 2
                    for (int two = 0; two < 2; two++) {
                        const char * const * some = rows + 8 * odd + 2 * two;
                        const __m512i a = two_rows<F>(some[0] + at, some[4] + at, block);
                        const __m512i b = two_rows<F>(some[1] + at, some[5] + at, block);
#pragma GCC unroll 8
                        for (int n = 0; n < N; n++) {
                            const __m512i values = _mm512_broadcast_i64x4(load_32(right[n * factors.blocks].values));
                            four[two][n] = add_pairs_32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), a, values),
                                                        _mm512_dpbusd_epi32(_mm512_setzero_si512(), b, values));
                        }
                    }
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++) { eight[odd][n] = add_pairs_64(four[0][n], four[1][n]); }
                }
                __m512 first, second;
                if constexpr (!IN_PLACE) {
                    first  = _mm512_load_ps(scales[block].first);
                    second = _mm512_load_ps(scales[block].second);
                } else {
                    const __m512i both = two_vectors(four_bytes_of(rows, at), four_bytes_of(rows + 8, at));
                    first  = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
                    second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
                }
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) {
                    const TokenBlock & token = right[n * factors.blocks];
                    // Of the first sixteen columns, and of the others.
                    __m512i low  = _mm512_shuffle_i64x2(eight[0][n], eight[1][n], 0x88);
                    __m512i high = _mm512_shuffle_i64x2(eight[0][n], eight[1][n], 0xdd);
                    if (F.has_two_scales()) {
                        high = _mm512_add_epi32(high, _mm512_set1_epi32(token.start[1]));
                    } else {
                        low = _mm512_add_epi32(low, high);
                    }
                    if (!F.has_minima()) { low = _mm512_add_epi32(low, _mm512_set1_epi32(token.start[0])); }
                    sums[n] = scaled<F>(low, high, first, second, token, sums[n]);
                }
            }
        }
        const __mmask16 some = static_cast<__mmask16>((1u << factors.rows) - 1);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) { _mm512_mask_storeu_ps(factors.results[n] + factors.row, some, sums[n]); }
    }
};

// Values of up to six bits: sums of four products of them and of activations fit into 16 bits, with five bits of eight.
struct Avx2 {
    static constexpr int  MOST = 4, FEW = 0;
    static constexpr bool TAKES_BYTES = false;

    template <const Format & F, int N> AVX2 static void multiply(const Factors & factors) {
        const __m256i ones = _mm256_set1_epi16(1), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for (int64_t half = 0; half < factors.rows; half += 8) {
            const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32(factors.rows - half), lanes);
            __m256 sums[N];
            for (__m256 & sum : sums) { sum = _mm256_setzero_ps(); }
            for (int64_t block = 0; block < factors.blocks; block++) {
                const PanelBlock & left = factors.panel[block];
                const __m256 scales[2] = { _mm256_load_ps(left.scales.first + half),
                                           _mm256_load_ps(left.scales.second + half) };
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    const TokenBlock & right = factors.tokens[n * factors.blocks + block];
                    __m256i products[2] = { _mm256_set1_epi32(F.has_minima() ? 0 : right.start[0]),
                                            _mm256_set1_epi32(F.has_two_scales() ? right.start[1] : 0) };
                    constexpr int STEP = F.has_two_scales() ? 2 : 4;
#pragma GCC unroll 4
                    for (int first = 0; first < 8; first += STEP) {
                        __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 4
                        for (int at = first; at < first + STEP; at++) {
                            const __m256i values = load_32(left.values[at][half]);
                            const __m256i four   = _mm256_set1_epi32(four_bytes(right.values + 4 * at));
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(values, four));
                        }
                        __m256i & sum = products[F.has_two_scales() ? first / 4 : 0];
                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
                    }
                    const __m256 scale = _mm256_set1_ps(right.scale), first = _mm256_mul_ps(scales[0], scale);
                    sums[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[0]), first, sums[n]);
                    if (F.has_minima()) { sums[n] = _mm256_fmadd_ps(scales[1], _mm256_set1_ps(right.sum), sums[n]); }
                    if (F.has_two_scales()) {
                        const __m256 second = _mm256_mul_ps(scales[1], scale);
                        sums[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[1]), second, sums[n]);
                    }
                }
            }
            for (int n = 0; n < N; n++) {
                _mm256_maskstore_ps(factors.results[n] + factors.row + half, some, sums[n]);
            }
        }
    }
};

// ---- an operation ---------------------------------------------------------------------------------------------------

// How weights of a type are multiplied.
struct Kernels {
    const Format * format = nullptr;
    void        (*unpack)(const char * const * rows, int64_t blocks, const char * next, PanelBlock * panel) = nullptr;
    int64_t     most = 0, few = 0;  // tokens that are multiplied by a panel at a time, and by rows as they are
    bool        takes_one = false;  // a single token, too
    Multiply    multiply[Avx512::MOST] = {};
    MultiplyFew multiply_few[Avx512::FEW] = {};
};

template <const Format & F, class K, int... N, int... FEW>
constexpr Kernels kernels_of(std::integer_sequence<int, N...>, std::integer_sequence<int, FEW...>) {
    if (F.has_bytes() && !K::TAKES_BYTES) { return {}; }
    return { &F, unpack<F>, K::MOST, K::FEW, K::FEW > 0 && !F.has_two_scales(), { K::template multiply<F, N + 1>... },
             { K::template multiply_few<F, FEW + 1>... } };
}

template <const Format & F, class K> const Kernels & kernels_of() {
    constexpr std::make_integer_sequence<int, K::MOST> numbers;
    constexpr std::make_integer_sequence<int, K::FEW> few;
    static constexpr Kernels found = kernels_of<F, K>(numbers, few);
    return found;
}

template <class K> const Kernels * kernels_for(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_0:   return &kernels_of<Q4_0, K>();
        case GGML_TYPE_Q4_1:   return &kernels_of<Q4_1, K>();
        case GGML_TYPE_Q5_0:   return &kernels_of<Q5_0, K>();
        case GGML_TYPE_Q5_1:   return &kernels_of<Q5_1, K>();
        case GGML_TYPE_Q8_0:   return &kernels_of<Q8_0, K>();
        case GGML_TYPE_IQ4_NL: return &kernels_of<IQ4_NL, K>();
        case GGML_TYPE_MXFP4:  return &kernels_of<MXFP4, K>();
        case GGML_TYPE_IQ4_XS: return &kernels_of<IQ4_XS, K>();
        case GGML_TYPE_Q4_K:   return &kernels_of<Q4_K, K>();
        case GGML_TYPE_Q5_K:   return &kernels_of<Q5_K, K>();
        case GGML_TYPE_Q6_K:   return &kernels_of<Q6_K, K>();
        default:               return nullptr;
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

// How weights of the type are multiplied, or null: by ggml's kernels.
const Kernels * kernels_for(enum ggml_type type) {
    const int bits = used_bits.load(std::memory_order_relaxed);
    const Kernels * found = bits == 512 ? kernels_for<Avx512>(type) : bits == 256 ? kernels_for<Avx2>(type) : nullptr;
    return found && found->format ? found : nullptr;
}

// The memory of an operation: one matrix and its tokens, or matrices of experts, of which each token has some.
struct Work {
    int64_t blocks, panels;    // of a row; those that a thread takes at a time: a chunk
    int64_t tokens, matrices;  // each expert of a token counts
    size_t  bytes;

    // All tokens in the order of the matrices, and where their results go.
    TokenBlock * rounded;
    float **     results;
    const char ** activations;
    int64_t *    firsts;   // the first token of each matrix, and the number of tokens
    int64_t *    used;     // the number of matrices with tokens, and these
    Counter *    next;     // of the chunks of each thread
    PanelBlock * unpacked;  // of the first thread

    Work(const ggml_tensor * op, int threads, void * memory) {
        const bool has_experts = op->op == GGML_OP_MUL_MAT_ID;
        blocks   = op->src[0]->ne[0] / BLOCK;
        tokens   = op->ne[1] * op->ne[2];
        matrices = has_experts ? op->src[0]->ne[2] : 1;
        const int64_t fitting = PANEL_BYTES / (blocks * static_cast<int64_t>(sizeof(PanelBlock)));
        panels = std::clamp<int64_t>(std::min(fitting, op->ne[0] / ROWS / (8 * threads)), 1, MOST_PANELS);
        char * at = aligned<char>(memory);
        unpacked    = take<PanelBlock>(at, threads * panels * blocks);
        rounded     = take<TokenBlock>(at, tokens * blocks);
        results     = take<float *>(at, tokens);
        activations = take<const char *>(at, tokens);
        firsts      = take<int64_t>(at, matrices + 1);
        used        = take<int64_t>(at, matrices + 1);
        next        = take<Counter>(at, threads);
        bytes = at - static_cast<char *>(memory) + ALIGNMENT;
    }

    // The place `at` is for a token `m` with its expert `n`, or for the token `n` of one matrix.
    void place(const ggml_tensor * op, int64_t n, int64_t m, int64_t at) const {
        const ggml_tensor * source = op->src[1];
        activations[at] = static_cast<char *>(source->data) + n % source->ne[1] * source->nb[1] + m * source->nb[2];
        results[at] = reinterpret_cast<float *>(static_cast<char *>(op->data) + n * op->nb[1] + m * op->nb[2]);
    }

    // Find the tokens of each expert.
    void sort(const ggml_tensor * op) const {
        const ggml_tensor * experts = op->src[2];
        const auto expert_of = [&](int64_t n, int64_t m) {
            const char * address = static_cast<char *>(experts->data) + n * experts->nb[0] + m * experts->nb[1];
            const int32_t expert = four_bytes(address);
            GGML_ASSERT(expert >= 0 && expert < matrices);
            return expert;
        };
        std::fill(firsts, firsts + matrices + 1, 0);
        for (int64_t m = 0; m < op->ne[2]; m++) {
            for (int64_t n = 0; n < op->ne[1]; n++) { firsts[expert_of(n, m)]++; }
        }
        used[0] = 0;
        for (int64_t matrix = 0, at = 0; matrix <= matrices; matrix++) {
            if (firsts[matrix] > 0) { used[++used[0]] = matrix; }
            at += std::exchange(firsts[matrix], at);
        }
        for (int64_t m = 0; m < op->ne[2]; m++) {
            for (int64_t n = 0; n < op->ne[1]; n++) { place(op, n, m, firsts[expert_of(n, m)]++); }
        }
        for (int64_t matrix = matrices; matrix > 0; matrix--) { firsts[matrix] = firsts[matrix - 1]; }
        firsts[0] = 0;
    }
};

// Weights are in host memory, as the file has them, and so are tokens and results.
bool computes(const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) { return false; }
    const ggml_tensor * weights = op->src[0];
    const ggml_tensor * tokens  = op->src[1];
    const Kernels * kernels = kernels_for(weights->type);
    if (!kernels || weights->extra || !weights->buffer || !ggml_backend_buffer_is_host(weights->buffer) ||
        weights->nb[0] != ggml_type_size(weights->type) || tokens->type != GGML_TYPE_F32 ||
        tokens->nb[0] != sizeof(float) || op->nb[0] != sizeof(float) || op->ne[3] != 1) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT_ID) {  // panels of experts with a token or two would be slower than ggml's kernels
        return (op->ne[2] > 1 || kernels->takes_one) &&
               (kernels->few > 0 || op->ne[1] * op->ne[2] >= 4 * weights->ne[2]);
    }
    return (op->ne[1] > 1 || kernels->takes_one) && op->ne[2] == 1 &&
           ggml_get_op_params_i32(op, 1) != GGML_HINT_SRC0_IS_HADAMARD;
}

class Traits : public ggml::cpu::tensor_traits {
    bool work_size(int threads, const ggml_tensor * op, size_t & size) override {
        size = Work(op, threads, nullptr).bytes;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Kernels & kernels = *kernels_for(op->src[0]->type);
        const Work work(op, params->nth, params->wdata);
        if (params->wsize < work.bytes) { return false; }  // planned for ggml's kernels
        const bool has_experts = op->op == GGML_OP_MUL_MAT_ID;
        if (params->ith == 0) {
            if (has_experts) {
                work.sort(op);
            } else {
                work.firsts[0] = 0, work.firsts[1] = work.tokens, work.used[0] = 1, work.used[1] = 0;
            }
        }
        if (has_experts) { ggml_barrier(params->threadpool); }
        const int64_t step = work.panels * ROWS, each = (op->ne[0] + step - 1) / step;
        const int64_t chunks = each * (has_experts ? work.used[0] : 1);
        const auto first_of = [&](int thread) { return chunks * thread / params->nth; };
        work.next[params->ith].value = first_of(params->ith);
        if (!has_experts) {
            const ggml_tensor * weights = op->src[0];
            const int64_t row = first_of(params->ith) * step, bytes = weights->nb[1];
            fetch(static_cast<const char *>(weights->data) + row * bytes, ROWS * bytes + AHEAD);
        }
        for (int64_t token = params->ith; token < work.tokens; token += params->nth) {
            if (!has_experts) { work.place(op, token, 0, token); }
            const auto * activations = reinterpret_cast<const float *>(work.activations[token]);
            round_activations(activations, work.blocks, *kernels.format, work.rounded + token * work.blocks);
        }
        ggml_barrier(params->threadpool);

        // A thread computes neighbouring chunks, as the next is fetched meanwhile, and then what others have left.
        PanelBlock * panels = work.unpacked + params->ith * work.panels * work.blocks;
        for (int n = 0; n < params->nth; n++) {
            const int thread = (params->ith + n) % params->nth;
            std::atomic<int64_t> & next = work.next[thread].value;
            for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < first_of(thread + 1);) {
                const int64_t matrix = work.used[1 + chunk / each], first = chunk % each * step;
                multiply(kernels, op, work, matrix, first, std::min(first + step, op->ne[0]), panels);
            }
        }
        return true;
    }

    // The rows of a matrix from `first` to `last`. Where a panel has fewer than sixteen, the last one is repeated.
    static void multiply(const Kernels & kernels, ggml_tensor * op, const Work & work, int64_t matrix, int64_t first,
                         int64_t last, PanelBlock * panels) {
        const ggml_tensor * weights = op->src[0];
        const char * data = static_cast<const char *>(weights->data) + matrix * weights->nb[2];
        const int64_t blocks = work.blocks, end = work.firsts[matrix + 1];
        int64_t token = work.firsts[matrix];
        const MultiplyFew few = end - token <= kernels.few ? kernels.multiply_few[end - token - 1] : nullptr;
        const auto factors_of = [&](int64_t row) -> Factors {
            return { panels + (row - first) / ROWS * blocks, work.rounded + token * blocks, blocks,
                     work.results + token, row, std::min(ROWS, last - row) };
        };
        for (int64_t row = first; row < last; row += ROWS) {
            const char * rows[ROWS];
            for (int64_t n = 0; n < ROWS; n++) { rows[n] = data + std::min(row + n, last - 1) * weights->nb[1]; }
            const char * next = data + (row + ROWS) * weights->nb[1] + AHEAD;
            if (few) {
                few(rows, next, factors_of(row));
            } else {
                kernels.unpack(rows, blocks, next, panels + (row - first) / ROWS * blocks);
            }
        }
        for (; !few && token < end; token += kernels.most) {
            const Multiply multiply = kernels.multiply[std::min(kernels.most, end - token) - 1];
            for (int64_t row = first; row < last; row += ROWS) { multiply(factors_of(row)); }
        }
    }
};

// The interface of ggml-cpu for kernels that it does not have itself. No tensor is ever in a buffer of this type.
class Products : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static Traits traits;
        return computes(op) ? &traits : used_bits == 512 ? arriero::attention_of(op) : nullptr;
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
