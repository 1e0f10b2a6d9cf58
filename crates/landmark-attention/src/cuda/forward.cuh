// Forward: one block of threads for a tile of queries, 16 queries a warp, over the units of keys in order (flash attention).
#pragma once
#include "dropout.cuh"
#include "load.cuh"
#include "segments.cuh"

// Which unit comes next. A long block is read twice by the queries behind it: for its log-sum-exp, and for its values.
struct Walk {
    const Unit *units;
    int count, last_position, unit = 0;
    bool gathering = false;

    __device__ Walk(const Params &p, int b, int last_position)
        : units(p.units + p.first_unit[b]), count(p.first_unit[b + 1] - p.first_unit[b]), last_position(last_position) {
        enter();
    }
    // Units first..end of the row alone.
    __device__ Walk(const Params &p, int b, int last_position, int first, int end)
        : units(p.units + p.first_unit[b]), count(end), last_position(last_position), unit(first) {
        enter();
    }
    __device__ bool done() const { return unit >= count || units[unit].first_key > last_position; }
    __device__ const Unit &get() const { return units[unit]; }
    __device__ void next() {
        if (gathering && unit < units[unit].part_last) {
            unit++;
        } else if (gathering) {
            unit = units[unit].part_first, gathering = false;
        } else {
            unit++, enter();
        }
    }

  private:
    __device__ void enter() {
        if (unit < count) {
            const Unit &u = units[unit];
            gathering = u.long_block >= 0 && u.part_first == unit && last_position > u.landmark;
        }
    }
};

template <typename T, int COLUMNS> struct ForwardShape {
    static constexpr int WARPS = Element<T>::PLANES == 3 && COLUMNS > 128 ? 2 : 4, THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    using Queries = Tile<T, ROWS, COLUMNS>;
    using Keys = Tile<T, UNIT, COLUMNS>;
    // f32 with wide heads: keys and values take turns in one buffer.
    static constexpr bool SHARED = Queries::BYTES + 2 * Keys::BYTES > 227 * 1024;
    static constexpr int BYTES = Queries::BYTES + (SHARED ? 1 : 2) * Keys::BYTES;
};

// Weights of a unit relative to the running maximum `m`, which it raises; `fade` is what earlier weights are multiplied by.
__device__ __forceinline__ void absorb(Scores &x, const Unit &unit, const int (&position)[2], const float (&shift)[2], float (&m)[2],
                                       float (&sum)[2], float (&fade)[2]) {
    float max[GROUPS][2], inner[GROUPS][2];
    const bool part = unit.long_block >= 0;
    segment_max(max, x, unit);
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) x.s[i][e] = power2(x.s[i][e] - finite(max[i][e / 2]));
    segment_sum(inner, unit, [&](int i, int e) { return x.s[i][e]; });
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool past_part = part && position[r] > unit.landmark;
        float high = m[r];
#pragma unroll
        for (int i = 0; i < GROUPS; i++)
            if ((unit.groups[i].flags & SEGMENT_END) && !past_part)
                high = fmaxf(high, is_past(unit.groups[i], position[r]) ? x.landmark[i][r] : max[i][r]);
        const float base = finite(high);
        fade[r] = power2(m[r] - base);
        m[r] = high;
        float total = sum[r] * fade[r], factor = 0;
#pragma unroll
        for (int i = GROUPS - 1; i >= 0; i--) {
            if (unit.groups[i].flags & SEGMENT_END) {
                if (past_part) {
                    factor = power2(finite(max[i][r]) + shift[r] - base);
                } else if (is_past(unit.groups[i], position[r])) {
                    const float share = power2(x.landmark[i][r] - base);
                    factor = inner[i][r] > 0 ? share / inner[i][r] : 0.f;
                    total += share;
                } else {
                    factor = power2(max[i][r] - base);
                    total += factor * inner[i][r];
                }
            }
            x.s[i][2 * r] *= factor;
            x.s[i][2 * r + 1] *= factor;
        }
        sum[r] = total;
    }
}

