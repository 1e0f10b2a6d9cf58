// Attention over chosen blocks, read where they are: one block of threads a query, one warp a block of tokens at a time.
//
// A row of keys or values is read by eight lanes, so a warp has four tokens at a time.
#pragma once
#include "retrieval_scores.cuh"

constexpr int ATTEND_TOKENS = 64;  // whose scores a warp holds at once

// The channels of a row that a lane has: packs of 16 bytes, every eighth one.
template <typename T, int COLUMNS> struct LaneRow {
    static constexpr int PACK = 16 / sizeof(T), PACKS = (COLUMNS + 8 * PACK - 1) / (8 * PACK), CHANNELS = PACKS * PACK;
    static __device__ int channel(int i) { return (i / PACK * 8 + threadIdx.x % 8) * PACK + i % PACK; }
    static __device__ __forceinline__ void load(float (&x)[CHANNELS], const T *row, int head_dim, bool packs) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i += PACK) {
            const int left = head_dim - channel(i);
            const T *from = row + channel(i);
            if (packs) {
                alignas(16) T pack[PACK];
                *reinterpret_cast<uint4 *>(pack) = left > 0 ? *reinterpret_cast<const uint4 *>(from) : uint4{0, 0, 0, 0};
#pragma unroll
                for (int e = 0; e < PACK; e++) x[i + e] = to_float(pack[e]);
            } else {
#pragma unroll
                for (int e = 0; e < PACK; e++) x[i + e] = e < left ? to_float(from[e]) : 0.f;
            }
        }
    }
};

// Eight lanes' sum, in each of them.
__device__ __forceinline__ float eight_sum(float x) {
    x += across(x, 1), x += across(x, 2);
    return x + across(x, 4);
}

