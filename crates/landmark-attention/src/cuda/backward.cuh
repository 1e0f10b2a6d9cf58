// Backward: weights are computed again from the row's log-sum-exp. One kernel for dq (a block of threads for a tile of queries), one for
// dk and dv (a block for a unit of keys, which takes the queries in order, head by head of its group): no atomics.
//
// With weights w, W = 2^(s_landmark - lse) the share of block c and G = sum over c of w_j dP_j (dP_j is 0 where dropout dropped w_j):
//   a token of an earlier block: ds_j = w_j (dP_j - G / W);   its landmark: ds = G - W delta;   own block: ds_j = w_j (dP_j - delta).
#pragma once
#include "forward.cuh"

// Log-sum-exps in base 2 and delta = dout . out of each query, (+inf, 0) where there is no query or nothing it sees: weights of 0.
template <typename T> __global__ void rows_kernel(const __grid_constant__ Params p) {
    const int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, h = blockIdx.y, b = blockIdx.z, lane = threadIdx.x % 32;
    if (t >= p.q_pad) return;
    const int64_t head = int64_t(b) * p.heads + h;
    float lse = __builtin_huge_valf(), delta = 0;
    if (t < p.q_len) {
        const T *dout = Head<T>(p.dout, p.dout_strides, b, h, p.head_dim).row(t);
        const T *out = static_cast<const T *>(p.out) + (head * p.q_len + t) * p.head_dim;
        for (int c = lane; c < p.head_dim; c += 32) delta += to_float(dout[c]) * to_float(out[c]);
        for (int l = 16; l > 0; l /= 2) delta += across(delta, l);
        const float natural = p.lse[head * p.q_len + t];
        if (natural != NEGATIVE_INFINITY) lse = natural * 1.4426950408889634f;
    }
    if (lane == 0) reinterpret_cast<float2 *>(p.rows)[head * p.q_pad + t] = {lse, delta};
}

// Weights of a unit, normalised, and what their gradients need.
struct Weights {
    Scores x;

    __device__ void normalise(const Unit &unit, const int (&position)[2], const float (&lse)[2], const float (&shift)[2]) {
        float max[GROUPS][2], inner[GROUPS][2];
        segment_max(max, x, unit);
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) x.s[i][e] = power2(x.s[i][e] - finite(max[i][e / 2]));
        segment_sum(inner, unit, [&](int i, int e) { return x.s[i][e]; });
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool past_part = unit.long_block >= 0 && position[r] > unit.landmark;
            float factor = 0;
#pragma unroll
            for (int i = GROUPS - 1; i >= 0; i--) {
                if (unit.groups[i].flags & SEGMENT_END) {
                    if (past_part) {
                        factor = power2(finite(max[i][r]) + shift[r] - lse[r]);
                    } else if (is_past(unit.groups[i], position[r])) {
                        factor = inner[i][r] > 0 ? power2(x.landmark[i][r] - lse[r]) / inner[i][r] : 0.f;
                    } else {
                        factor = power2(max[i][r] - lse[r]);
                    }
                }
                x.s[i][2 * r] *= factor;
                x.s[i][2 * r + 1] *= factor;
            }
        }
    }

    // dP to ds. `long_d` is D of the long block that the unit is a part of.
    __device__ void gradient(float (&dp)[GROUPS][4], const Unit &unit, const int (&position)[2], const float (&lse)[2],
                             const float (&delta)[2], const float (&long_d)[2]) {
        const int t = threadIdx.x % 4;
        float g[GROUPS][2];
        segment_sum(g, unit, [&](int i, int e) { return x.s[i][e] * dp[i][e]; });
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool past_part = unit.long_block >= 0 && position[r] > unit.landmark;
            float mean = delta[r];
#pragma unroll
            for (int i = GROUPS - 1; i >= 0; i--) {
                const Group group = unit.groups[i];
                float ds_landmark = 0;
                if (group.flags & SEGMENT_END) {
                    mean = delta[r];
                    if (past_part) mean = long_d[r];
                    if (is_past(group, position[r])) {
                        const float share = power2(x.landmark[i][r] - lse[r]);
                        if (past_part) {
                            ds_landmark = share * (mean - delta[r]);
                        } else {
                            mean = share > 0 ? g[i][r] / share : 0.f;
                            ds_landmark = g[i][r] - share * delta[r];
                        }
                    }
                }
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const bool landmark = (group.flags & LANDMARK) && 2 * t + e == group.count - 1;
                    const float w = x.s[i][2 * r + e];
                    // Where nothing weighs, nothing is owed, whatever dP is.
                    dp[i][2 * r + e] = landmark ? ds_landmark : w > 0 ? w * (dp[i][2 * r + e] - mean) : 0.f;
                }
            }
        }
    }
};