template <typename T, int COLUMNS> __global__ void __launch_bounds__(ForwardShape<T, COLUMNS>::THREADS) forward_kernel(const __grid_constant__ Params p, const __grid_constant__ Splits splits) {
    using Shape = ForwardShape<T, COLUMNS>;
    constexpr int THREADS = Shape::THREADS;
    extern __shared__ __align__(128) unsigned char memory[];
    typename Shape::Queries sq{reinterpret_cast<typename Shape::Queries::Half *>(memory)};
    typename Shape::Keys sk{reinterpret_cast<typename Shape::Keys::Half *>(memory + Shape::Queries::BYTES)};
    typename Shape::Keys sv{Shape::SHARED ? sk.data : sk.data + Shape::Keys::BYTES / 2};

    const int runs = max(splits.count, 1), run = blockIdx.x % runs;
    const int b = blockIdx.z, h = blockIdx.y, tile = (gridDim.x - 1 - blockIdx.x) / runs, first = tile * Shape::ROWS;
    const int kv_head = h / (p.heads / p.kv_heads), d = p.head_dim, history = p.kv_len - p.q_len;
    const Head<T> q(p.q, p.q_strides, b, h, d), k(p.k, p.k_strides, b, kv_head, d), v(p.v, p.v_strides, b, kv_head, d);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = first + 16 * warp + lane / 4;
    const int position[2] = {history + row, history + row + 8};
    const float scale = p.scale * 1.4426950408889634f;

    const int last_position = history + min(first + Shape::ROWS, p.q_len) - 1;
    const int32_t *borders = splits.first + b * (runs + 1) + run;
    Walk walk = splits.count > 0 ? Walk(p, b, last_position, borders[0], borders[1]) : Walk(p, b, last_position);
    load_steps<THREADS>(sq, q, first, p.q_len, d);
    if (!walk.done()) load_unit<THREADS>(sk, k, walk.get(), d);
    copies_commit();
    if (!Shape::SHARED && !walk.done()) load_unit<THREADS>(sv, v, walk.get(), d);
    copies_commit();

    float out[COLUMNS / 8][4] = {}, m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0, 0}, shift[2] = {0, 0};
    LongBlock whole;
    const Draw draw(p, b, h);
    while (!walk.done()) {
        const Unit unit = walk.get();
        const bool gathering = walk.gathering;
        Walk ahead = walk;
        ahead.next();
        copies_wait<1>();
        __syncthreads();
        Scores x;
        product_abt(x.s, sq, 16 * warp, sk, COLUMNS);
        __syncthreads();
        if (Shape::SHARED) load_unit<THREADS>(sv, v, walk.get(), d);
        else if (!ahead.done()) load_unit<THREADS>(sk, k, ahead.get(), d);
        copies_commit();
        x.mask(unit, position, scale);
        float fade[2] = {1, 1};
        if (gathering) {
            if (walk.unit == unit.part_first) whole = LongBlock();
            whole.add<false>(x, unit, nullptr);
            if (walk.unit == unit.part_last) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (position[r] <= unit.landmark) continue;
                    const float high = fmaxf(m[r], whole.landmark[r]), base = finite(high);
                    fade[r] = power2(m[r] - base);
                    sum[r] = sum[r] * fade[r] + power2(whole.landmark[r] - base);
                    m[r] = high;
                    shift[r] = whole.shift(r);
                }
            }
        } else {
            absorb(x, unit, position, shift, m, sum, fade);
            if (draw.drops()) draw.apply(x.s, unit, position);
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[n][e] *= fade[e / 2];
        copies_wait<Shape::SHARED ? 0 : 1>();
        __syncthreads();
        if (!gathering) add_product<Element<T>::PLANES>(out, [&](auto &acc) { product_wb(acc, x.s, sv); });
        __syncthreads();
        if (!ahead.done()) {
            if (Shape::SHARED) load_unit<THREADS>(sk, k, ahead.get(), d);
            else load_unit<THREADS>(sv, v, ahead.get(), d);
        }
        copies_commit();
        if (Shape::SHARED) copies_commit();
        walk = ahead;
    }
    copies_wait<0>();

    // A query without a candidate (a landmark that opens the text) gets zeros.
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int t = row + 8 * r;
        if (t >= p.q_len) continue;
        const int64_t at = (int64_t(b) * p.heads + h) * p.q_len + t;
        const float inverse = sum[r] > 0 ? 1 / sum[r] : 0;
        if (splits.count > 0) {
            const int64_t part = run * (int64_t(p.batch) * p.heads * p.q_len) + at;
            float *to = splits.out + part * d;
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
                store_pair(to, n * 8 + lane % 4 * 2, d, out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
            if (lane % 4 == 0) splits.lse[part] = m[r] + log2f(sum[r]);
            continue;
        }
        T *to = static_cast<T *>(p.out) + at * d;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++)
            store_pair(to, n * 8 + lane % 4 * 2, d, out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
        if (lane % 4 == 0) p.lse[at] = (m[r] + log2f(sum[r])) * 0.6931471805599453f;
    }
}

// The runs' outputs into one, in their order: a warp a query.
template <typename T> __global__ void combine_kernel(const __grid_constant__ Params p, const __grid_constant__ Splits splits) {
    const int64_t rows = int64_t(p.batch) * p.heads * p.q_len, row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    const int lane = threadIdx.x % 32;
    float max = NEGATIVE_INFINITY, sum = 0;
    for (int i = 0; i < splits.count; i++) max = fmaxf(max, splits.lse[i * rows + row]);
    const float base = finite(max);
    for (int i = 0; i < splits.count; i++) sum += power2(splits.lse[i * rows + row] - base);
    const float inverse = sum > 0 ? 1 / sum : 0;
    T *to = static_cast<T *>(p.out) + row * p.head_dim;
    for (int c = lane; c < p.head_dim; c += 32) {
        float x = 0;
        for (int i = 0; i < splits.count; i++) x += splits.out[(i * rows + row) * p.head_dim + c] * power2(splits.lse[i * rows + row] - base);
        to[c] = static_cast<T>(x * inverse);
    }
    if (lane == 0) p.lse[row] = (max + log2f(sum)) * 0.6931471805599453f;
}
