// The grouped softmax of one warp: 16 queries against a unit of 64 slots, in the registers where the product left the scores.
//
// A thread holds rows g and g + 8 (g = lane / 4) and, of each group of 8 slots, the two of lane % 4; a row is spread over 4 lanes. A block
// is a run of groups, so a block's maximum or sum is a running one over groups, finished across the 4 lanes where a segment ends.
//
// For a query behind a block, the weight of the block's token j is the plain softmax weight of the score s_j + s_landmark - LSE, LSE
// being the log-sum-exp of the block's scores. All scores are in base 2.
#pragma once
#include "params.h"

constexpr float NEGATIVE_INFINITY = -__builtin_huge_valf();

__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float across(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, across(x, 1));
    return fmaxf(x, across(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += across(x, 1);
    return x + across(x, 2);
}
// 0 for the exponent of an empty set, so that 2^(-inf - x) is 0 and not NaN.
__device__ __forceinline__ float finite(float x) { return x == NEGATIVE_INFINITY ? 0.f : x; }

// Scores of a unit, scaled, -inf where the query sees nothing (landmarks too), and the landmarks' scores apart.
struct Scores {
    float s[GROUPS][4];
    float landmark[GROUPS][2];

    __device__ void mask(const Unit &unit, const int (&position)[2], float scale) {
        const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const Group group = unit.groups[i];
            const int last = group.count - 1;
            const bool closes = group.flags & LANDMARK;
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][e] *= scale;
            if (closes) {
#pragma unroll
                for (int r = 0; r < 2; r++)
                    landmark[i][r] = __shfl_sync(~0u, last & 1 ? s[i][2 * r + 1] : s[i][2 * r], (lane & ~3) | (last >> 1));
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int slot = 2 * t + (e & 1), key = group.start + slot, at = position[e / 2];
                const bool seen = slot < group.count - closes && (key < at || (key == at && !(group.hidden >> slot & 1)));
                if (!seen) s[i][e] = NEGATIVE_INFINITY;
            }
        }
    }
};

__device__ __forceinline__ bool is_past(const Group &group, int position) {
    return (group.flags & LANDMARK) && position > group.start + group.count - 1;
}

// Running totals over the groups of a segment to totals of the segment in each of its groups.
template <typename F> __device__ __forceinline__ void finish_segments(float (&x)[GROUPS][2], const Unit &unit, F finish) {
    float whole[2] = {x[GROUPS - 1][0], x[GROUPS - 1][1]};
#pragma unroll
    for (int i = GROUPS - 1; i >= 0; i--) {
        if (unit.groups[i].flags & SEGMENT_END) whole[0] = finish(x[i][0]), whole[1] = finish(x[i][1]);
        x[i][0] = whole[0], x[i][1] = whole[1];
    }
}

// Per segment, in each of its groups: the maximum.
__device__ __forceinline__ void segment_max(float (&m)[GROUPS][2], const Scores &x, const Unit &unit) {
    float running[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++)
            m[i][r] = running[r] = fmaxf(running[r], fmaxf(x.s[i][2 * r], x.s[i][2 * r + 1]));
        if (unit.groups[i].flags & SEGMENT_END) running[0] = running[1] = NEGATIVE_INFINITY;
    }
    finish_segments(m, unit, quad_max);
}

// Per segment, in each of its groups: the sum of x, or of x times y.
template <typename F> __device__ __forceinline__ void segment_sum(float (&sum)[GROUPS][2], const Unit &unit, F term) {
    float running[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) sum[i][r] = running[r] += term(i, 2 * r) + term(i, 2 * r + 1);
        if (unit.groups[i].flags & SEGMENT_END) running[0] = running[1] = 0;
    }
    finish_segments(sum, unit, quad_sum);
}

// The inner softmax of a long block, gathered unit by unit, and (backward) the sum of weights times dP.
struct LongBlock {
    float max[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0, 0}, dot[2] = {0, 0};
    float landmark[2];

    template <bool DOT> __device__ void add(const Scores &x, const Unit &unit, const float (*dp)[4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = NEGATIVE_INFINITY, l = 0, d = 0;
#pragma unroll
            for (int i = 0; i < GROUPS; i++) m = fmaxf(m, fmaxf(x.s[i][2 * r], x.s[i][2 * r + 1]));
            m = fmaxf(max[r], quad_max(m));
            const float base = finite(m), fade = power2(max[r] - base);
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    const float w = power2(x.s[i][e] - base);
                    l += w;
                    if (DOT) d += w * dp[i][e];
                }
            sum[r] = sum[r] * fade + quad_sum(l);
            if (DOT) dot[r] = dot[r] * fade + quad_sum(d);
            max[r] = m;
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                if (unit.groups[i].flags & LANDMARK) landmark[r] = x.landmark[i][r];
        }
    }
    // s_landmark - LSE: what a token's score is shifted by.
    __device__ float shift(int r) const { return landmark[r] - max[r] - log2f(sum[r]); }
};