template <typename T, int COLUMNS> struct QueryGradientShape {
    // f32 rows have three planes: fewer queries at once.
    static constexpr int WARPS = Element<T>::PLANES == 1 ? 4 : COLUMNS <= 128 ? 2 : 1, THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    using Queries = Tile<T, ROWS, COLUMNS>;
    using Keys = Tile<T, UNIT, COLUMNS>;
    static constexpr bool SHARED = 2 * Queries::BYTES + 2 * Keys::BYTES > 227 * 1024;
    static constexpr int BYTES = 2 * Queries::BYTES + (SHARED ? 1 : 2) * Keys::BYTES;
};

// dq, or with STATS the shift and D of the long blocks first_long.. for each query, for the kernel of dk and dv.
template <typename T, int COLUMNS, bool STATS>
__global__ void __launch_bounds__(QueryGradientShape<T, COLUMNS>::THREADS) query_gradient_kernel(const __grid_constant__ Params p, int first_long) {
    using Shape = QueryGradientShape<T, COLUMNS>;
    using Half = typename Element<T>::Half;
    constexpr int THREADS = Shape::THREADS;
    extern __shared__ __align__(128) unsigned char memory[];
    typename Shape::Queries sq{reinterpret_cast<Half *>(memory)}, sdo{sq.data + Shape::Queries::BYTES / 2};
    typename Shape::Keys sk{sdo.data + Shape::Queries::BYTES / 2}, sv{Shape::SHARED ? sk.data : sk.data + Shape::Keys::BYTES / 2};

    const int b = blockIdx.z, h = blockIdx.y, tile = gridDim.x - 1 - blockIdx.x, first = tile * Shape::ROWS;
    const int kv_head = h / (p.heads / p.kv_heads), d = p.head_dim, history = p.kv_len - p.q_len;
    const Head<T> q(p.q, p.q_strides, b, h, d), k(p.k, p.k_strides, b, kv_head, d), v(p.v, p.v_strides, b, kv_head, d);
    const Head<T> dout(p.dout, p.dout_strides, b, h, d);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = first + 16 * warp + lane / 4;
    const int position[2] = {history + row, history + row + 8};
    const float scale = p.scale * 1.4426950408889634f;
    const int64_t head = int64_t(b) * p.heads + h;
    const float2 rows[2] = {reinterpret_cast<const float2 *>(p.rows)[head * p.q_pad + row],
                            reinterpret_cast<const float2 *>(p.rows)[head * p.q_pad + row + 8]};
    const float lse[2] = {rows[0].x, rows[1].x}, delta[2] = {rows[0].y, rows[1].y};

    load_steps<THREADS>(sq, q, first, p.q_len, d);
    load_steps<THREADS>(sdo, dout, first, p.q_len, d);
    float dq[STATS ? 1 : COLUMNS / 8][4] = {}, shift[2] = {0, 0}, long_d[2] = {0, 0};
    LongBlock whole;
    const Draw draw(p, b, h);
    Walk walk(p, b, history + min(first + Shape::ROWS, p.q_len) - 1);
    for (; !walk.done(); walk.next()) {
        const Unit unit = walk.get();
        const bool gathering = walk.gathering;
        if (STATS && (!gathering || unit.long_block < first_long)) continue;
        if (STATS && unit.long_block >= first_long + LONG_BLOCKS_AT_ONCE) break;
        __syncthreads();
        load_unit<THREADS>(sk, k, walk.get(), d);
        if (!Shape::SHARED) load_unit<THREADS>(sv, v, walk.get(), d);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        Weights weights;
        product_abt(weights.x.s, sq, 16 * warp, sk, COLUMNS);
        if (Shape::SHARED) {
            __syncthreads();
            load_unit<THREADS>(sv, v, walk.get(), d);
            __syncthreads();
        }
        float dp[GROUPS][4];
        product_abt(dp, sdo, 16 * warp, sv, COLUMNS);
        if (Shape::SHARED && !gathering) {
            __syncthreads();
            load_unit<THREADS>(sk, k, walk.get(), d);
            __syncthreads();
        }
        if (draw.drops()) draw.apply(dp, unit, position);
        weights.x.mask(unit, position, scale);
        if (gathering) {
            if (walk.unit == unit.part_first) whole = LongBlock();
            whole.add<true>(weights.x, unit, dp);
            if (walk.unit == unit.part_last) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (position[r] <= unit.landmark) continue;
                    shift[r] = whole.shift(r);
                    long_d[r] = whole.dot[r] / whole.sum[r];
                    if (STATS && lane % 4 == 0) {
                        const int64_t at = head * LONG_BLOCKS_AT_ONCE + unit.long_block - first_long;
                        reinterpret_cast<float2 *>(p.stats)[at * p.q_pad + row + 8 * r] = {shift[r], long_d[r]};
                    }
                }
            }
        } else if constexpr (!STATS) {
            weights.normalise(unit, position, lse, shift);
            weights.gradient(dp, unit, position, lse, delta, long_d);
            add_product<Element<T>::PLANES>(dq, [&](auto &acc) { product_wb(acc, dp, sk); });
        }
    }
    copies_wait<0>();
    if constexpr (!STATS) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int t = row + 8 * r;
            if (t >= p.q_len) continue;
            T *to = static_cast<T *>(p.dq) + (head * p.q_len + t) * d;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
                store_pair(to, n * 8 + lane % 4 * 2, d, dq[n][2 * r] * p.scale, dq[n][2 * r + 1] * p.scale);
        }
    }
}

