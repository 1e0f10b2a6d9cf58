// Normalisation of rows. A row is a warp's. Rows of up to 1024 columns, in a multiple of 4, are in registers from the first look at them to
// the last; others are read again from the cache. Every sum is in an order that the shapes alone fix.

#include <type_traits>

#include "common.cuh"

namespace {

// Elements of a row that a lane takes at once: column = lane * V + i * 32 * V.
constexpr int V = 4;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// Where the rows of x are: row ((b heads) + h) time + t.
struct Rows {
    int64_t batch, head, step; // strides
    int heads, time, rows, width;

    __device__ int64_t at(int row) const {
        const int t = row % time, bh = row / time;
        return bh / heads * batch + bh % heads * head + t * step;
    }
};

// f(column, V elements' worth of columns) over the columns of a lane. Widths that V does not divide are taken one by one.
#define FOR_COLUMNS(c, width) for (int c = (threadIdx.x % WARP) * V; c < (width); c += WARP * V)

template <typename T> struct Row {
    const T *x;
    int width;
    bool whole; // V divides the width

    __device__ void at(int c, float (&to)[V]) const {
        if (whole) return load<V>(to, x + c);
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = c + i < width ? to_float(x[c + i]) : 0.f;
    }
};

template <typename T> __device__ void put(T *y, int width, bool whole, int c, const float (&from)[V]) {
    if (whole) return store<V>(y + c, from);
#pragma unroll
    for (int i = 0; i < V; i++)
        if (c + i < width) from_float(y[c + i], from[i]);
}

// stats: mean and 1 / sqrt(variance + eps) of each row.
template <typename X, typename Y>
__global__ void norm_forward(const X *x, Rows r, const float *w, const float *b, Y *y, float2 *stats, bool centred, float eps) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP, width = r.width;
    if (row >= r.rows) return;
    const bool whole = width % V == 0;
    const Row<X> in{x + r.at(row), width, whole};
    float v[V], scale[V], shift[V], mean = 0.f;
    if (centred) {
        FOR_COLUMNS(c, width) {
            in.at(c, v);
            mean += (v[0] + v[1]) + (v[2] + v[3]);
        }
        mean = warp_sum(mean) / width;
    }
    float squares = 0.f;
    FOR_COLUMNS(c, width) {
        in.at(c, v);
#pragma unroll
        for (int i = 0; i < V; i++) squares += c + i < width ? (v[i] - mean) * (v[i] - mean) : 0.f;
    }
    const float rstd = rsqrtf(warp_sum(squares) / width + eps);
    if (threadIdx.x % WARP == 0) stats[row] = make_float2(mean, rstd);
    const Row<float> weight{w, width, whole}, bias{b, width, whole};
    FOR_COLUMNS(c, width) {
        in.at(c, v);
        weight.at(c, scale);
        if (b) bias.at(c, shift);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = (v[i] - mean) * rstd * scale[i] + (b ? shift[i] : 0.f);
        put(y + (int64_t)row * width, width, whole, c, v);
    }
}

// The same for up to PACKS * 128 columns.
template <int PACKS, typename X, typename Y>
__global__ void __launch_bounds__(THREADS)
    norm_forward_kept(const X *x, Rows r, const float *w, const float *b, Y *y, float2 *stats, bool centred, float eps) {
    const int row = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, width = r.width;
    if (row >= r.rows) return;
    x += r.at(row);
    y += (int64_t)row * width;
    float v[PACKS][V], mean = 0.f, squares = 0.f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int c = (p * WARP + lane) * V;
#pragma unroll
        for (int i = 0; i < V; i++) v[p][i] = 0.f;
        if (c < width) load<V>(v[p], x + c);
    }
    if (centred) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) mean += (v[p][0] + v[p][1]) + (v[p][2] + v[p][3]);
        mean = warp_sum(mean) / width;
    }
#pragma unroll
    for (int p = 0; p < PACKS; p++)
