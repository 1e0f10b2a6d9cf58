// What trials of matrix products need: matrices of noise, and whether two are the same bits.

#include "common.cuh"

namespace {

constexpr int BLOCKS = 1024, THREADS = 256;

// Numbers in -0.5..0.5.
template <typename T> __global__ void noise(T *x, int64_t n, uint32_t seed) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += BLOCKS * THREADS) {
        uint32_t h = (uint32_t)i * 0x9e3779b9u ^ seed * 0x85ebca6bu;
        h = (h ^ h >> 16) * 0x7feb352du;
        h = (h ^ h >> 15) * 0x846ca68bu;
        h ^= h >> 16;
        from_float(x[i], (h >> 8) * 0x1p-24f - 0.5f);
    }
}

// b is zeros afterwards.
__global__ void differs(const uint16_t *a, uint16_t *b, int64_t n, uint32_t *differs) {
    bool mine = false;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += BLOCKS * THREADS) {
        mine |= a[i] != b[i];
        b[i] = 0;
    }
    if (mine) *differs = 1; // whoever writes writes the same
}

} // namespace

extern "C" {

int landmark_noise(void *x, int type, int64_t n, uint32_t seed, cudaStream_t stream) {
    if (type == F32)
        noise<<<BLOCKS, THREADS, 0, stream>>>((float *)x, n, seed);
    else
        noise<<<BLOCKS, THREADS, 0, stream>>>((__nv_bfloat16 *)x, n, seed);
    return cudaGetLastError();
}

// n: halfwords of a and b, which is cleared.
int landmark_differs(const uint16_t *a, uint16_t *b, int64_t n, uint32_t *answer, cudaStream_t stream) {
    const cudaError_t error = cudaMemsetAsync(answer, 0, sizeof *answer, stream);
    if (error != cudaSuccess) return error;
    differs<<<BLOCKS, THREADS, 0, stream>>>(a, b, n, answer);
    return cudaGetLastError();
}
}
