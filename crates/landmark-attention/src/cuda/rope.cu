// Rotary position embedding: each pair of channels is turned by its token's angle, whose cosine and sine are in a table.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "params.h"

template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T x[N];
};
template <typename T, int N> __device__ __forceinline__ Pack<T, N> load(const T *from) { return *reinterpret_cast<const Pack<T, N> *>(from); }

// N neighbouring pairs a thread, in two packs of N channels.
template <typename T, bool HALVES, int N> __global__ void __launch_bounds__(256) rope_kernel(const __grid_constant__ RopeParams p) {
    const int groups = p.pairs / N;
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= int64_t(p.time) * groups) return;
    const int t = at / groups, pair = at % groups * N;
    const int first = HALVES ? pair : 2 * pair, second = HALVES ? p.pairs + pair : 2 * pair + N;
    for (int bh = blockIdx.y; bh < p.batch * p.heads; bh += gridDim.y) {
        const int b = bh / p.heads, h = bh % p.heads;
        const float *turns = p.table + ((p.per_row ? int64_t(b) * p.time : 0) + t) * p.pairs * 2 + pair * 2;
        const T *x = static_cast<const T *>(p.x) + b * p.strides.batch + h * p.strides.head + t * p.strides.step;
        T *out = static_cast<T *>(p.out) + (int64_t(bh) * p.time + t) * p.pairs * 2;
        const Pack<T, N> from[2] = {load<T, N>(x + first), load<T, N>(x + second)};
        Pack<T, N> to[2];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const Pack<float, 2> turn = load<float, 2>(turns + 2 * i);
            const float cos = turn.x[0], sin = p.sign * turn.x[1];
            // Where the two channels of pair i are among the 2 N loaded ones.
            const int c0 = HALVES ? i : 2 * i, c1 = HALVES ? N + i : 2 * i + 1;
            const float x0 = static_cast<float>(from[c0 / N].x[c0 % N]), x1 = static_cast<float>(from[c1 / N].x[c1 % N]);
            to[c0 / N].x[c0 % N] = static_cast<T>(x0 * cos - x1 * sin);
            to[c1 / N].x[c1 % N] = static_cast<T>(x1 * cos + x0 * sin);
        }
        *reinterpret_cast<Pack<T, N> *>(out + first) = to[0];
        *reinterpret_cast<Pack<T, N> *>(out + second) = to[1];
    }
}

template <typename T, bool HALVES> static cudaError_t rope_pairs(const RopeParams &p, cudaStream_t stream) {
    const Strides &s = p.strides;
    const bool packs = p.pairs % 4 == 0 && (s.batch | s.head | s.step) % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % (4 * sizeof(T)) == 0;
    const int64_t threads = int64_t(p.time) * (packs ? p.pairs / 4 : p.pairs), rows = int64_t(p.batch) * p.heads;
    const dim3 grid(unsigned((threads + 255) / 256), unsigned(rows < 65535 ? rows : 65535));
    if (packs) rope_kernel<T, HALVES, 4><<<grid, 256, 0, stream>>>(p);
    else rope_kernel<T, HALVES, 1><<<grid, 256, 0, stream>>>(p);
    return cudaGetLastError();
}

template <typename T> static cudaError_t rope(const RopeParams &p, cudaStream_t stream) {
    return p.halves ? rope_pairs<T, true>(p, stream) : rope_pairs<T, false>(p, stream);
}

extern "C" int landmark_rope(const RopeParams *p, cudaStream_t stream) {
    switch (p->dtype) {
        case F32: return rope<float>(*p, stream);
        case F16: return rope<__half>(*p, stream);
        case BF16: return rope<__nv_bfloat16>(*p, stream);
    }
    return cudaErrorInvalidValue;
}