#pragma unroll
        for (int i = 0; i < V; i++) squares += (p * WARP + lane) * V < width ? (v[p][i] - mean) * (v[p][i] - mean) : 0.f;
    const float rstd = rsqrtf(warp_sum(squares) / width + eps);
    if (lane == 0) stats[row] = make_float2(mean, rstd);
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int c = (p * WARP + lane) * V;
        if (c >= width) break;
        float scale[V], shift[V] = {};
        load<V>(scale, w + c);
        if (b) load<V>(shift, b + c);
#pragma unroll
        for (int i = 0; i < V; i++) v[p][i] = (v[p][i] - mean) * rstd * scale[i] + shift[i];
        store<V>(y + c, v[p]);
    }
}

// What the backward reads and writes. dx = rstd (g - mean(g) - xhat mean(g xhat)) for xhat = (x - mean) rstd and g = dy w, without mean(g) if not
// centred, plus `added` if there is any; the same in bf16 to `rounded`, if asked for. The parts of dw = sum of dy xhat and db = sum of
// dy of a block of threads go to partial [gridDim.x][1 or 2][width].
template <typename X, typename Y> struct Backward {
    const Y *dy;
    const X *x;
    const float *w;
    const float2 *stats;
    const X *added;
    X *dx;
    __nv_bfloat16 *rounded;
    float *partial;
    Rows r;
    bool centred, biased;
};

// The parts of a block's warps [WARPS][kept] in shared memory to its part of the whole.
__device__ void sum_warps(const float *shared, float *partial, int warps, int kept) {
    __syncthreads();
    for (int i = threadIdx.x; i < kept; i += blockDim.x) {
        float sum = 0.f;
        for (int w = 0; w < warps; w++) sum += shared[w * kept + i];
        partial[(int64_t)blockIdx.x * kept + i] = sum;
    }
}

// Each warp keeps its part of dw and db in shared memory, where its lanes have columns of their own.
template <typename X, typename Y> __global__ void norm_backward(const __grid_constant__ Backward<X, Y> a) {
    extern __shared__ __align__(16) float shared[];
    const int width = a.r.width, warps = blockDim.x / WARP, warp = threadIdx.x / WARP, kept = (a.biased ? 2 : 1) * width;
    const bool whole = width % V == 0;
    float *dw = shared + warp * kept, *db = dw + width;
    for (int i = threadIdx.x; i < warps * kept; i += blockDim.x) shared[i] = 0.f;
    __syncthreads();
    const Row<float> weight{a.w, width, whole};
    for (int row = blockIdx.x * warps + warp; row < a.r.rows; row += gridDim.x * warps) {
        const int64_t at = (int64_t)row * width;
        const Row<X> in{a.x + a.r.at(row), width, whole};
        const Row<Y> grad{a.dy + at, width, whole};
        const float mean = a.stats[row].x, rstd = a.stats[row].y;
        float v[V], g[V], s[V], sum_g = 0.f, sum_gx = 0.f;
        FOR_COLUMNS(c, width) {
            in.at(c, v), grad.at(c, g), weight.at(c, s);
#pragma unroll
            for (int i = 0; i < V; i++) {
                if (c + i >= width) break;
                const float xhat = (v[i] - mean) * rstd;
                dw[c + i] += g[i] * xhat;
                if (a.biased) db[c + i] += g[i];
                sum_g += g[i] * s[i];
                sum_gx += g[i] * s[i] * xhat;
            }
        }
        const float mean_g = a.centred ? warp_sum(sum_g) / width : 0.f, mean_gx = warp_sum(sum_gx) / width;
        FOR_COLUMNS(c, width) {
            in.at(c, v), grad.at(c, g), weight.at(c, s);
#pragma unroll
            for (int i = 0; i < V; i++) v[i] = rstd * (g[i] * s[i] - mean_g - (v[i] - mean) * rstd * mean_gx);
            if (a.added) {
                Row<X>{a.added + at, width, whole}.at(c, g);
#pragma unroll
                for (int i = 0; i < V; i++) v[i] += g[i];
            }
            put(a.dx + at, width, whole, c, v);
            if (a.rounded) put(a.rounded + at, width, whole, c, v);
        }
    }
    sum_warps(shared, a.partial, warps, kept);
}

