// The layers but for their matrix products: normalisation, heads, activations, embedding. Every sum is in an order that the shapes
// alone fix. Legend: B batch, T time, H heads, D head_dim; N = B T.

#include "common.cuh"

namespace {

// ---- normalisation ----------------------------------------------------------------------------------------------------------

// Elements of a row that a lane takes at once: column = lane * V + i * 32 * V.
constexpr int V = 4;

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

// A warp per row. stats: mean and 1 / sqrt(variance + eps) of each row.
template <typename X, typename Y>
__global__ void norm_forward(const X *x, const float *w, const float *b, Y *y, float2 *stats, int rows, int width, bool centred,
                             float eps) {
    const int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    const bool whole = width % V == 0;
    const Row<X> in{x + (int64_t)row * width, width, whole};
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

// With xhat = (x - mean) rstd and g = dy w: dx = rstd (g - mean(g) - xhat mean(g xhat)), without mean(g) if not centred, plus `added` if there is any. Each warp keeps
// its part of dw = sum of dy xhat and db = sum of dy in shared memory, where its lanes have columns of their own; a block's parts
// go to partial [gridDim.x][1 or 2][width].
template <typename X, typename Y>
__global__ void norm_backward(const Y *dy, const X *x, const float *w, const float2 *stats, const X *added, X *dx, float *partial, int rows,
                              int width, bool centred, bool biased) {
    extern __shared__ float shared[];
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, kept = (biased ? 2 : 1) * width;
    const bool whole = width % V == 0;
    float *dw = shared + warp * kept, *db = dw + width;
    for (int i = threadIdx.x; i < warps * kept; i += blockDim.x) shared[i] = 0.f;
    __syncthreads();
    const Row<float> weight{w, width, whole};
    for (int row = blockIdx.x * warps + warp; row < rows; row += gridDim.x * warps) {
        const Row<X> in{x + (int64_t)row * width, width, whole};
        const Row<Y> grad{dy + (int64_t)row * width, width, whole};
        const float mean = stats[row].x, rstd = stats[row].y;
        float v[V], g[V], s[V], sum_g = 0.f, sum_gx = 0.f;
        FOR_COLUMNS(c, width) {
            in.at(c, v), grad.at(c, g), weight.at(c, s);
#pragma unroll
            for (int i = 0; i < V; i++) {
                if (c + i >= width) break;
                const float xhat = (v[i] - mean) * rstd;
                dw[c + i] += g[i] * xhat;
                if (biased) db[c + i] += g[i];
                sum_g += g[i] * s[i];
                sum_gx += g[i] * s[i] * xhat;
            }
        }
        const float mean_g = centred ? warp_sum(sum_g) / width : 0.f, mean_gx = warp_sum(sum_gx) / width;
        FOR_COLUMNS(c, width) {
            in.at(c, v), grad.at(c, g), weight.at(c, s);
#pragma unroll
            for (int i = 0; i < V; i++) v[i] = rstd * (g[i] * s[i] - mean_g - (v[i] - mean) * rstd * mean_gx);
            if (added) {
                Row<X>{added + (int64_t)row * width, width, whole}.at(c, g);
#pragma unroll
                for (int i = 0; i < V; i++) v[i] += g[i];
            }
            put(dx + (int64_t)row * width, width, whole, c, v);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kept; i += blockDim.x) {
        float sum = 0.f;
        for (int w = 0; w < warps; w++) sum += shared[w * kept + i];
        partial[(int64_t)blockIdx.x * kept + i] = sum;
    }
}

// out[c] = sum over parts of partial[part][c]: 8 threads a column, each a run of the parts in order.
__global__ void sum_parts(const float *partial, float *out, int parts, int width) {
    constexpr int SPLIT = 8;
    __shared__ float sums[SPLIT][WARP];
    const int c = blockIdx.x * WARP + threadIdx.x, run = (parts + SPLIT - 1) / SPLIT;
    float sum = 0.f;
    if (c < width)
        for (int p = threadIdx.y * run; p < min(parts, (int)(threadIdx.y + 1) * run); p++) sum += partial[(int64_t)p * width + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < width) {
        sum = 0.f;
        for (int s = 0; s < SPLIT; s++) sum += sums[s][threadIdx.x];
        out[c] = sum;
    }
}

// ---- heads ------------------------------------------------------------------------------------------------------------------

struct Heads {
    int64_t batch, heads, time, dim; // dim in elements of W, of which a head's row has this many
};

// [N, parts, H, D] to parts x [B, H, T, D].
template <typename W> __global__ void split_heads(const W *x, W *part0, W *part1, W *part2, int parts, Heads s) {
    const int64_t of_part = s.batch * s.heads * s.time * s.dim, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= parts * of_part) return;
    const int64_t part = i / of_part, j = i % of_part;
    const int64_t c = j % s.dim, t = j / s.dim % s.time, h = j / (s.dim * s.time) % s.heads, b = j / (s.dim * s.time * s.heads);
    W *out = part == 0 ? part0 : part == 1 ? part1 : part2;
    out[j] = x[(((b * s.time + t) * parts + part) * s.heads + h) * s.dim + c];
}

// Parts [B, H, T, D], zero where there is none, to [N, parts, H, D].
template <typename W> __global__ void merge_heads(const W *part0, const W *part1, const W *part2, W *y, int parts, Heads s) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= parts * s.batch * s.heads * s.time * s.dim) return;
    const int64_t c = i % s.dim, h = i / s.dim % s.heads, part = i / (s.dim * s.heads) % parts, n = i / (s.dim * s.heads * parts);
    const int64_t b = n / s.time, t = n % s.time;
    const W *in = part == 0 ? part0 : part == 1 ? part1 : part2;
    y[i] = in ? in[((b * s.heads + h) * s.time + t) * s.dim + c] : W{};
}

