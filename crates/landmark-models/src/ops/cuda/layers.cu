// The layers but for their matrix products and normalisation: heads, activations, embedding. Every sum is in an order that the shapes
// alone fix. Legend: B batch, T time, H heads, D head_dim; N = B T.

#include "common.cuh"

namespace {

// ---- heads ------------------------------------------------------------------------------------------------------------------

struct Heads {
    int batch, heads, time, dim; // dim in elements of W, of which a head's row has this many
};

// Parts [B, H, T, D], zero where there is none, to [N, parts, H, D]. A thread moves elements of one place in the heads of `STEPS` tokens.
constexpr int STEPS = 4;
template <typename W> __global__ void merge_heads(const W *part0, const W *part1, const W *part2, W *y, int parts, Heads s) {
    const int width = s.heads * s.dim, column = blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.z;
    if (column >= parts * width) return;
    const int part = column / width, h = column % width / s.dim, c = column % s.dim;
    const W *in = part == 0 ? part0 : part == 1 ? part1 : part2;
    if (in) in += (int64_t)(b * s.heads + h) * s.time * s.dim + c;
    y += (int64_t)b * s.time * parts * width + column;
    const int from = blockIdx.y * STEPS;
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        if (const int t = from + i; t < s.time) y[(int64_t)t * parts * width] = in ? in[(int64_t)t * s.dim] : W{};
}

// ---- activations ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float cdf(float x) { return 0.5f * (1.f + erff(x * 0.70710678118654752f)); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

template <typename T, int A> __global__ void gelu_forward(const T *x, T *y, int64_t packs) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    float v[A];
    load<A>(v, x + i * A);
#pragma unroll
    for (int j = 0; j < A; j++) v[j] *= cdf(v[j]);
    store<A>(y + i * A, v);
}

template <typename T, int A> __global__ void gelu_backward(const T *x, const T *dy, T *dx, int64_t packs) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= packs) return;
    float v[A], g[A];
    load<A>(v, x + i * A), load<A>(g, dy + i * A);
#pragma unroll
    for (int j = 0; j < A; j++) g[j] *= cdf(v[j]) + v[j] * 0.39894228040143268f * __expf(-0.5f * v[j] * v[j]);
    store<A>(dx + i * A, g);
}

// Gate and up are two matrices whose rows begin `stride` apart: their own, or the halves of one.
template <typename T, int A>
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

template <typename T, int A>
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

// dw[id] += sum over the pieces of a token, which are side by side.
__global__ void scatter_pieces(const float *sums, const uint32_t *ids, const uint32_t *starts, float *dw, int width) {
    const uint32_t from = starts[blockIdx.x], to = starts[blockIdx.x + 1];
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0.f;
        for (uint32_t p = from; p < to; p++) sum += sums[(int64_t)p * width + c];
        dw[(int64_t)ids[blockIdx.x] * width + c] += sum;
    }
}

constexpr int THREADS = 256;

template <typename W> void launch_merge(void *whole, void *const parts[3], int n, Heads s, cudaStream_t stream) {
    const int columns = n * s.heads * s.dim, threads = columns < THREADS ? (columns + WARP - 1) / WARP * WARP : THREADS;
    merge_heads<<<dim3(blocks_for(columns, threads), blocks_for(s.time, STEPS), s.batch), threads, 0, stream>>>(
        (const W *)parts[0], (const W *)parts[1], (const W *)parts[2], (W *)whole, n, s);
}

template <typename T, int A>
void launch_swiglu(const T *gate, const T *up, const T *dy, T *out, T *d_up, int64_t rows, int width, int64_t stride, cudaStream_t stream) {
    const int64_t packs = rows * width / A;
    const int blocks = blocks_for(packs, THREADS);
    if (dy)
        swiglu_backward<T, A><<<blocks, THREADS, 0, stream>>>(gate, up, dy, out, d_up, packs, width, stride);
    else
        swiglu_forward<T, A><<<blocks, THREADS, 0, stream>>>(gate, up, out, packs, width, stride);
}

