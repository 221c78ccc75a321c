// Attention for ggml's CPU backend on x86 with AVX-512.
//
// ggml's kernels convert keys and values again for each query and sum up each score alone, but for prompts of many
// tokens. Here the cells that a token sees are divided into tiles of sixteen, in their order. Keys and values of a tile
// are read once for the queries of all heads that share them, and of all tokens that have the same tile: a prefix that
// several texts share is computed together for these. Cells of other texts are left out.
//
// A token has up to eight chunks of tiles, by the number of its cells, whose results are put together in their order.
// So a result depends on what its token sees only: not on the other tokens of an operation, the free cells between, or
// the number of threads. Keys and values are halves; scores, weights and sums have 32 bits.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ggml-cpu-impl.h"
#include "ggml-products.h"

namespace {

using arriero::aligned;
using arriero::Counter;
using arriero::take;

constexpr int64_t CELLS = 16;   // of a tile, and columns of a vector
constexpr int64_t RANGE = 256;  // cells that are looked at before their tiles are computed
constexpr int64_t WORD  = 32;   // cells of a word of bits
constexpr int64_t LINE  = 64;   // bytes that are fetched from memory together
constexpr int64_t MOST_TOKENS = 16, MOST_ROWS = 64;  // that are computed together; a row is a query of a head
constexpr int64_t CHUNKS = 8, LEAST_TILES = 4;       // most chunks of a token, and tiles of a chunk at least
constexpr int64_t FEW_ROWS = 8;                       // for which keys and values are converted while they are used
// Up to so many tokens are divided by their chunks until there are so many units.
constexpr int64_t UNITS = 64;
constexpr int64_t MOST_BYTES = 256 * 1024;           // of queries and results of a unit, which stay in the cache
// Tiles of a range: full ones of each token, one that began before, and one that is not full.
constexpr int64_t MOST_TILES = (RANGE / CELLS + 2) * MOST_TOKENS;
constexpr float    LEAST  = -1e30f;  // less than any score, and finite
constexpr uint16_t HIDDEN = 0xfc00;  // minus infinity, in a mask

AVX512 inline __m512 floats_at(const void * halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(halves)));
}

// The exponential of numbers that are at most 0.
AVX512 inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110), x);  // in this order NaN remains
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    for (const float factor : { 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f }) {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    }
    return _mm512_scalef_ps(sum, n);
}

// Sixteen columns of the keys of four cells: in each vector four columns of each of them.
AVX512 inline void load_keys(const uint16_t * const * keys, int64_t column, __m512 * found) {
    const auto load = [&](int n) AVX512 {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(keys[4 * n] + column));
    };
    const __m256i a = load(0), b = load(1), c = load(2), d = load(3);
    const __m256i low = _mm256_unpacklo_epi64(a, b), low_2 = _mm256_unpacklo_epi64(c, d);
    const __m256i high = _mm256_unpackhi_epi64(a, b), high_2 = _mm256_unpackhi_epi64(c, d);
    found[0] = _mm512_cvtph_ps(_mm256_permute2x128_si256(low, low_2, 0x20));
    found[1] = _mm512_cvtph_ps(_mm256_permute2x128_si256(high, high_2, 0x20));
    found[2] = _mm512_cvtph_ps(_mm256_permute2x128_si256(low, low_2, 0x31));
    found[3] = _mm512_cvtph_ps(_mm256_permute2x128_si256(high, high_2, 0x31));
}

AVX512 inline __m512 four_columns(const float * query) { return _mm512_broadcast_f32x4(_mm_load_ps(query)); }

// The scores of sixteen cells. Each of the four vectors has sums of every fourth column for the cells n, n + 4, n + 8
// and n + 12.
AVX512 inline __m512 scores_of(const __m512 * sums) {
    __m512d pairs[2];
    for (int half = 0; half < 2; half++) {
        const __m512 &first = sums[2 * half], &second = sums[2 * half + 1];
        const __m512 pair = _mm512_add_ps(_mm512_unpacklo_ps(first, second), _mm512_unpackhi_ps(first, second));
        pairs[half] = _mm512_castps_pd(pair);
    }
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
}