// Which gradients a pass of the key kernel leaves: both, unless they do not fit the registers.
enum Pass { BOTH, DV, DK };

template <typename T, int COLUMNS> struct KeyGradientShape {
    static constexpr int WARPS = 4, THREADS = 32 * WARPS;
    static constexpr int ROWS = Element<T>::PLANES == 1 ? (COLUMNS <= 128 ? 64 : 32) : COLUMNS <= 128 ? 32 : 16;
    using Queries = Tile<T, ROWS, COLUMNS>;
    using Keys = Tile<T, UNIT, COLUMNS>;
    using Square = Tile<T, ROWS, UNIT>;
    static constexpr int QUERY_BYTES = 2 * Queries::BYTES + 2 * Square::BYTES;
    static constexpr bool SHARED = QUERY_BYTES + 2 * Keys::BYTES > 227 * 1024;
    static constexpr int BYTES = QUERY_BYTES + (SHARED ? 1 : 2) * Keys::BYTES;
};

template <typename TileS> __device__ __forceinline__ void store_square(const TileS &tile, int first_row, const float (&x)[8][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t planes[TileS::PLANES];
            split<typename TileS::Half, TileS::PLANES>(x[n][2 * r], x[n][2 * r + 1], planes);
#pragma unroll
            for (int pl = 0; pl < TileS::PLANES; pl++)
                *reinterpret_cast<uint32_t *>(tile.at(pl, first_row + lane / 4 + 8 * r, n * 8 + lane % 4 * 2)) = planes[pl];
        }
}