// ---- activations ------------------------------------------------------------------------------------------------------------

constexpr int A = 4;

__device__ __forceinline__ float cdf(float x) { return 0.5f * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

template <typename T> __global__ void gelu_forward(const T *x, T *y, int64_t packs) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    float v[A];
    load<A>(v, x + i * A);
#pragma unroll
    for (int j = 0; j < A; j++) v[j] *= cdf(v[j]);
    store<A>(y + i * A, v);
}

template <typename T> __global__ void gelu_backward(const T *x, const T *dy, T *dx, int64_t packs) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    float v[A], g[A];
    load<A>(v, x + i * A), load<A>(g, dy + i * A);
#pragma unroll
    for (int j = 0; j < A; j++) g[j] *= cdf(v[j]) + v[j] * 0.39894228040143268f * __expf(-0.5f * v[j] * v[j]);
    store<A>(dx + i * A, g);
}

// x [N, 2 width]: gate, then up.
// Gate and up are two matrices whose rows begin `stride` apart: their own, or the halves of one.
template <typename T>
__global__ void swiglu_forward(const T *gates, const T *ups, T *y, int64_t packs, int width, int64_t stride) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const int64_t row = i * A / width, at = row * stride + i * A % width;
    float gate[A], up[A];
    load<A>(gate, gates + at), load<A>(up, ups + at);
#pragma unroll
    for (int j = 0; j < A; j++) up[j] *= gate[j] * sigmoid(gate[j]);
    store<A>(y + i * A, up);
}

template <typename T>
__global__ void swiglu_backward(const T *gates, const T *ups, const T *dy, T *d_gates, T *d_ups, int64_t packs, int width, int64_t stride) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    const int64_t row = i * A / width, at = row * stride + i * A % width;
    float gate[A], up[A], g[A], d_gate[A];
    load<A>(gate, gates + at), load<A>(up, ups + at), load<A>(g, dy + i * A);
#pragma unroll
    for (int j = 0; j < A; j++) {
        const float s = sigmoid(gate[j]);
        d_gate[j] = g[j] * up[j] * s * (1.f + gate[j] * (1.f - s));
        up[j] = g[j] * gate[j] * s;
    }
    store<A>(d_gates + at, d_gate), store<A>(d_ups + at, up);
}

// ---- embedding --------------------------------------------------------------------------------------------------------------

__global__ void gather_rows(const float *w, const uint32_t *ids, float *y, int width) {
    const float *from = w + (int64_t)ids[blockIdx.x] * width;
    float *to = y + (int64_t)blockIdx.x * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x) to[c] = from[c];
}

// Places sorted by token are cut into pieces of one token each; pieces [first, end, ...]: the sum of the rows of dy in a piece.
__global__ void sum_pieces(const float *dy, const uint32_t *places, const uint32_t *starts, float *sums, int width) {
    const uint32_t from = starts[blockIdx.x], to = starts[blockIdx.x + 1];
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0.f;
        for (uint32_t p = from; p < to; p++) sum += dy[(int64_t)places[p] * width + c];
        sums[(int64_t)blockIdx.x * width + c] = sum;
    }
}