// The scores of N queries for the cells of a tile, with keys as they are.
template <int N>
AVX512 void score(const float * queries, const uint16_t * const * keys, int64_t columns, float * scores) {
    __m512 sums[N][4];
    for (int n = 0; n < N; n++) {
        for (int cells = 0; cells < 4; cells++) { sums[n][cells] = _mm512_setzero_ps(); }
    }
    for (int64_t column = 0; column < columns; column += CELLS) {
        for (int cells = 0; cells < 4; cells++) {
            __m512 some[4];
            load_keys(keys + cells, column, some);
            for (int n = 0; n < N; n++) {
                for (int four = 0; four < 4; four++) {
                    const __m512 query = four_columns(queries + n * columns + column + 4 * four);
                    sums[n][cells] = _mm512_fmadd_ps(query, some[four], sums[n][cells]);
                }
            }
        }
    }
    for (int n = 0; n < N; n++) { _mm512_store_ps(scores + n * CELLS, scores_of(sums[n])); }
}

// The same with keys that are loaded already: for each four columns a vector of each four cells.
template <int N> AVX512 void score(const float * queries, const float * keys, int64_t columns, float * scores) {
    __m512 sums[N][4];
    for (int n = 0; n < N; n++) {
        for (int cells = 0; cells < 4; cells++) { sums[n][cells] = _mm512_setzero_ps(); }
    }
    for (int64_t column = 0; column < columns; column += 4) {
        __m512 some[4];
        for (int cells = 0; cells < 4; cells++) { some[cells] = _mm512_load_ps(keys + (column + cells) * CELLS); }
        for (int n = 0; n < N; n++) {
            const __m512 query = four_columns(queries + n * columns + column);
            for (int cells = 0; cells < 4; cells++) {
                sums[n][cells] = _mm512_fmadd_ps(query, some[cells], sums[n][cells]);
            }
        }
    }
    for (int n = 0; n < N; n++) { _mm512_store_ps(scores + n * CELLS, scores_of(sums[n])); }
}

AVX512 inline __m512 vector_at(const float * address) { return _mm512_load_ps(address); }
AVX512 inline __m512 vector_at(const uint16_t * address) { return floats_at(address); }

// Add V vectors of the values of a tile, from `column` on and times their weights, to N results.
template <int N, int V, class T>
AVX512 void add(const float * weights, const T * const * values, int64_t column, float * results, int64_t stride) {
    __m512 sums[N][V];
    for (int n = 0; n < N; n++) {
        for (int v = 0; v < V; v++) { sums[n][v] = _mm512_load_ps(results + n * stride + v * CELLS); }
    }
    for (int64_t cell = 0; cell < CELLS; cell++) {
        __m512 value[V];
        for (int v = 0; v < V; v++) { value[v] = vector_at(values[cell] + column + v * CELLS); }
        for (int n = 0; n < N; n++) {
            const __m512 weight = _mm512_set1_ps(weights[n * CELLS + cell]);
            for (int v = 0; v < V; v++) { sums[n][v] = _mm512_fmadd_ps(weight, value[v], sums[n][v]); }
        }
    }
    for (int n = 0; n < N; n++) {
        for (int v = 0; v < V; v++) { _mm512_store_ps(results + n * stride + v * CELLS, sums[n][v]); }
    }
}

// How many queries are computed at a time, with keys and values in a form.
constexpr int64_t MOST = 4;
template <class T>
constexpr void (*SCORE[MOST])(const float *, T, int64_t, float *) = { score<1>, score<2>, score<3>, score<4> };
template <class T> constexpr decltype(&add<1, 1, T>) ADD[MOST][4] = {
    { add<1, 1, T>, add<1, 2, T>, add<1, 3, T>, add<1, 4, T> },
    { add<2, 1, T>, add<2, 2, T>, add<2, 3, T>, add<2, 4, T> },
    { add<3, 1, T>, add<3, 2, T>, add<3, 3, T>, add<3, 4, T> },
    { add<4, 1, T>, add<4, 2, T>, add<4, 3, T>, add<4, 4, T> },
};