template <typename T, int COLUMNS> __global__ void __launch_bounds__(256) attend_kernel(const __grid_constant__ RetrievalParams p) {
    using Row = LaneRow<T, COLUMNS>;
    __shared__ float tokens[8][ATTEND_TOKENS], parts[8][COLUMNS], maxima[8], sums[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, d = p.head_dim;
    const int64_t row = blockIdx.x, rows = int64_t(p.batch) * p.heads * p.time;
    const int64_t kv = row / (int64_t(p.heads / p.kv_heads) * p.time);
    auto aligned = [](const void *x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
    const bool packs = d % Row::PACK == 0 && aligned(p.queries) && aligned(p.keys) && aligned(p.values);

    float out[Row::CHANNELS] = {}, max = NEGATIVE_INFINITY, sum = 0;
    for (int rank = warp; rank < p.k; rank += warps) {
        const uint32_t block = p.chosen[row * p.k + rank];
        if (block >= uint32_t(p.len)) {
            // No such block: nothing is read, and nobody takes the result for one.
            sum = __int_as_float(0x7fffffff);
            if (lane == 0) p.scores[row * p.k + rank] = sum;
            continue;
        }
        const int slot = rank + (int(block) >= p.len - p.newest), size = p.lengths ? int(p.lengths[block]) : p.block - 1;
        float q[Row::CHANNELS], x[Row::CHANNELS];
        Row::load(q, static_cast<const T *>(p.queries) + (slot * rows + row) * d, d, packs);
#pragma unroll
        for (int i = 0; i < Row::CHANNELS; i++) q[i] *= p.scale_log2;
        auto score = [&](const T *key) {
            Row::load(x, key, d, packs);
            float dot = 0;
#pragma unroll
            for (int i = 0; i < Row::CHANNELS; i++) dot = fmaf(q[i], x[i], dot);
            return eight_sum(dot);
        };
        // The landmark is the last of the place, the block's tokens are right before it.
        const int64_t place = p.frames ? int64_t(p.frames[row * p.k + rank]) : kv * p.capacity + place_of(p, block);
        const int64_t end = (place * p.block + p.block - 1) * d;
        const T *landmark = static_cast<const T *>(p.keys) + end;
        const T *keys = landmark - int64_t(size) * d, *values = static_cast<const T *>(p.values) + end - int64_t(size) * d;
        const float outer = score(landmark);

        float read[Row::CHANNELS] = {}, high = NEGATIVE_INFINITY, total = 0;
        for (int first = 0; first < size; first += ATTEND_TOKENS) {
            const int count = min(ATTEND_TOKENS, size - first), steps = (count + 3) / 4;
#pragma unroll 4
            for (int i = 0; i < steps; i++) {
                const int token = 4 * i + lane / 8;
                // A token that does not exist is the last one, and has no weight.
                const float s = score(keys + int64_t(first + min(token, count - 1)) * d);
                if (lane % 8 == 0) tokens[warp][token] = s;
            }
            __syncwarp();
            const float mine[2] = {lane < count ? tokens[warp][lane] : NEGATIVE_INFINITY, lane + 32 < count ? tokens[warp][lane + 32] : NEGATIVE_INFINITY};
            float most = fmaxf(mine[0], mine[1]);
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) most = fmaxf(most, across(most, lanes));
            most = fmaxf(high, most);
            const float fade = power2(high - finite(most)), weight[2] = {power2(mine[0] - finite(most)), power2(mine[1] - finite(most))};
            float added = weight[0] + weight[1];
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) added += across(added, lanes);
            total = total * fade + added, high = most;
            __syncwarp();
            tokens[warp][lane] = weight[0], tokens[warp][lane + 32] = weight[1];
            __syncwarp();
#pragma unroll
            for (int i = 0; i < Row::CHANNELS; i++) read[i] *= fade;
#pragma unroll 4
            for (int i = 0; i < steps; i++) {
                const int token = 4 * i + lane / 8;
                const float w = tokens[warp][token];
                Row::load(x, values + int64_t(first + min(token, count - 1)) * d, d, packs);
#pragma unroll
                for (int c = 0; c < Row::CHANNELS; c++) read[c] = fmaf(w, x[c], read[c]);
            }
            __syncwarp();
        }
        const float most = fmaxf(max, outer), fade = power2(max - finite(most)), share = power2(outer - finite(most));
#pragma unroll
        for (int i = 0; i < Row::CHANNELS; i++) out[i] = out[i] * fade + read[i] * (share / total);
        sum = sum * fade + share, max = most;
        if (lane == 0) p.scores[row * p.k + rank] = outer * 0.6931471805599453f;
    }

#pragma unroll
    for (int i = 0; i < Row::CHANNELS; i++) {
        out[i] += across(out[i], 8);
        out[i] += across(out[i], 16);
        if (lane < 8 && Row::channel(i) < d) parts[warp][Row::channel(i)] = out[i];
    }
    if (lane == 0) maxima[warp] = max, sums[warp] = sum;
    __syncthreads();
    max = maxima[0];
    for (int w = 1; w < warps; w++) max = fmaxf(max, maxima[w]);
    sum = 0;
    for (int w = 0; w < warps; w++) sum += sums[w] * power2(maxima[w] - finite(max));
    T *to = static_cast<T *>(p.out) + row * d;
    for (int c = threadIdx.x; c < d; c += blockDim.x) {
        float x = 0;
        for (int w = 0; w < warps; w++) x += parts[w][c] * power2(maxima[w] - finite(max));
        to[c] = static_cast<T>(x / sum);
    }
    if (threadIdx.x == 0) p.lse[row] = (max + log2f(sum)) * 0.6931471805599453f;
}

// Units into frames, `words` words of keys and as many of values each: a block of threads a unit.
template <typename Word> __global__ void place_kernel(const __grid_constant__ PlaceParams p, int64_t words) {
    const int64_t unit = blockIdx.x, frame = p.frames[unit];
    const Word *from = static_cast<const Word *>(p.units) + unit * 2 * words;
    Word *keys = static_cast<Word *>(p.keys) + frame * words, *values = static_cast<Word *>(p.values) + frame * words;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) keys[i] = from[i], values[i] = from[words + i];
}

// Two attentions over disjoint keys into one over both: a warp a row.
template <typename T> __global__ void join_kernel(const __grid_constant__ JoinParams p) {
    const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (row >= p.rows) return;
    const float a = p.a_lse[row], b = p.b_lse[row], max = finite(fmaxf(a, b));
    const float wa = expf(a - max), wb = expf(b - max), sum = wa + wb, inverse = sum == 0 ? 0.f : 1 / sum;
    const T *from_a = static_cast<const T *>(p.a) + row * p.head_dim, *from_b = static_cast<const T *>(p.b) + row * p.head_dim;
    T *to = static_cast<T *>(p.out) + row * p.head_dim;
    for (int c = threadIdx.x % 32; c < p.head_dim; c += 32)
        to[c] = static_cast<T>(to_float(from_a[c]) * (wa * inverse) + to_float(from_b[c]) * (wb * inverse));
    if (threadIdx.x % 32 == 0) p.lse[row] = max + logf(sum);
}
