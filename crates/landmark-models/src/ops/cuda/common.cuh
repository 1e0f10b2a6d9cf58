// What the kernels of a layer share: element types, loads of several elements at once, sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

// Matches `ElementType` in mod.rs.
enum ElementType { F32 = 0, BF16 = 1 };

constexpr int WARP = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float &to, float x) { to = x; }
__device__ __forceinline__ void from_float(__nv_bfloat16 &to, float x) { to = __float2bfloat16(x); }

// N elements that are loaded and stored at once.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
    T x[N];
};

template <int N, typename T> __device__ __forceinline__ void load(float (&to)[N], const T *from) {
    const auto pack = *reinterpret_cast<const Pack<T, N> *>(from);
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = to_float(pack.x[i]);
}

template <int N, typename T> __device__ __forceinline__ void store(T *to, const float (&from)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) from_float(pack.x[i], from[i]);
    *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

inline int blocks_for(int64_t n, int per_block) { return (int)((n + per_block - 1) / per_block); }