template <class T> T * at(const ggml_tensor * tensor, int64_t second, int64_t third, int64_t fourth) {
    char * data = static_cast<char *>(tensor->data);
    return reinterpret_cast<T *>(data + second * tensor->nb[1] + third * tensor->nb[2] + fourth * tensor->nb[3]);
}

// The part of the result of a row that a chunk has: sixteen sums of weights, the greatest score, and from VALUES on the
// sums of the values.
constexpr int64_t GREATEST = CELLS, VALUES = 2 * CELLS;

// How an operation is divided, and its memory. A unit is some tokens of a stream, the queries of some heads of keys,
// and some of the chunks.
struct Plan {
    int64_t keys, values;                  // columns of a head
    int64_t heads, group, streams, cells;  // heads of keys, and heads of queries for each of them
    int64_t tokens, block, blocks, rows;   // of a stream; of a unit; blocks of a stream; queries of a block for a head
    int64_t split, step, units;            // units of the same tokens and heads; heads of a unit; all units
    int64_t part;                          // floats of a part of the result of a row
    int64_t words, masks;                  // of bits for a row of the mask; these rows
    int64_t floats;                        // of the scratch memory of a thread
    size_t  bytes;
    Counter *  next;        // unit
    uint32_t * seen;        // the cells that tokens see, by rows of the mask
    int32_t *  counts;      // of them
    int32_t *  has_values;  // whether some of them have a mask that is not 0
    float *    scratch;     // of the first thread
    float *    results;     // the parts of all rows, if their tokens are divided

    Plan(const ggml_tensor * op, int threads, void * memory) {
        const ggml_tensor * q = op->src[0];
        const ggml_tensor * k = op->src[1];
        const ggml_tensor * v = op->src[2];
        const ggml_tensor * mask = op->src[3];
        keys = k->ne[0], values = v->ne[0], part = VALUES + values;
        heads = k->ne[2], group = q->ne[2] / heads, streams = q->ne[3], cells = k->ne[1];
        tokens = q->ne[1];
        block  = std::clamp<int64_t>(MOST_ROWS / group, 1, std::min(MOST_TOKENS, tokens));
        blocks = (tokens + block - 1) / block;
        rows   = block * group;
        split  = 1;
        const int64_t most = std::min(CHUNKS, (cells - 1) / (LEAST_TILES * CELLS) + 1);
        while (split < most && streams * blocks * split < UNITS && streams * tokens <= UNITS) { split *= 2; }
        // All heads of a cell are neighbours in memory.
        const int64_t each = streams * blocks * split, row_bytes = (keys + part) * sizeof(float);
        step = heads * k->nb[2] <= k->nb[1] && heads * v->nb[2] <= v->nb[1] ? heads : 1;
        while (step > 1 && (each * (heads / step) < 2 * threads || step * rows * row_bytes > MOST_BYTES)) {
            step = step % 2 == 0 ? step / 2 : 1;
        }
        units  = each * (heads / step);
        words  = (cells + WORD - 1) / WORD;
        masks  = mask ? tokens * mask->ne[3] : 1;
        const int64_t all = CHUNKS * heads * rows * part;
        floats = step * rows * keys + rows * CELLS + CELLS * (keys + values) + (split > 1 ? 0 : all / heads * step);
        char * at  = aligned<char>(memory);
        next       = take<Counter>(at, 1);
        seen       = take<uint32_t>(at, masks * words);
        counts     = take<int32_t>(at, masks);
        has_values = take<int32_t>(at, masks);
        scratch    = take<float>(at, threads * floats);
        results    = take<float>(at, split > 1 ? streams * blocks * all : 0);
        bytes      = at - static_cast<char *>(memory) + arriero::ALIGNMENT;
    }

    int64_t mask_of(const ggml_tensor * op, int64_t token, int64_t stream) const {
        return op->src[3] ? stream % op->src[3]->ne[3] * tokens + token : 0;
    }