// dw[id] = sum over the pieces of a token, which are side by side.
__global__ void scatter_pieces(const float *sums, const uint32_t *ids, const uint32_t *starts, float *dw, int width) {
    const uint32_t from = starts[blockIdx.x], to = starts[blockIdx.x + 1];
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0.f;
        for (uint32_t p = from; p < to; p++) sum += sums[(int64_t)p * width + c];
        dw[(int64_t)ids[blockIdx.x] * width + c] = sum;
    }
}

constexpr int THREADS = 256;

template <typename X, typename Y>
void launch_norm_forward(const void *x, const float *w, const float *b, void *y, float *stats, int rows, int width, bool centred,
                         float eps, cudaStream_t stream) {
    norm_forward<<<blocks_for(rows, THREADS / WARP), THREADS, 0, stream>>>((const X *)x, w, b, (Y *)y, (float2 *)stats, rows, width,
                                                                          centred, eps);
}

template <typename X, typename Y>
cudaError_t launch_norm_backward(const void *dy, const void *x, const float *w, const float *stats, const void *added, void *dx, float *partial,
                                 float *sums, int parts, int rows, int width, bool centred, bool biased, cudaStream_t stream) {
    const int kept = (biased ? 2 : 1) * width, bytes = kept * sizeof(float);
    int warps = THREADS / WARP;
    while (warps > 1 && warps * bytes > 48 * 1024) warps /= 2;
    if (warps * bytes > 48 * 1024) {
        const auto error = cudaFuncSetAttribute(norm_backward<X, Y>, cudaFuncAttributeMaxDynamicSharedMemorySize, warps * bytes);
        if (error != cudaSuccess) return error;
    }
    norm_backward<<<parts, warps * WARP, warps * bytes, stream>>>((const Y *)dy, (const X *)x, w, (const float2 *)stats, (const X *)added, (X *)dx,
                                                                  partial, rows, width, centred, biased);
    sum_parts<<<blocks_for(kept, WARP), dim3(WARP, 8), 0, stream>>>(partial, sums, parts, kept);
    return cudaSuccess;
}

template <typename W>
void launch_heads(bool split, void *whole, void *const parts[3], int n, Heads sizes, cudaStream_t stream) {
    const int64_t all = n * sizes.batch * sizes.heads * sizes.time * sizes.dim;
    const int blocks = blocks_for(all, THREADS);
    if (split)
        split_heads<<<blocks, THREADS, 0, stream>>>((const W *)whole, (W *)parts[0], (W *)parts[1], (W *)parts[2], n, sizes);
    else
        merge_heads<<<blocks, THREADS, 0, stream>>>((const W *)parts[0], (const W *)parts[1], (const W *)parts[2], (W *)whole, n, sizes);
}

template <typename T>
void launch_swiglu(const T *gate, const T *up, const T *dy, T *out, T *d_up, int64_t rows, int width, int64_t stride, cudaStream_t stream) {
    const int64_t packs = rows * width / A;
    const int blocks = blocks_for(packs, THREADS);
    if (dy)
        swiglu_backward<<<blocks, THREADS, 0, stream>>>(gate, up, dy, out, d_up, packs, width, stride);
    else
        swiglu_forward<<<blocks, THREADS, 0, stream>>>(gate, up, out, packs, width, stride);
}

template <typename T>
void launch_activation(bool gated, const void *x, const void *dy, void *out, int64_t rows, int width, cudaStream_t stream) {
    const int64_t packs = rows * width / A;
    const int blocks = blocks_for(packs, THREADS);
    if (gated)
        launch_swiglu((const T *)x, (const T *)x + width, (const T *)dy, (T *)out, (T *)out + width, rows, width, 2 * (int64_t)width, stream);
    else if (dy)
        gelu_backward<<<blocks, THREADS, 0, stream>>>((const T *)x, (const T *)dy, (T *)out, packs);
    else
        gelu_forward<<<blocks, THREADS, 0, stream>>>((const T *)x, (T *)out, packs);
}

} // namespace