// The same for up to PACKS * 128 columns: x, dy and the parts of dw and db in registers.
template <int PACKS, bool BIASED, typename X, typename Y>
__global__ void __launch_bounds__(THREADS, BIASED ? 1 : 2) norm_backward_kept(const __grid_constant__ Backward<X, Y> a) {
    extern __shared__ __align__(16) float shared[];
    const int width = a.r.width, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float dw[PACKS][V] = {}, db[BIASED ? PACKS : 1][V] = {};
    for (int row = blockIdx.x * WARPS + warp; row < a.r.rows; row += gridDim.x * WARPS) {
        const int64_t at = (int64_t)row * width;
        const X *x = a.x + a.r.at(row);
        const float2 stats = a.stats[row];
        float v[PACKS][V];
        Pack<Y, V> dy[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * WARP + lane) * V;
            if (c < width) load<V>(v[p], x + c), dy[p] = *reinterpret_cast<const Pack<Y, V> *>(a.dy + at + c);
        }
        float sum_g = 0.f, sum_gx = 0.f;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * WARP + lane) * V;
            if (c >= width) break;
            float s[V];
            load<V>(s, a.w + c);
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float g = to_float(dy[p].x[i]);
                v[p][i] = (v[p][i] - stats.x) * stats.y;
                dw[p][i] += g * v[p][i];
                if (BIASED) db[p][i] += g;
                sum_g += g * s[i];
                sum_gx += g * s[i] * v[p][i];
            }
        }
        const float mean_g = a.centred ? warp_sum(sum_g) / width : 0.f, mean_gx = warp_sum(sum_gx) / width;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * WARP + lane) * V;
            if (c >= width) break;
            float s[V], added[V] = {};
            load<V>(s, a.w + c);
            if (a.added) load<V>(added, a.added + at + c);
#pragma unroll
            for (int i = 0; i < V; i++)
                added[i] += stats.y * (to_float(dy[p].x[i]) * s[i] - mean_g - v[p][i] * mean_gx);
            store<V>(a.dx + at + c, added);
            if (a.rounded) store<V>(a.rounded + at + c, added);
        }
    }
    const int kept = (BIASED ? 2 : 1) * width;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int c = (p * WARP + lane) * V;
        if (c >= width) break;
        store<V>(shared + warp * kept + c, dw[p]);
        if (BIASED) store<V>(shared + warp * kept + width + c, db[p]);
    }
    sum_warps(shared, a.partial, WARPS, kept);
}

// out[c] = sum over parts of partial[part][c]: 32 threads a column, each a run of the parts in order.
__global__ void __launch_bounds__(WARP * WARP) sum_parts(const float *partial, float *out, int parts, int width) {
    __shared__ float sums[WARP][WARP];
    const int c = blockIdx.x * WARP + threadIdx.x, run = (parts + WARP - 1) / WARP;
    float sum = 0.f;
    if (c < width)
        for (int p = threadIdx.y * run; p < min(parts, (int)(threadIdx.y + 1) * run); p++) sum += partial[(int64_t)p * width + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < width) {
        sum = 0.f;
        for (int s = 0; s < WARP; s++) sum += sums[s][threadIdx.x];
        out[c] = sum;
    }
}

// f(integral constant) for the packs of a lane that hold a row of this width, or 0 for a row that is not kept.
template <typename F> cudaError_t with_packs(int width, F f) {
    if (width % V != 0 || width > 8 * WARP * V) return f(std::integral_constant<int, 0>{});
    switch ((width + WARP * V - 1) / (WARP * V)) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5:
        case 6: return f(std::integral_constant<int, 6>{});
        default: return f(std::integral_constant<int, 8>{});
    }
}