    // Tiles of each chunk of a token that sees so many cells.
    static int64_t chunk_of(int64_t count) {
        int64_t tiles = LEAST_TILES;
        while (tiles * CELLS * CHUNKS < count) { tiles *= 2; }
        return tiles;
    }
};

// Find the cells that a row of the mask shows.
AVX512 void look(const Plan & plan, const ggml_tensor * op, int64_t row) {
    const ggml_tensor * mask = op->src[3];
    uint32_t * seen = plan.seen + row * plan.words;
    const auto * halves = mask ? at<uint16_t>(mask, row % plan.tokens, 0, row / plan.tokens) : nullptr;
    const __m512i hidden = _mm512_set1_epi16(static_cast<int16_t>(HIDDEN));
    int32_t count = 0;
    uint32_t others = 0;
    for (int64_t word = 0; word < plan.words; word++) {
        const int64_t left = std::min(WORD, plan.cells - word * WORD);
        const auto existing = static_cast<uint32_t>((uint64_t{ 1 } << left) - 1);
        seen[word] = existing;
        if (mask) {
            const __m512i some = _mm512_mask_loadu_epi16(hidden, existing, halves + word * WORD);
            seen[word] = _mm512_cmpneq_epi16_mask(some, hidden);
            others |= seen[word] & _mm512_test_epi16_mask(some, _mm512_set1_epi16(0x7fff));
        }
        count += __builtin_popcount(seen[word]);
    }
    plan.counts[row] = count, plan.has_values[row] = others != 0;
}

// Put the parts of the result of a row together: the row is a token of a stream with a head of queries.
AVX512 void merge(const Plan & plan, const ggml_tensor * op, const float * parts, int64_t head, int64_t token,
                  int64_t stream) {
    const int64_t stride = plan.rows * plan.part, seen = plan.counts[plan.mask_of(op, token, stream)];
    const int64_t cells = Plan::chunk_of(seen) * CELLS, count = (seen + cells - 1) / cells;
    const ggml_tensor * sinks = op->src[4];  // a score for each head that is no cell's
    const float sink = sinks ? static_cast<const float *>(sinks->data)[head] : LEAST;
    float greatest = sink, factors[CHUNKS];
    for (int64_t n = 0; n < count; n++) { greatest = std::max(greatest, parts[n * stride + GREATEST]); }
    const auto factor_of = [&](float score) AVX512 {
        return _mm512_cvtss_f32(exponential(_mm512_set1_ps(score - greatest)));
    };
    float sum = sinks ? factor_of(sink) : 0.0f;
    for (int64_t n = 0; n < count; n++) {
        factors[n] = factor_of(parts[n * stride + GREATEST]);
        sum += _mm512_reduce_add_ps(_mm512_load_ps(parts + n * stride)) * factors[n];
    }
    const __m512 inverse = _mm512_set1_ps(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int64_t column = 0; column < plan.values; column += CELLS) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t n = 0; n < count; n++) {
            const __m512 some = _mm512_load_ps(parts + n * stride + VALUES + column);
            total = _mm512_fmadd_ps(_mm512_set1_ps(factors[n]), some, total);
        }
        _mm512_storeu_ps(at<float>(op, head, token, stream) + column, _mm512_mul_ps(total, inverse));
    }
}

// Sixteen cells that some tokens see, the same place among the cells of each. At the end some see only the first ones.
struct Tile {
    int32_t number, size;
    int32_t cells[CELLS];
    uint8_t sizes[MOST_TOKENS];  // of the tokens that see it; 0 of others
};

// Cells that one token or all of them have seen, and what of them is not yet a tile.
struct Sight {
    int64_t count = 0;
    int32_t cells[CELLS];
};