extern "C" {

// x, y: of x_type and y_type, of which y's is x's or bf16. stats: 2 floats a row.
int landmark_norm_forward(const void *x, int x_type, const float *w, const float *b, void *y, int y_type, float *stats, int rows,
                          int width, int centred, float eps, cudaStream_t stream) {
    if (x_type == F32 && y_type == F32)
        launch_norm_forward<float, float>(x, w, b, y, stats, rows, width, centred, eps, stream);
    else if (x_type == F32)
        launch_norm_forward<float, __nv_bfloat16>(x, w, b, y, stats, rows, width, centred, eps, stream);
    else
        launch_norm_forward<__nv_bfloat16, __nv_bfloat16>(x, w, b, y, stats, rows, width, centred, eps, stream);
    return cudaGetLastError();
}

// sums: dw, then db if biased. partial: parts times that.
int landmark_norm_backward(const void *dy, int y_type, const void *x, int x_type, const float *w, const float *stats, const void *added, void *dx,
                           float *partial, float *sums, int parts, int rows, int width, int centred, int biased,
                           cudaStream_t stream) {
    cudaError_t error;
    if (x_type == F32 && y_type == F32)
        error = launch_norm_backward<float, float>(dy, x, w, stats, added, dx, partial, sums, parts, rows, width, centred, biased, stream);
    else if (x_type == F32)
        error = launch_norm_backward<float, __nv_bfloat16>(dy, x, w, stats, added, dx, partial, sums, parts, rows, width, centred, biased,
                                                           stream);
    else
        error = launch_norm_backward<__nv_bfloat16, __nv_bfloat16>(dy, x, w, stats, added, dx, partial, sums, parts, rows, width, centred,
                                                                   biased, stream);
    return error ? error : cudaGetLastError();
}

// Between whole [N, n, H, D] and n parts [B, H, T, D] (null: zeros, when merging), elements of `bytes`.
int landmark_heads(int split, void *whole, void *part0, void *part1, void *part2, int n, int64_t batch, int64_t heads, int64_t time,
                   int64_t dim, int bytes, cudaStream_t stream) {
    void *parts[3] = {part0, part1, part2};
    if (dim * bytes % 16 == 0)
        launch_heads<uint4>(split, whole, parts, n, Heads{batch, heads, time, dim * bytes / 16}, stream);
    else if (bytes == 4)
        launch_heads<uint32_t>(split, whole, parts, n, Heads{batch, heads, time, dim}, stream);
    else
        launch_heads<uint16_t>(split, whole, parts, n, Heads{batch, heads, time, dim}, stream);
    return cudaGetLastError();
}

// Forward if dy is null: out [rows, width] from x [rows, width], or [rows, 2 width] if gated. Backward: the gradient of x. 4 divides width.
int landmark_activation(int gated, const void *x, const void *dy, void *out, int type, int64_t rows, int width, cudaStream_t stream) {
    if (type == F32)
        launch_activation<float>(gated, x, dy, out, rows, width, stream);
    else
        launch_activation<__nv_bfloat16>(gated, x, dy, out, rows, width, stream);
    return cudaGetLastError();
}

// Of a gate and an up that are two tensors [rows, width]. Forward if dy is null: out is the result. Backward: out is the gradient of the gate.
int landmark_swiglu(const void *gate, const void *up, const void *dy, void *out, void *d_up, int type, int64_t rows, int width,
                    cudaStream_t stream) {
    if (type == F32)
        launch_swiglu((const float *)gate, (const float *)up, (const float *)dy, (float *)out, (float *)d_up, rows, width, width, stream);
    else
        launch_swiglu((const __nv_bfloat16 *)gate, (const __nv_bfloat16 *)up, (const __nv_bfloat16 *)dy, (__nv_bfloat16 *)out,
                      (__nv_bfloat16 *)d_up, rows, width, width, stream);
    return cudaGetLastError();
}

int landmark_gather_rows(const float *w, const uint32_t *ids, float *y, int n, int width, cudaStream_t stream) {
    gather_rows<<<n, THREADS, 0, stream>>>(w, ids, y, width);
    return cudaGetLastError();
}

// places [n] sorted by token; piece p is places[piece_starts[p]..piece_starts[p + 1]]; token t has the pieces token_starts[t]..
// token_starts[t + 1]. dw holds zeros.
int landmark_scatter_rows(const float *dy, const uint32_t *places, const uint32_t *piece_starts, int pieces, const uint32_t *ids,
                          const uint32_t *token_starts, int tokens, float *sums, float *dw, int width, cudaStream_t stream) {
    sum_pieces<<<pieces, THREADS, 0, stream>>>(dy, places, piece_starts, sums, width);
    scatter_pieces<<<tokens, THREADS, 0, stream>>>(sums, ids, token_starts, dw, width);
    return cudaGetLastError();
}

const char *landmark_layers_error(int error) { return cudaGetErrorString((cudaError_t)error); }
}
