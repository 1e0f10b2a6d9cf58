// Scores of cached landmarks, in base 2, a tile of queries against 128 landmarks at a time, in f32 arithmetic. The products of a score are added in
// the order of the channels whatever the tile, so equal keys have equal scores: ties are ties.
#pragma once
#include "mma.cuh"
#include "params.h"
#include "segments.cuh"

constexpr int LANDMARKS = 128, SCORE_THREADS = 128, DEPTH = 32;

// What becomes of the scores of a tile.
enum ScoreMode {
    ROWS,    // each query's own
    STATS,   // each query's maximum and sum
    HEADS,   // the largest weight over the heads of a token
    TOKENS,  // the largest weight over the tokens of a head
};

// The columns of a score table: the older blocks, filled up to whole tiles, then the newest, which have queries of their own.
struct Columns {
    int older, older_tiles, tiles;
    __host__ __device__ Columns(const RetrievalParams &p)
        : older(p.len - p.newest), older_tiles((older + LANDMARKS - 1) / LANDMARKS), tiles(older_tiles + (p.newest + LANDMARKS - 1) / LANDMARKS) {}
    __host__ __device__ int64_t count() const { return int64_t(tiles) * LANDMARKS; }
    __device__ int block(int column) const { return column < older_tiles * LANDMARKS ? column : older + column - older_tiles * LANDMARKS; }
};

// The queries of a unit of work: `tile` rows at a time.
struct Work {
    int mode, tile, tiles, units;
    Work(const RetrievalParams &p, int mode, int tile) : mode(mode), tile(tile) {
        const int rows = mode == HEADS || mode == TOKENS ? p.time : p.heads / p.kv_heads * p.time;
        tiles = (rows + tile - 1) / tile;
        units = mode == TOKENS ? p.batch * p.heads : (mode == HEADS ? p.batch : p.batch * p.kv_heads) * tiles;
    }
    // Rows of the score table for a unit.
    __host__ __device__ int rows() const { return mode == TOKENS ? 1 : tile; }
};