// The computation of a unit by a thread.
class Unit {
  public:
    Unit(const Plan & plan, const ggml_tensor * op, int64_t unit, float * memory) : plan_(plan), op_(op) {
        const int64_t steps = plan.heads / plan.step, each = unit / steps;
        head_ = unit % steps * plan.step;
        first_ = each / plan.split % plan.blocks * plan.block, stream_ = each / plan.split / plan.blocks;
        tokens_ = std::min(plan.block, plan.tokens - first_);
        int64_t longest = 0;
        for (int64_t token = 0; token < tokens_; token++) {
            mask_rows_[token] = plan.mask_of(op, first_ + token, stream_);
            chunks_[token] = Plan::chunk_of(plan.counts[mask_rows_[token]]);
            longest = std::max(longest, chunks_[token]);
        }
        start_ = each % plan.split * (CHUNKS / plan.split) * longest * CELLS;
        stop_  = start_ + CHUNKS / plan.split * longest * CELLS;
        const int64_t all = CHUNKS * plan.rows * plan.part;
        all_queries_ = memory;
        weights_ = all_queries_ + plan.step * plan.rows * plan.keys;
        keys_    = weights_ + plan.rows * CELLS;
        values_  = keys_ + CELLS * plan.keys;
        all_results_ = plan.split > 1 ? plan.results + (each / plan.split * plan.heads + head_) * all
                                      : values_ + CELLS * plan.values;
    }

    AVX512 void compute() {
        for (int64_t head = 0; head < plan_.step; head++) {
            use_head(head);
            load_queries();
        }
        for (int64_t word = 0; word < plan_.words; word += RANGE / WORD) {
            count_ = 0;
            const int64_t last = std::min(word + RANGE / WORD, plan_.words);
            for (int64_t n = word; n < last; n++) { see(n); }
            const bool is_end = last == plan_.words || is_done();
            if (is_end) { see_rest(); }
            for (int64_t head = 0; head < plan_.step; head++) {
                use_head(head);
                for (int64_t n = 0; n < count_; n++) { attend(tiles_[n]); }
            }
            if (is_end) { break; }
        }
        for (int64_t head = 0; plan_.split == 1 && head < plan_.step; head++) {
            use_head(head);
            for (int64_t row = 0; row < tokens_ * plan_.group; row++) {
                merge(plan_, op_, results_ + row * plan_.part, head_of(row), first_ + row / plan_.group, stream_);
            }
        }
    }

  private:
    void use_head(int64_t head) {
        used_    = head_ + head;
        queries_ = all_queries_ + head * plan_.rows * plan_.keys;
        results_ = all_results_ + head * CHUNKS * plan_.rows * plan_.part;
    }

    int64_t head_of(int64_t row) const { return used_ * plan_.group + row % plan_.group; }