template <typename X, typename Y>
cudaError_t launch_forward(const void *x, const Rows &r, const float *w, const float *b, void *y, float *stats, bool centred, float eps,
                           cudaStream_t stream) {
    return with_packs(r.width, [&](auto packs) {
        constexpr int PACKS = decltype(packs)::value;
        const int blocks = blocks_for(r.rows, WARPS);
        if constexpr (PACKS == 0)
            norm_forward<<<blocks, THREADS, 0, stream>>>((const X *)x, r, w, b, (Y *)y, (float2 *)stats, centred, eps);
        else
            norm_forward_kept<PACKS><<<blocks, THREADS, 0, stream>>>((const X *)x, r, w, b, (Y *)y, (float2 *)stats, centred, eps);
        return cudaGetLastError();
    });
}

// Of threads enough for a warp's parts to fit shared memory.
template <typename K, typename A> cudaError_t launch_shared(K kernel, const A &a, int parts, int warps, int bytes, cudaStream_t stream) {
    if (bytes > 48 * 1024) {
        const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<parts, warps * WARP, bytes, stream>>>(a);
    return cudaGetLastError();
}

template <typename X, typename Y> cudaError_t launch_backward(const Backward<X, Y> &a, float *sums, int parts, cudaStream_t stream) {
    const int kept = (a.biased ? 2 : 1) * a.r.width, bytes = kept * (int)sizeof(float);
    const cudaError_t error = with_packs(a.r.width, [&](auto packs) {
        constexpr int PACKS = decltype(packs)::value;
        if constexpr (PACKS == 0) {
            int warps = WARPS;
            while (warps > 1 && warps * bytes > 48 * 1024) warps /= 2;
            return launch_shared(norm_backward<X, Y>, a, parts, warps, warps * bytes, stream);
        } else if (a.biased) {
            return launch_shared(norm_backward_kept<PACKS, true, X, Y>, a, parts, WARPS, WARPS * bytes, stream);
        } else {
            return launch_shared(norm_backward_kept<PACKS, false, X, Y>, a, parts, WARPS, WARPS * bytes, stream);
        }
    });
    if (error != cudaSuccess) return error;
    sum_parts<<<blocks_for(kept, WARP), dim3(WARP, WARP), 0, stream>>>(a.partial, sums, parts, kept);
    return cudaGetLastError();
}

} // namespace

extern "C" {

// x [rows, width] of x_type, contiguous or by strides as [batch, heads, time, width]; y of y_type, which is x's or bf16, contiguous. stats: 2
// floats a row.
int landmark_norm_forward(const void *x, int x_type, const int64_t *strides, int heads, int time, const float *w, const float *b, void *y,
                          int y_type, float *stats, int rows, int width, int centred, float eps, cudaStream_t stream) {
    const Rows r{strides[0], strides[1], strides[2], heads, time, rows, width};
    if (x_type == F32 && y_type == F32) return launch_forward<float, float>(x, r, w, b, y, stats, centred, eps, stream);
    if (x_type == F32) return launch_forward<float, __nv_bfloat16>(x, r, w, b, y, stats, centred, eps, stream);
    return launch_forward<__nv_bfloat16, __nv_bfloat16>(x, r, w, b, y, stats, centred, eps, stream);
}

// sums: dw, then db if biased. partial: parts times that. dx, added and rounded (or null): contiguous.
int landmark_norm_backward(const void *dy, int y_type, const void *x, int x_type, const int64_t *strides, int heads, int time, const float *w,
                           const float *stats, const void *added, void *dx, void *rounded, float *partial, float *sums, int parts, int rows,
                           int width, int centred, int biased, cudaStream_t stream) {
    const Rows r{strides[0], strides[1], strides[2], heads, time, rows, width};
    const auto launch = [&](auto x_of, auto y_of) {
        using X = decltype(x_of);
        using Y = decltype(y_of);
        return launch_backward(Backward<X, Y>{(const Y *)dy, (const X *)x, w, (const float2 *)stats, (const X *)added, (X *)dx,
                                              (__nv_bfloat16 *)rounded, partial, r, centred != 0, biased != 0},
                               sums, parts, stream);
    };
    if (x_type == F32 && y_type == F32) return launch(float{}, float{});
    if (x_type == F32) return launch(float{}, __nv_bfloat16{});
    return launch(__nv_bfloat16{}, __nv_bfloat16{});
}
}