// 8 channels of a row, of which `left` exist.
template <typename T> __device__ __forceinline__ void load_eight(float (&x)[8], const T *from, int left, bool packs) {
    if (packs && left > 0) {
        alignas(16) T pack[8];
#pragma unroll
        for (int i = 0; i < 8 * int(sizeof(T)) / 16; i++) reinterpret_cast<uint4 *>(pack)[i] = reinterpret_cast<const uint4 *>(from)[i];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = to_float(pack[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i < left ? to_float(from[i]) : 0.f;
    }
}

__device__ __forceinline__ int place_of(const RetrievalParams &p, int block) {
    const int place = p.first + block;
    return place < p.capacity ? place : place - p.capacity;
}

// Scores that a comparison can work with: NaN is the least, and there is one zero.
__device__ __forceinline__ float comparable(float x) { return x == x ? x + 0.f : NEGATIVE_INFINITY; }

// One warp for the score of a query and one of the newest blocks: [batch * heads * time, newest].
template <typename T> __global__ void newest_kernel(const __grid_constant__ RetrievalParams p, float *scores) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, rows = int64_t(p.batch) * p.heads * p.time;
    if (at >= rows * p.newest) return;
    const int64_t row = at / p.newest;
    const int i = at % p.newest, lane = threadIdx.x % 32;
    const int64_t kv = row / (int64_t(p.heads / p.kv_heads) * p.time);
    const T *q = static_cast<const T *>(p.queries) + ((i + 1) * rows + row) * p.head_dim;
    const T *key = static_cast<const T *>(p.landmarks) + (kv * p.capacity + place_of(p, p.len - p.newest + i)) * p.head_dim;
    float sum = 0;
    for (int c = lane; c < p.head_dim; c += 32) sum += to_float(q[c]) * p.scale_log2 * to_float(key[c]);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += across(sum, lanes);
    if (lane == 0) scores[at] = sum;
}

// TQ queries against a tile of landmarks; a thread has RQ x RL of the scores.
template <typename T, int TQ, int RQ, int RL> struct ScoreTile {
    static constexpr int ACROSS = LANDMARKS / RL;  // threads that share a row
    static_assert(TQ / RQ * ACROSS == SCORE_THREADS, "a thread for each part of the tile");
    static constexpr int Q_STRIDE = TQ + 4, K_STRIDE = LANDMARKS + 4;
    struct Shared {
        float q[DEPTH][Q_STRIDE], k[DEPTH][K_STRIDE];
        float warps[SCORE_THREADS / 32][TQ];
        float across[TQ / RQ][LANDMARKS];
    };
    float s[RQ][RL];

    static __device__ int row(int i) { return threadIdx.x / ACROSS * RQ + i; }
    static __device__ int column(int j) {
        const int lane = threadIdx.x % ACROSS;
        return RL == 1 ? lane : j / 4 * (LANDMARKS / (RL < 4 ? 1 : RL / 4)) + lane * 4 + j % 4;
    }

    template <int R> static __device__ void read(float (&x)[R], const float *from) {
        if constexpr (R % 4 == 0) {
#pragma unroll
            for (int i = 0; i < R; i += 4) *reinterpret_cast<float4 *>(x + i) = *reinterpret_cast<const float4 *>(from + i);
        } else {
#pragma unroll
            for (int i = 0; i < R; i++) x[i] = from[i];
        }
    }

    // Rows first_row.. (`rows` of them exist) of the queries of slot 0 against the older landmarks of tile `tile`.
    __device__ void product(Shared &shared, const RetrievalParams &p, int64_t first_row, int rows, int64_t kv, int tile, int older) {
        const int d = p.head_dim, first = tile * LANDMARKS;
        const T *q = static_cast<const T *>(p.queries) + first_row * d, *k = static_cast<const T *>(p.landmarks) + kv * p.capacity * d;
        const bool packs = d % 8 == 0 && reinterpret_cast<uintptr_t>(p.queries) % 16 == 0 && reinterpret_cast<uintptr_t>(p.landmarks) % 16 == 0;
#pragma unroll
        for (int i = 0; i < RQ; i++)
#pragma unroll
            for (int j = 0; j < RL; j++) s[i][j] = 0;
        for (int c = 0; c < d; c += DEPTH) {
            __syncthreads();
            for (int i = threadIdx.x; i < TQ * (DEPTH / 8); i += SCORE_THREADS) {
                const int row = i % TQ, at = i / TQ * 8;
                float x[8];
                load_eight(x, q + int64_t(row) * d + c + at, row < rows ? d - c - at : 0, packs);
#pragma unroll
                for (int e = 0; e < 8; e++) shared.q[at + e][row] = x[e] * p.scale_log2;
            }
            for (int i = threadIdx.x; i < LANDMARKS * (DEPTH / 8); i += SCORE_THREADS) {
                const int row = i % LANDMARKS, at = i / LANDMARKS * 8;
                const bool here = first + row < older;
                float x[8];
                load_eight(x, k + int64_t(here ? place_of(p, first + row) : 0) * d + c + at, here ? d - c - at : 0, packs);
#pragma unroll
                for (int e = 0; e < 8; e++) shared.k[at + e][row] = x[e];
            }
            __syncthreads();
#pragma unroll 8
            for (int e = 0; e < DEPTH; e++) {
                float a[RQ], b[RL];
                read(a, &shared.q[e][row(0)]);
#pragma unroll
                for (int j = 0; j < RL; j += 4) {
                    if constexpr (RL >= 4) *reinterpret_cast<float4 *>(b + j) = *reinterpret_cast<const float4 *>(&shared.k[e][column(j)]);
                    else b[j] = shared.k[e][column(j)];
                }
#pragma unroll
                for (int i = 0; i < RQ; i++)
#pragma unroll
                    for (int j = 0; j < RL; j++) s[i][j] = fmaf(a[i], b[j], s[i][j]);
            }
        }
    }

    // The scores of the newest blocks, from their table.
    __device__ void newest(const RetrievalParams &p, const float *scores, int64_t first_row, int rows, int first) {
#pragma unroll
        for (int i = 0; i < RQ; i++)
#pragma unroll
            for (int j = 0; j < RL; j++) {
                const int at = first + column(j);
                s[i][j] = row(i) < rows && at < p.newest ? scores[(first_row + row(i)) * p.newest + at] : 0.f;
            }
    }

    // A value for each row from a thread's own, in all threads of the row.
    template <typename F> static __device__ void reduce_rows(Shared &shared, float (&x)[RQ], F f) {
#pragma unroll
        for (int i = 0; i < RQ; i++)
#pragma unroll
            for (int lanes = (ACROSS < 32 ? ACROSS : 32) / 2; lanes > 0; lanes /= 2) x[i] = f(x[i], across(x[i], lanes));
        if constexpr (ACROSS > 32) {
            __syncthreads();
            if (threadIdx.x % 32 == 0)
#pragma unroll
                for (int i = 0; i < RQ; i++) shared.warps[threadIdx.x / 32][i] = x[i];
            __syncthreads();
#pragma unroll
            for (int i = 0; i < RQ; i++) {
                x[i] = shared.warps[0][i];
                for (int w = 1; w < SCORE_THREADS / 32; w++) x[i] = f(x[i], shared.warps[w][i]);
            }
        }
    }
};

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// One block of threads for a unit (units first_unit.., `units` of them at once) and a tile of landmarks.
//   ROWS, HEADS, TOKENS: scores [units * rows, columns], NaN in columns without a block; peaks [units * rows, tiles], the largest of a tile.
//   STATS: peaks [units * rows, tiles, 2], the largest of a tile and the sum of 2^(score - it).
// `lse` [batch * heads * time], in base 2, is read by HEADS and TOKENS.
template <typename T, int TQ, int RQ, int RL, int MODE>
__global__ void __launch_bounds__(SCORE_THREADS) score_kernel(const __grid_constant__ RetrievalParams p, int first_unit, int units, const float *newest,
                                                              const float *lse, float *scores, float *peaks) {
    using Tile = ScoreTile<T, TQ, RQ, RL>;
    __shared__ __align__(16) typename Tile::Shared shared;
    const Columns columns(p);
    const int unit = blockIdx.x % units + first_unit, tile = blockIdx.x / units;
    const int group = p.heads / p.kv_heads;
    const int rows_of_unit = MODE == HEADS || MODE == TOKENS ? p.time : group * p.time, tiles_of_rows = (rows_of_unit + TQ - 1) / TQ;
    const bool is_older = tile < columns.older_tiles;
    Tile x;
    auto compute = [&](int64_t first_row, int rows, int64_t kv) {
        if (is_older) x.product(shared, p, first_row, rows, kv, tile, columns.older);
        else x.newest(p, newest, first_row, rows, (tile - columns.older_tiles) * LANDMARKS);
    };
    auto exists = [&](int j) {
        const int column = Tile::column(j);
        return is_older ? tile * LANDMARKS + column < columns.older : (tile - columns.older_tiles) * LANDMARKS + column < p.newest;
    };
    const float nan = __int_as_float(0x7fffffff);

    if constexpr (MODE == TOKENS) {
        float best[RL];
#pragma unroll
        for (int j = 0; j < RL; j++) best[j] = NEGATIVE_INFINITY;
        for (int step = 0; step < tiles_of_rows; step++) {
            const int64_t first_row = int64_t(unit) * p.time + step * TQ;
            const int rows = min(TQ, p.time - step * TQ);
            compute(first_row, rows, unit / group);
#pragma unroll
            for (int i = 0; i < RQ; i++) {
                if (Tile::row(i) >= rows) continue;
                const float whole = lse[first_row + Tile::row(i)];
#pragma unroll
                for (int j = 0; j < RL; j++) best[j] = fmaxf(best[j], comparable(x.s[i][j] - whole));
            }
        }
#pragma unroll
        for (int j = 0; j < RL; j++) shared.across[threadIdx.x / Tile::ACROSS][Tile::column(j)] = exists(j) ? best[j] : nan;
        __syncthreads();
        const int column = threadIdx.x;
        float most = shared.across[0][column];
        for (int i = 1; i < TQ / RQ; i++) {
            const float other = shared.across[i][column];
            if (other > most) most = other;
        }
        const int64_t row = unit - first_unit;
        scores[row * columns.count() + tile * LANDMARKS + column] = most;
        __syncthreads();
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) most = fmaxf(most, across(most, lanes));
        if (threadIdx.x % 32 == 0) shared.across[0][threadIdx.x / 32] = most;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int w = 1; w < SCORE_THREADS / 32; w++) most = fmaxf(most, shared.across[0][w]);
            peaks[row * columns.tiles + tile] = most;
        }
        return;
    } else {
        const int tile_of_rows = unit % tiles_of_rows, rows = min(TQ, rows_of_unit - tile_of_rows * TQ);
        if constexpr (MODE == HEADS) {
            const int64_t b = unit / tiles_of_rows;
            float best[RQ][RL];
#pragma unroll
            for (int i = 0; i < RQ; i++)
#pragma unroll
                for (int j = 0; j < RL; j++) best[i][j] = NEGATIVE_INFINITY;
            for (int h = 0; h < p.heads; h++) {
                const int64_t first_row = (b * p.heads + h) * p.time + tile_of_rows * TQ;
                compute(first_row, rows, b * p.kv_heads + h / group);
#pragma unroll
                for (int i = 0; i < RQ; i++) {
                    const float whole = Tile::row(i) < rows ? lse[first_row + Tile::row(i)] : 0.f;
#pragma unroll
                    for (int j = 0; j < RL; j++) best[i][j] = fmaxf(best[i][j], comparable(x.s[i][j] - whole));
                }
            }
#pragma unroll
            for (int i = 0; i < RQ; i++)
#pragma unroll
                for (int j = 0; j < RL; j++) x.s[i][j] = best[i][j];
        } else {
            const int64_t kv = unit / tiles_of_rows;
            compute(kv * rows_of_unit + tile_of_rows * TQ, rows, kv);
        }
        float peak[RQ];
#pragma unroll
        for (int i = 0; i < RQ; i++) {
            peak[i] = NEGATIVE_INFINITY;
#pragma unroll
            for (int j = 0; j < RL; j++) {
                x.s[i][j] = exists(j) ? comparable(x.s[i][j]) : MODE == STATS ? NEGATIVE_INFINITY : nan;
                peak[i] = fmaxf(peak[i], x.s[i][j]);
            }
        }
        Tile::reduce_rows(shared, peak, larger);
        const int64_t first = int64_t(unit - first_unit) * TQ;
        const bool writes = threadIdx.x % Tile::ACROSS == 0;
        if constexpr (MODE == STATS) {
            float sum[RQ];
#pragma unroll
            for (int i = 0; i < RQ; i++) {
                sum[i] = 0;
#pragma unroll
                for (int j = 0; j < RL; j++) sum[i] += power2(x.s[i][j] - finite(peak[i]));
            }
            Tile::reduce_rows(shared, sum, [](float a, float b) { return a + b; });
            if (writes)
#pragma unroll
                for (int i = 0; i < RQ; i++)
                    reinterpret_cast<float2 *>(peaks)[(first + Tile::row(i)) * columns.tiles + tile] = {peak[i], sum[i]};
        } else {
            if (writes)
#pragma unroll
                for (int i = 0; i < RQ; i++) peaks[(first + Tile::row(i)) * columns.tiles + tile] = peak[i];
#pragma unroll
            for (int i = 0; i < RQ; i++) {
                float *to = scores + (first + Tile::row(i)) * columns.count() + tile * LANDMARKS;
#pragma unroll
                for (int j = 0; j < RL; j += 4) {
                    if constexpr (RL >= 4) *reinterpret_cast<float4 *>(to + Tile::column(j)) = *reinterpret_cast<const float4 *>(&x.s[i][j]);
                    else to[Tile::column(j)] = x.s[i][j];
                }
            }
        }
    }
}

// Log-sum-exps of rows from the tiles' statistics: a warp a row of the units.
static __global__ void lse_kernel(const __grid_constant__ RetrievalParams p, int first_unit, int units, int tile, const float *stats, float *lse) {
    const Columns columns(p);
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32, rows = p.heads / p.kv_heads * p.time, tiles = (rows + tile - 1) / tile;
    const int unit = first_unit + int(at / tile), row = unit % tiles * tile + int(at % tile);
    if (at >= int64_t(units) * tile || row >= rows) return;
    const float2 *from = reinterpret_cast<const float2 *>(stats) + at * columns.tiles;
    float max = NEGATIVE_INFINITY, sum = 0;
    for (int i = lane; i < columns.tiles; i += 32) max = fmaxf(max, from[i].x);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) max = fmaxf(max, across(max, lanes));
    for (int i = lane; i < columns.tiles; i += 32) sum += from[i].y * power2(from[i].x - finite(max));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += across(sum, lanes);
    if (lane == 0) lse[int64_t(unit / tiles) * rows + row] = max + log2f(sum);
}