    AVX512 void load_queries() {
        float scale;
        std::memcpy(&scale, op_->op_params, sizeof(scale));
        for (int64_t row = 0; row < tokens_ * plan_.group; row++) {
            const auto * query = at<float>(op_->src[0], first_ + row / plan_.group, head_of(row), stream_);
            for (int64_t column = 0; column < plan_.keys; column += CELLS) {
                const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(query + column), _mm512_set1_ps(scale));
                _mm512_store_ps(queries_ + row * plan_.keys + column, scaled);
            }
        }
    }

    // ---- the tiles of the tokens ------------------------------------------------------------------------------------

    uint32_t seen(int64_t token, int64_t word) const { return plan_.seen[mask_rows_[token] * plan_.words + word]; }

    // Take up the cells of a word: together as long as all tokens see the same, and from then on each token alone.
    void see(int64_t word) {
        uint32_t alone = ~uint32_t{ 0 };
        if (are_equal_) {
            const uint32_t all = seen(0, word);
            uint32_t different = 0;
            for (int64_t token = 1; token < tokens_; token++) { different |= all ^ seen(token, word); }
            if (different) { alone = ~((different & -different) - 1); }
            see(together_, word, different ? all & ~alone : all, ALL);
            if (!different) { return; }
            are_equal_ = false;
            std::fill(sights_, sights_ + tokens_, together_);
        }
        for (int64_t token = 0; token < tokens_; token++) {
            see(sights_[token], word, seen(token, word) & alone, token);
        }
    }

    void see(Sight & sight, int64_t word, uint32_t bits, int64_t token) {
        const int64_t after = sight.count + __builtin_popcount(bits);
        if (after <= start_ || sight.count >= stop_) {
            sight.count = after;
            return;
        }
        for (; bits != 0; bits &= bits - 1) {
            const int64_t place = sight.count++;
            if (place < start_ || place >= stop_) { continue; }
            sight.cells[place % CELLS] = static_cast<int32_t>(word * WORD + __builtin_ctz(bits));
            if (sight.count % CELLS == 0) { add_tile(sight, CELLS, token); }
        }
    }

    bool is_done() const {
        const auto has_all = [this](const Sight & sight) { return sight.count >= stop_; };
        return are_equal_ ? has_all(together_) : std::all_of(sights_, sights_ + tokens_, has_all);
    }

    // Take up the cells that are less than a tile: the largest first, whose first cells are those of others.
    void see_rest() {
        for (int64_t size = CELLS - 1; size > 0; size--) {
            const auto has = [&](const Sight & sight) {
                return sight.count > start_ && sight.count < stop_ && sight.count % CELLS == size;
            };
            if (are_equal_ && has(together_)) { add_tile(together_, size, ALL); }
            for (int64_t token = 0; !are_equal_ && token < tokens_; token++) {
                if (has(sights_[token])) { add_tile(sights_[token], size, token); }
            }
        }
    }

    void add_tile(const Sight & sight, int64_t size, int64_t token) {
        const auto number = static_cast<int32_t>((sight.count - 1) / CELLS);
        for (int64_t n = count_; token != ALL && n-- > std::max<int64_t>(0, count_ - MOST_TOKENS);) {
            Tile & tile = tiles_[n];
            if (tile.number == number && tile.size >= size && std::equal(sight.cells, sight.cells + size, tile.cells)) {
                tile.sizes[token] = static_cast<uint8_t>(size);
                return;
            }
        }
        Tile & tile = tiles_[count_++];
        tile.number = number, tile.size = static_cast<int32_t>(size);
        // Where there are fewer than sixteen cells, the last one is repeated.
        for (int64_t n = 0; n < CELLS; n++) { tile.cells[n] = sight.cells[std::min(n, size - 1)]; }
        for (int64_t n = 0; n < MOST_TOKENS; n++) {
            tile.sizes[n] = token == n || (token == ALL && n < tokens_) ? static_cast<uint8_t>(size) : 0;
        }
        touch(tile);
    }

    // Read the keys and values of the cells in their order, all heads of the unit: they are fetched from memory several
    // times as fast as by one head after the other, and as software can ask for them.
    void touch(const Tile & tile) const {
        for (const ggml_tensor * tensor : { op_->src[1], op_->src[2] }) {
            const int64_t bytes = (plan_.step - 1) * tensor->nb[2] + tensor->ne[0] * sizeof(uint16_t);
            for (int64_t n = 0; n < tile.size; n++) {
                const auto * row = at<volatile char>(tensor, tile.cells[n], head_, stream_);
                for (int64_t byte = 0; byte < bytes; byte += LINE) { (void) row[byte]; }
            }
        }
    }

    // ---- the computation of a tile ----------------------------------------------------------------------------------

    AVX512 void attend(const Tile & tile) {
        const uint16_t *keys[CELLS], *values[CELLS];
        for (int64_t n = 0; n < CELLS; n++) {
            keys[n]   = at<uint16_t>(op_->src[1], tile.cells[n], used_, stream_);
            values[n] = at<uint16_t>(op_->src[2], tile.cells[n], used_, stream_);
        }
        int64_t tokens = 0;
        for (int64_t token = 0; token < tokens_; token++) { tokens += tile.sizes[token] > 0; }
        if (tokens * plan_.group <= FEW_ROWS) { return attend<const uint16_t * const *>(tile, keys, values); }

        // For more rows, keys and values are converted once.
        for (int64_t column = 0; column < plan_.keys; column += CELLS) {
            for (int64_t cells = 0; cells < 4; cells++) {
                __m512 some[4];
                load_keys(keys + cells, column, some);
                for (int64_t n = 0; n < 4; n++) {
                    _mm512_store_ps(keys_ + (column + 4 * n + cells) * CELLS, some[n]);
                }
            }
        }
        const float * converted[CELLS];
        for (int64_t n = 0; n < CELLS; n++) {
            float * target = values_ + n * plan_.values;
            for (int64_t column = 0; column < plan_.values; column += CELLS) {
                _mm512_store_ps(target + column, floats_at(values[n] + column));
            }
            converted[n] = target;
        }
        attend<const float *>(tile, keys_, converted);
    }

    // With the tokens that see it: neighbours that have chunks of the same size are computed together.
    template <class Keys, class T> void attend(const Tile & tile, Keys keys, const T * const * values) {
        for (int64_t token = 0, end; token < tokens_; token = end) {
            end = token + 1;
            if (!tile.sizes[token]) { continue; }
            while (end < tokens_ && tile.sizes[end] && chunks_[end] == chunks_[token]) { end++; }
            attend(tile, token, end - token, keys, values);
        }
    }

    template <class Keys, class T>
    void attend(const Tile & tile, int64_t token, int64_t tokens, Keys keys, const T * const * values) {
        const int64_t first = token * plan_.group, rows = tokens * plan_.group, part = plan_.part;
        float * results = results_ + (tile.number / chunks_[token] * plan_.rows + first) * part;
        if (tile.number % chunks_[token] == 0) {
            std::fill(results, results + rows * part, 0.0f);
            for (int64_t row = 0; row < rows; row++) { results[row * part + GREATEST] = LEAST; }
        }
        for (int64_t row = 0; row < rows; row += MOST) {
            SCORE<Keys>[std::min(rows - row, MOST) - 1](queries_ + (first + row) * plan_.keys, keys, plan_.keys,
                                                        weights_ + row * CELLS);
        }
        for (int64_t row = 0; row < rows; row++) {
            if (row % plan_.group == 0) { load_mask(tile, token + row / plan_.group); }
            weigh(weights_ + row * CELLS, results + row * part);
        }
        for (int64_t column = 0; column < plan_.values; column += 4 * CELLS) {
            const int64_t vectors = std::min<int64_t>((plan_.values - column) / CELLS, 4);
            for (int64_t row = 0; row < rows; row += MOST) {
                ADD<T>[std::min(rows - row, MOST) - 1][vectors - 1](
                    weights_ + row * CELLS, values, column, results + row * part + VALUES + column, part);
            }
        }
    }

    AVX512 void load_mask(const Tile & tile, int64_t token) {
        is_seen_    = static_cast<__mmask16>((1 << tile.sizes[token]) - 1);
        has_values_ = plan_.has_values[mask_rows_[token]];
        if (!has_values_) { return; }
        const ggml_tensor * mask = op_->src[3];
        const auto * row = at<uint16_t>(mask, first_ + token, 0, stream_ % mask->ne[3]);
        alignas(32) uint16_t halves[CELLS];
        for (int64_t n = 0; n < CELLS; n++) { halves[n] = row[tile.cells[n]]; }
        mask_ = floats_at(halves);
    }

    // Make scores of a row the weights of the cells, beside those of the cells before them.
    AVX512 void weigh(float * scores, float * result) const {
        __m512 found = _mm512_load_ps(scores);
        if (has_values_) { found = _mm512_add_ps(found, mask_); }
        found = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), is_seen_, found);
        if (_mm512_cmp_ps_mask(found, _mm512_set1_ps(result[GREATEST]), _CMP_GT_OQ)) {
            const float greatest = _mm512_reduce_max_ps(found);
            const __m512 factor = exponential(_mm512_set1_ps(result[GREATEST] - greatest));
            _mm512_store_ps(result, _mm512_mul_ps(_mm512_load_ps(result), factor));
            for (int64_t column = VALUES; column < plan_.part; column += CELLS) {
                _mm512_store_ps(result + column, _mm512_mul_ps(_mm512_load_ps(result + column), factor));
            }
            result[GREATEST] = greatest;
        }
        const __m512 weights = exponential(_mm512_sub_ps(found, _mm512_set1_ps(result[GREATEST])));
        _mm512_store_ps(result, _mm512_add_ps(_mm512_load_ps(result), weights));
        _mm512_store_ps(scores, weights);
    }

    static constexpr int64_t ALL = -1;  // tokens

    const Plan & plan_;
    const ggml_tensor * op_;
    int64_t first_, tokens_, head_, stream_;
    int64_t start_, stop_;             // of the cells that each token sees
    int64_t mask_rows_[MOST_TOKENS];   // of the tokens
    int64_t chunks_[MOST_TOKENS];      // tiles of each chunk of a token
    int64_t used_;                     // the head that is computed
    float * queries_;                  // of its rows, scaled
    float * results_;                  // of its rows, by chunks
    float * all_queries_;              // of all heads of the unit
    float * all_results_;
    float * weights_;                  // of the cells of a tile, by rows
    float * keys_;                     // of a tile, four columns of four cells
    float * values_;                   // of a tile
    __m512    mask_;                   // of a token, for the cells of a tile
    __mmask16 is_seen_;                // which of them it sees
    bool      has_values_;             // whether its mask may have other values than 0
    bool      are_equal_ = true;       // tokens have seen the same cells
    Sight     together_, sights_[MOST_TOKENS];
    int64_t   count_ = 0;  // of the tiles
    Tile      tiles_[MOST_TILES];
};