// dk and dv of the units whose long blocks are first_long.. (the first pass also takes all other units).
template <typename T, int COLUMNS, Pass PASS> __global__ void __launch_bounds__(128) key_gradient_kernel(const __grid_constant__ Params p, int first_long) {
    using Shape = KeyGradientShape<T, COLUMNS>;
    using Half = typename Element<T>::Half;
    constexpr int THREADS = Shape::THREADS, ROWS = Shape::ROWS;
    extern __shared__ __align__(128) unsigned char memory[];
    typename Shape::Queries sq{reinterpret_cast<Half *>(memory)}, sdo{sq.data + Shape::Queries::BYTES / 2};
    typename Shape::Square sp{sdo.data + Shape::Queries::BYTES / 2}, sds{sp.data + Shape::Square::BYTES / 2};
    typename Shape::Keys sk{sds.data + Shape::Square::BYTES / 2}, sv{Shape::SHARED ? sk.data : sk.data + Shape::Keys::BYTES / 2};

    const int b = blockIdx.z, kv_head = blockIdx.y, d = p.head_dim, history = p.kv_len - p.q_len, group = p.heads / p.kv_heads;
    if (blockIdx.x >= p.first_unit[b + 1] - p.first_unit[b]) return;
    const Unit &keys = p.units[p.first_unit[b] + blockIdx.x];
    const Unit unit = keys;
    const bool part = unit.long_block >= 0;
    if (part ? unit.long_block < first_long || unit.long_block >= first_long + LONG_BLOCKS_AT_ONCE : first_long > 0) return;
    const Head<T> k(p.k, p.k_strides, b, kv_head, d), v(p.v, p.v_strides, b, kv_head, d);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float scale = p.scale * 1.4426950408889634f;
    const int first_tile = max(unit.first_key - history, 0) / ROWS, tiles = (p.q_len + ROWS - 1) / ROWS;

    if (!Shape::SHARED) {
        load_unit<THREADS>(sk, k, keys, d);
        load_unit<THREADS>(sv, v, keys, d);
    }
    float dk[PASS == DV ? 1 : COLUMNS / 8][4] = {}, dv[PASS == DK ? 1 : COLUMNS / 8][4] = {};
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++) {
        const Head<T> q(p.q, p.q_strides, b, h, d), dout(p.dout, p.dout_strides, b, h, d);
        const int64_t head = int64_t(b) * p.heads + h;
        const Draw draw(p, b, h);
        for (int tile = first_tile; tile < tiles; tile++) {
            __syncthreads();
            load_steps<THREADS>(sq, q, tile * ROWS, p.q_len, d);
            load_steps<THREADS>(sdo, dout, tile * ROWS, p.q_len, d);
            if (Shape::SHARED) load_unit<THREADS>(sk, k, keys, d);
            copies_commit();
            copies_wait<0>();
            __syncthreads();
            const bool works = ROWS == 16 * Shape::WARPS || 16 * warp < ROWS;
            Weights weights;
            float dp[GROUPS][4];
            if (works) product_abt(weights.x.s, sq, 16 * warp, sk, COLUMNS);
            if (PASS != DV && Shape::SHARED) {
                __syncthreads();
                load_unit<THREADS>(sv, v, keys, d);
                copies_commit();
                copies_wait<0>();
                __syncthreads();
            }
            if (works) {
                const int row = tile * ROWS + 16 * warp + lane / 4;
                const int position[2] = {history + row, history + row + 8};
                float lse[2], delta[2], shift[2] = {0, 0}, long_d[2] = {0, 0};
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float2 x = reinterpret_cast<const float2 *>(p.rows)[head * p.q_pad + row + 8 * r];
                    lse[r] = x.x, delta[r] = x.y;
                    if (part && position[r] > unit.landmark && row + 8 * r < p.q_len) {
                        const int64_t at = head * LONG_BLOCKS_AT_ONCE + unit.long_block - first_long;
                        const float2 y = reinterpret_cast<const float2 *>(p.stats)[at * p.q_pad + row + 8 * r];
                        shift[r] = y.x, long_d[r] = y.y;
                    }
                }
                weights.x.mask(unit, position, scale);
                weights.normalise(unit, position, lse, shift);
                if (PASS != DK && draw.drops()) {
                    Scores kept = weights.x;
                    draw.apply(kept.s, unit, position);
                    store_square(sp, 16 * warp, kept.s);
                } else if (PASS != DK) {
                    store_square(sp, 16 * warp, weights.x.s);
                }
                if (PASS != DV) {
                    product_abt(dp, sdo, 16 * warp, sv, COLUMNS);
                    if (draw.drops()) draw.apply(dp, unit, position);
                    weights.gradient(dp, unit, position, lse, delta, long_d);
                    store_square(sds, 16 * warp, dp);
                }
            }
            __syncthreads();
            if constexpr (PASS != DK) add_product<Element<T>::PLANES>(dv, [&](auto &acc) { product_atb<ROWS>(acc, sp, 16 * warp, sdo); });
            if constexpr (PASS != DV) add_product<Element<T>::PLANES>(dk, [&](auto &acc) { product_atb<ROWS>(acc, sds, 16 * warp, sq); });
        }
    }
    copies_wait<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int slot = 16 * warp + lane / 4 + 8 * r;
        const Group of = keys.groups[slot / 8];
        if (slot % 8 >= of.count) continue;
        const int64_t at = ((int64_t(b) * p.kv_heads + kv_head) * p.kv_len + of.start + slot % 8) * d;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            const int column = n * 8 + lane % 4 * 2;
            if constexpr (PASS != DK) store_pair(static_cast<T *>(p.dv) + at, column, d, dv[n][2 * r], dv[n][2 * r + 1]);
            if constexpr (PASS != DV)
                store_pair(static_cast<T *>(p.dk) + at, column, d, dk[n][2 * r] * p.scale, dk[n][2 * r + 1] * p.scale);
        }
    }
}
