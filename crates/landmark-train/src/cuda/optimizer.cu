// One optimizer step over all parameters: a launch for the norm of the gradients, one for the step. Blocks take pieces of `PIECE` elements
// of one parameter each, so that neither the order of a sum nor any element depends on the GPU.

#include <stdint.h>

namespace {

constexpr int THREADS = 256;
constexpr int64_t PIECE = 65536; // as in mod.rs

// Matches `Entry` in mod.rs. A parameter without a gradient has n = 0.
struct Entry {
    float *p;
    const float *g;
    float *m, *v;
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

template <typename F> __device__ void for_elements(const Entry *entries, const Piece *pieces, F f) {
    const Piece piece = pieces[blockIdx.x];
    const Entry e = entries[piece.entry];
    const int64_t from = piece.index * PIECE, to = min(e.n, from + PIECE);
    for (int64_t i = from + threadIdx.x; i < to; i += THREADS) f(e, i);
}

__global__ void squares(const Entry *entries, const Piece *pieces, double *partial) {
    __shared__ double sums[THREADS];
    float mine = 0.f;
    for_elements(entries, pieces, [&](const Entry &e, int64_t i) { mine += e.g[i] * e.g[i]; });
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

__global__ void adamw(const Entry *entries, const Piece *pieces, Step step, const float *norm_and_scale) {
    const float scale = norm_and_scale ? norm_and_scale[1] : 1.f;
    for_elements(entries, pieces, [&](const Entry &e, int64_t i) {
        const float g = e.g[i] * scale;
        float m = e.m[i], v = e.v[i];
        m += (g - m) * step.one_less_beta1;
        v = v * step.beta2 + g * g * step.one_less_beta2;
        e.m[i] = m;
        e.v[i] = v;
        e.p[i] = e.p[i] * e.keep - step.step_size * (m / (sqrtf(v) / step.root + step.eps));
    });
}

// p += g.
__global__ void add(const Entry *entries, const Piece *pieces) {
    for_elements(entries, pieces, [&](const Entry &e, int64_t i) { e.p[i] += e.g[i]; });
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