template <typename T, int A>
void launch_activation(bool gated, const void *x, const void *dy, void *out, int64_t rows, int width, cudaStream_t stream) {
    const int64_t packs = rows * width / A;
    const int blocks = blocks_for(packs, THREADS);
    if (gated)
        launch_swiglu<T, A>((const T *)x, (const T *)x + width, (const T *)dy, (T *)out, (T *)out + width, rows, width, 2 * (int64_t)width, stream);
    else if (dy)
        gelu_backward<T, A><<<blocks, THREADS, 0, stream>>>((const T *)x, (const T *)dy, (T *)out, packs);
    else
        gelu_forward<T, A><<<blocks, THREADS, 0, stream>>>((const T *)x, (T *)out, packs);
}

} // namespace

extern "C" {

// n parts [B, H, T, D] (null: zeros) to whole [N, n, H, D], elements of `bytes`.
int landmark_merge_heads(void *whole, void *part0, void *part1, void *part2, int n, int batch, int heads, int time, int dim, int bytes,
                         cudaStream_t stream) {
    void *parts[3] = {part0, part1, part2};
    if (dim * bytes % 16 == 0)
        launch_merge<uint4>(whole, parts, n, Heads{batch, heads, time, dim * bytes / 16}, stream);
    else if (bytes == 4)
        launch_merge<uint32_t>(whole, parts, n, Heads{batch, heads, time, dim}, stream);
    else
        launch_merge<uint16_t>(whole, parts, n, Heads{batch, heads, time, dim}, stream);
    return cudaGetLastError();
}

// Forward if dy is null: out [rows, width] from x [rows, width], or [rows, 2 width] if gated. Backward: the gradient of x. 4 divides width.
int landmark_activation(int gated, const void *x, const void *dy, void *out, int type, int64_t rows, int width, cudaStream_t stream) {
    if (type == F32)
        launch_activation<float, 4>(gated, x, dy, out, rows, width, stream);
    else if (width % 8 == 0)
        launch_activation<__nv_bfloat16, 8>(gated, x, dy, out, rows, width, stream);
    else
        launch_activation<__nv_bfloat16, 4>(gated, x, dy, out, rows, width, stream);
    return cudaGetLastError();
}

// Of a gate and an up that are two tensors [rows, width]. Forward if dy is null: out is the result. Backward: out is the gradient of the gate.
int landmark_swiglu(const void *gate, const void *up, const void *dy, void *out, void *d_up, int type, int64_t rows, int width,
                    cudaStream_t stream) {
    auto launch = [&](auto one, auto pack) {
        using T = decltype(one);
        launch_swiglu<T, decltype(pack)::value>((const T *)gate, (const T *)up, (const T *)dy, (T *)out, (T *)d_up, rows, width, width, stream);
    };
    using std::integral_constant;
    if (type == F32)
        launch(0.f, integral_constant<int, 4>());
    else if (width % 8 == 0)
        launch(__nv_bfloat16(), integral_constant<int, 8>());
    else
        launch(__nv_bfloat16(), integral_constant<int, 4>());
    return cudaGetLastError();
}

int landmark_gather_rows(const float *w, const uint32_t *ids, float *y, int n, int width, cudaStream_t stream) {
    gather_rows<<<n, THREADS, 0, stream>>>(w, ids, y, width);
    return cudaGetLastError();
}

// places [n] sorted by token; piece p is places[piece_starts[p]..piece_starts[p + 1]]; token t has the pieces token_starts[t]..
// token_starts[t + 1]. The sums are added to dw.
int landmark_scatter_rows(const float *dy, const uint32_t *places, const uint32_t *piece_starts, int pieces, const uint32_t *ids,
                          const uint32_t *token_starts, int tokens, float *sums, float *dw, int width, cudaStream_t stream) {
    sum_pieces<<<pieces, THREADS, 0, stream>>>(dy, places, piece_starts, sums, width);
    scatter_pieces<<<tokens, THREADS, 0, stream>>>(sums, ids, token_starts, dw, width);
    return cudaGetLastError();
}

const char *landmark_layers_error(int error) { return cudaGetErrorString((cudaError_t)error); }
}
