// One optimizer step over all parameters: launches for the norm of the gradients, one for the step, which also writes the bf16 copies that
// the model's products take. Blocks take pieces of `PIECE` elements of one parameter each, so that neither the order of a sum nor any
// element depends on the GPU.

#include <cuda_bf16.h>
#include <stdint.h>

namespace {

constexpr int THREADS = 256;
constexpr int64_t PIECE = 16384; // as in mod.rs
constexpr int V = 4;             // elements that a thread takes at once

// Matches `Entry` in mod.rs. A parameter without a gradient has n = 0.
struct Entry {
    float *p;
    const float *g;
    float *m, *v;
    __nv_bfloat16 *rounded; // a copy of the parameter, or null
    int64_t n;
    float keep; // what weight decay leaves of the parameter
    float unused;
};

struct Piece {
    uint32_t entry, index;
};

// Matches `Step` in mod.rs.
struct Step {
    float beta2, one_less_beta1, one_less_beta2, step_size, root, eps;
};

template <typename T> struct alignas(sizeof(T) * V) Pack {
    T x[V];
};

__device__ __forceinline__ void load(float (&to)[V], const float *from, int64_t left) {
    if (left >= V) {
        const auto pack = *reinterpret_cast<const Pack<float> *>(from);
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = pack.x[i];
    } else
#pragma unroll
        for (int i = 0; i < V; i++) to[i] = i < left ? from[i] : 0.f;
}

__device__ __forceinline__ void convert(float &to, float from) { to = from; }
__device__ __forceinline__ void convert(__nv_bfloat16 &to, float from) { to = __float2bfloat16(from); }

template <typename T> __device__ __forceinline__ void store(T *to, const float (&from)[V], int64_t left) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < V; i++) convert(pack.x[i], from[i]);
    if (left >= V)
        *reinterpret_cast<Pack<T> *>(to) = pack;
    else
#pragma unroll
        for (int i = 0; i < V; i++)
            if (i < left) to[i] = pack.x[i];
}

// f(entry, first element, elements from there on) for the packs of this thread. All addresses are aligned to packs.
template <typename F> __device__ void for_packs(const Entry *entries, const Piece *pieces, F f) {
    const Piece piece = pieces[blockIdx.x];
    const Entry e = entries[piece.entry];
    const int64_t from = piece.index * PIECE, to = min(e.n, from + PIECE);
    for (int64_t i = from + threadIdx.x * V; i < to; i += THREADS * V) f(e, i, to - i);
}

__global__ void __launch_bounds__(THREADS) squares(const Entry *entries, const Piece *pieces, double *partial) {
    __shared__ double sums[THREADS];
    float mine = 0.f;
    for_packs(entries, pieces, [&](const Entry &e, int64_t i, int64_t left) {
        float g[V];
        load(g, e.g + i, left);
#pragma unroll
        for (int j = 0; j < V; j++) mine += g[j] * g[j];
    });
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// norm_and_scale: the norm, and what gradients are multiplied by so that it is at most `limit`.
__global__ void norm(const double *partial, int n, double limit, float *norm_and_scale) {
    __shared__ double sums[THREADS];
    double mine = 0.;
    for (int i = threadIdx.x; i < n; i += THREADS) mine += partial[i];
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const double norm = sqrt(sums[0]);
        norm_and_scale[0] = (float)norm;
        norm_and_scale[1] = (float)fmin(limit / (norm + 1e-6), 1.);
    }
}

__global__ void __launch_bounds__(THREADS)
    adamw(const Entry *entries, const Piece *pieces, Step step, const float *norm_and_scale) {
    const float scale = norm_and_scale ? norm_and_scale[1] : 1.f;
    for_packs(entries, pieces, [&](const Entry &e, int64_t i, int64_t left) {
        float p[V], g[V], m[V], v[V];
        load(p, e.p + i, left), load(g, e.g + i, left), load(m, e.m + i, left), load(v, e.v + i, left);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float gradient = g[j] * scale;
            m[j] += (gradient - m[j]) * step.one_less_beta1;
            v[j] = v[j] * step.beta2 + gradient * gradient * step.one_less_beta2;
            p[j] = p[j] * e.keep - step.step_size * (m[j] / (sqrtf(v[j]) / step.root + step.eps));
        }
        store(e.m + i, m, left), store(e.v + i, v, left), store(e.p + i, p, left);
        if (e.rounded) store(e.rounded + i, p, left);
    });
}

// p += g.
__global__ void __launch_bounds__(THREADS) add(const Entry *entries, const Piece *pieces) {
    for_packs(entries, pieces, [&](const Entry &e, int64_t i, int64_t left) {
        float p[V], g[V];
        load(p, e.p + i, left), load(g, e.g + i, left);
#pragma unroll
        for (int j = 0; j < V; j++) p[j] += g[j];
        store(e.p + i, p, left);
    });
}

} // namespace

extern "C" {

// limit <= 0: nothing is clipped and no norm is taken.
int landmark_adamw(const Entry *entries, const Piece *pieces, int n, const Step *step, double limit, double *partial,
                   float *norm_and_scale, cudaStream_t stream) {
    if (limit > 0) {
        squares<<<n, THREADS, 0, stream>>>(entries, pieces, partial);
        norm<<<1, THREADS, 0, stream>>>(partial, n, limit, norm_and_scale);
    }
    adamw<<<n, THREADS, 0, stream>>>(entries, pieces, *step, limit > 0 ? norm_and_scale : nullptr);
    return cudaGetLastError();
}

int landmark_add_gradients(const Entry *entries, const Piece *pieces, int n, cudaStream_t stream) {
    add<<<n, THREADS, 0, stream>>>(entries, pieces);
    return cudaGetLastError();
}

const char *landmark_optimizer_error(int error) { return cudaGetErrorString((cudaError_t)error); }
}
