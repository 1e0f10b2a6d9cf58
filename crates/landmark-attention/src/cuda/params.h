// What crosses the boundary between Rust and CUDA. `params.rs` holds the same structs; both sides assert their sizes.
#pragma once
#include <cstdint>

// Keys are worked on in units of 64 slots, a unit in 8 groups of 8 slots, so that every block starts at a group: the sums over a
// block are then sums over whole groups, whatever the blocks' sizes.
constexpr int GROUPS = 8;
constexpr int UNIT = 64;

// This group is the last of a segment: of a block, or of a piece of one.
constexpr uint8_t SEGMENT_END = 1;
// The last key of this group is the landmark of its block.
constexpr uint8_t LANDMARK = 2;

struct Group {
    int32_t start;   // its first key; keys are consecutive
    uint8_t count;   // 0 to 8 keys
    uint8_t flags;
    uint8_t hidden;  // bit i: a query does not see key i if that is the query's own position
    uint8_t reserved;
};

struct Unit {
    Group groups[GROUPS];
    int32_t first_key, last_key;
    // A block that does not fit a unit is long: it takes whole units of its own.
    int32_t long_block;             // its ordinal among the long blocks of the row, or -1
    int32_t landmark;               // the place of its landmark
    int32_t part_first, part_last;  // its units
};

// What Hopper's kernels work on: a block, landmark included, or a piece of a block that no query is behind: n is BEYOND, its keys
// are the next 63.
struct Block {
    int32_t start, n;
};
constexpr int BEYOND = 1 << 30;

// Of 64 queries in turn: how many blocks one of them sees, and how many all of them are behind.
struct View {
    int32_t seen, behind;
};

enum DType : int32_t { F32 = 0, F16 = 1, BF16 = 2 };

struct Strides {
    int64_t batch, head, step;  // in elements; channels are contiguous
};

// Weights fall where a hash is below a threshold, 0 for none; what is kept is multiplied by 1 / (1 - p).
struct Dropout {
    uint32_t seed_low, seed_high, weights, groups;
    float weights_kept, groups_kept;
};

struct Params {
    const void *q, *k, *v, *dout;
    void *out;         // [batch, heads, q_len, head_dim]; so are dq, and dk and dv with kv_heads and kv_len
    float *lse;        // [batch, heads, q_len], natural
    void *dq, *dk, *dv;
    float *rows;       // [batch, heads, q_pad, 2]: log-sum-exp in base 2 and delta, from the backward's first kernel
    float *stats;      // [batch, heads, LONG_BLOCKS_AT_ONCE, q_pad, 2]: shift and D of long blocks
    const Unit *units; // of all rows, one after the other
    const int32_t *first_unit;  // [batch + 1]: the units of row b are first_unit[b]..first_unit[b + 1]
    // Hopper's kernels for irregular landmarks, or null: [batch, block_stride] blocks, [batch, q_len / 64 rounded up] views.
    const Block *blocks;
    const View *views;
    Strides q_strides, k_strides, v_strides, dout_strides;
    int32_t batch, heads, kv_heads, q_len, kv_len, head_dim;
    int32_t q_pad;     // q_len rounded up to a multiple of 128
    int32_t max_units; // of any row
    int32_t max_long_blocks;
    int32_t block;     // L if every L-th key is a landmark and the softmax is grouped, else 0
    int32_t block_stride;  // even; a row is filled up with blocks of keys behind kv_len
    int32_t dtype;
    float scale;
    int32_t reserved;
    Dropout dropout;
};

// A forward pass with few queries: the units of each row in `count` runs, for a block of threads each, so that there are enough of those.
struct Splits {
    const int32_t *first;  // [batch, count + 1]: run i of row b is units first[b, i]..first[b, i + 1] of it; no long block is in two
    float *out;            // [count, batch, heads, q_len, head_dim]: the runs' own outputs
    float *lse;            // [count, batch, heads, q_len], in base 2
    int32_t count, reserved;
};

// A rotation of x, [batch, heads, time, 2 * pairs], into out, contiguous.
struct RopeParams {
    const void *x;
    void *out;
    const float *table;  // [time or batch * time, pairs, 2]: cosine and sine
    Strides strides;
    int32_t batch, heads, time, pairs;
    int32_t per_row;     // the table has rows for each row of the batch
    int32_t halves;      // pair i is channels i and i + pairs, not 2 i and 2 i + 1
    int32_t dtype;
    float sign;          // -1: back
};

enum Selection : int32_t { PER_TOKEN_AND_HEAD = 0, MAX_OVER_HEADS = 1, MAX_OVER_TOKENS = 2 };

// Retrieval: `select` reads queries and landmarks and writes `chosen`, `attend` reads all but the landmarks and writes the rest.
struct RetrievalParams {
    const void *queries;               // [slots, batch, heads, time, head_dim]
    const void *keys, *values;         // [batch, kv_heads, capacity, block, head_dim]
    const void *landmarks;             // [batch, kv_heads, capacity, head_dim]
    const uint32_t *lengths;           // [len], or null: all blocks are full
    uint32_t *chosen;                  // [batch, heads, time, k]
    void *out;                         // [batch, heads, time, head_dim]
    float *lse, *scores;               // [batch, heads, time], [batch, heads, time, k], natural
    const uint32_t *frames;            // [batch, heads, time, k], or null: keys and values are [frames, block, head_dim], chosen blocks in these
    int32_t batch, heads, kv_heads, time, head_dim, block, capacity, first, len, newest, k;
    int32_t selection, dtype;
    float scale_log2;                  // the scale times log2(e)
};

// Units that the host sent, each `part_bytes` of keys, then as many of values, into frames of a pool.
struct PlaceParams {
    const void *units;
    const uint32_t *frames;  // [count]
    void *keys, *values;
    int64_t part_bytes;
    int32_t count, reserved;
};

// Two attentions of the same queries, [rows, head_dim] and natural log-sum-exps [rows] each, into one.
struct JoinParams {
    const void *a, *b;
    void *out;
    const float *a_lse, *b_lse;
    float *lse;
    int64_t rows;
    int32_t head_dim, dtype;
};

// Long blocks whose statistics are held at once: what keeps their memory O(q_len).
constexpr int LONG_BLOCKS_AT_ONCE = 16;

// Beside CUDA's own errors.
constexpr int TOO_LITTLE_SHARED_MEMORY = 1 << 20;

static_assert(sizeof(Group) == 8 && sizeof(Unit) == 88 && sizeof(Strides) == 24 && sizeof(Block) == 8 && sizeof(Params) == 296);
static_assert(sizeof(Splits) == 32 && sizeof(RopeParams) == 80 && sizeof(RetrievalParams) == 136 && sizeof(PlaceParams) == 48 && sizeof(JoinParams) == 64);
