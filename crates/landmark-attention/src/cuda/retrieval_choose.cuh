// The k best of a row of scores, the older first among equals, in text order.
//
// Twice the same selection: of the tiles by their largest scores, then of the scores of the k tiles that won. The k best scores are there: with x the
// k-th largest peak, k scores are at least x; those above x are in tiles that won, and of those equal to x the oldest are, as the oldest
// tiles won. So a row is read once, when it is written, and after that k tiles of it.
#pragma once
#include "retrieval_scores.cuh"

constexpr int CHOOSE_THREADS = 256;

// Ascending with the number; 0 for NaN, which no number has.
__device__ __forceinline__ uint32_t rank_of(float x) {
    if (x != x) return 0;
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct ChooseShared {
    int histogram[256];
    uint32_t prefix;
    int left;
    int sums[2][CHOOSE_THREADS / 32];
};

// Calls emit(place among the k, i) for the k of 0..n whose key(i) is largest, of equals the first, in order. All threads call it; 1 <= k <= n.
template <typename Key, typename Emit> __device__ void top_k(ChooseShared &shared, int n, int k, Key key, Emit emit) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The k-th largest key, eight bits at a time: `left` of the keys that begin like it are among the k.
    uint32_t prefix = 0;
    int left = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        shared.histogram[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += CHOOSE_THREADS) {
            const uint32_t u = key(i);
            if (shift == 24 || u >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(&shared.histogram[u >> shift & 255], 1);
        }
        __syncthreads();
        if (warp == 0) {
            // A lane has eight digits, the first lane the largest.
            int sum = 0;
            for (int j = 0; j < 8; j++) sum += shared.histogram[255 - 8 * lane - j];
            int through = sum;
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                const int other = __shfl_up_sync(~0u, through, lanes);
                if (lane >= lanes) through += other;
            }
            int before = through - sum;
            if (before < left && left <= through) {
                for (int j = 0; j < 8; j++) {
                    const int digit = 255 - 8 * lane - j, count = shared.histogram[digit];
                    if (before + count >= left) {
                        shared.prefix = prefix | uint32_t(digit) << shift;
                        shared.left = left - before;
                        break;
                    }
                    before += count;
                }
            }
        }
        __syncthreads();
        prefix = shared.prefix, left = shared.left;
    }
    // All above it and the first `left` that are equal to it: a thread has a run of them.
    const int run = (n + CHOOSE_THREADS - 1) / CHOOSE_THREADS;
    const int begin = min(int(threadIdx.x) * run, n), end = min(begin + run, n);
    int above = 0, equal = 0;
    for (int i = begin; i < end; i++) {
        const uint32_t u = key(i);
        above += u > prefix, equal += u == prefix;
    }
    int through[2] = {above, equal};
#pragma unroll
    for (int x = 0; x < 2; x++) {
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int other = __shfl_up_sync(~0u, through[x], lanes);
            if (lane >= lanes) through[x] += other;
        }
        if (lane == 31) shared.sums[x][warp] = through[x];
    }
    __syncthreads();
    int above_before = through[0] - above, equal_before = through[1] - equal;
    for (int w = 0; w < warp; w++) above_before += shared.sums[0][w], equal_before += shared.sums[1][w];
    if (above > 0 || equal > 0) {
        for (int i = begin; i < end; i++) {
            const uint32_t u = key(i);
            if (u > prefix || (u == prefix && equal_before < left)) emit(above_before + min(equal_before, left), i);
            above_before += u > prefix, equal_before += u == prefix;
        }
    }
    __syncthreads();
}

// One block of threads for a row of the score table; `tile` rows are a unit's, but in mode TOKENS. Memory: k numbers.
static __global__ void __launch_bounds__(CHOOSE_THREADS) choose_kernel(const __grid_constant__ RetrievalParams p, int mode, int first_unit, int tile,
                                                                       const float *scores, const float *peaks) {
    __shared__ ChooseShared shared;
    extern __shared__ int won[];
    const Columns columns(p);
    const int64_t at = blockIdx.x;
    // The rows of `chosen` that this one is for: first, first + step, ...
    int64_t first, step;
    int rows;
    if (mode == TOKENS) {
        first = (first_unit + at) * p.time, step = 1, rows = p.time;
    } else {
        const int of_unit = mode == HEADS ? p.time : p.heads / p.kv_heads * p.time, tiles = (of_unit + tile - 1) / tile;
        const int64_t unit = first_unit + at / tile;
        const int row = int(unit % tiles) * tile + int(at % tile);
        if (row >= of_unit) return;
        first = mode == HEADS ? unit / tiles * p.heads * p.time + row : unit / tiles * of_unit + row;
        step = p.time, rows = mode == HEADS ? p.heads : 1;
    }
    scores += at * columns.count(), peaks += at * columns.tiles;
    const int winners = min(p.k, columns.tiles);
    if (columns.tiles > p.k) {
        top_k(shared, columns.tiles, p.k, [&](int i) { return rank_of(peaks[i]); }, [&](int rank, int i) { won[rank] = i; });
    } else {
        for (int i = threadIdx.x; i < winners; i += CHOOSE_THREADS) won[i] = i;
        __syncthreads();
    }
    auto column = [&](int i) { return won[i / LANDMARKS] * LANDMARKS + i % LANDMARKS; };
    top_k(shared, winners * LANDMARKS, p.k, [&](int i) { return rank_of(scores[column(i)]); },
          [&](int rank, int i) {
              const uint32_t block = columns.block(column(i));
              for (int r = 0; r < rows; r++) p.chosen[(first + r * step) * p.k + rank] = block;
          });
}