class Traits : public ggml::cpu::tensor_traits {
    bool work_size(int threads, const ggml_tensor * op, size_t & size) override {
        size = Plan(op, threads, nullptr).bytes;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Plan plan(op, params->nth, params->wdata);
        if (params->wsize < plan.bytes) { return false; }  // planned for ggml's kernels
        if (params->ith == 0) { plan.next->value = 0; }
        for (int64_t row = params->ith; row < plan.masks; row += params->nth) { look(plan, op, row); }
        ggml_barrier(params->threadpool);
        float * scratch = plan.scratch + params->ith * plan.floats;
        for (int64_t unit; (unit = plan.next->value.fetch_add(1)) < plan.units;) {
            Unit(plan, op, unit, scratch).compute();
        }
        if (plan.split == 1) { return true; }
        ggml_barrier(params->threadpool);
        const int64_t heads = plan.heads * plan.group, rows = plan.streams * plan.tokens * heads;
        for (int64_t n = params->ith; n < rows; n += params->nth) {
            const int64_t head = n % heads, token = n / heads % plan.tokens, stream = n / heads / plan.tokens;
            const int64_t block = stream * plan.blocks + token / plan.block;
            const int64_t row   = token % plan.block * plan.group + head % plan.group;
            const int64_t at    = (block * plan.heads + head / plan.group) * CHUNKS * plan.rows + row;
            merge(plan, op, plan.results + at * plan.part, head, token, stream);
        }
        return true;
    }
};

// Queries, keys and values of usual shapes, with a mask that is the same for all heads.
bool computes(const ggml_tensor * op) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT) { return false; }
    const ggml_tensor * q = op->src[0];
    const ggml_tensor * k = op->src[1];
    const ggml_tensor * v = op->src[2];
    const ggml_tensor * mask = op->src[3];
    float parameters[3];  // scale, greatest slope, softcap
    std::memcpy(parameters, op->op_params, sizeof(parameters));
    return parameters[1] == 0.0f && parameters[2] == 0.0f && q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 &&
           v->type == GGML_TYPE_F16 && q->nb[0] == sizeof(float) && k->nb[0] == 2 && v->nb[0] == 2 &&
           k->ne[0] % CELLS == 0 && v->ne[0] % CELLS == 0 && v->ne[2] == k->ne[2] && q->ne[2] % k->ne[2] == 0 &&
           k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[2] == 1));
}

}  // namespace

ggml::cpu::tensor_traits * arriero::attention_of(const ggml_tensor * op) {
    static Traits traits;
    return computes(op) ? &traits : nullptr;
}
