// Keys outside the window: they enlarge the sum of the outer softmax and have no values (outside.rs). One warp a row everywhere.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "params.h"

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float &to, float x) { to = x; }
__device__ __forceinline__ void put(__half &to, float x) { to = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }

constexpr int WARPS = 8;

struct Row {
    int64_t row;
    int lane;
    __device__ Row() : row(int64_t(blockIdx.x) * WARPS + threadIdx.x / 32), lane(threadIdx.x % 32) {}
};

// The output as a share of the larger sum, and that sum.
template <typename T>
__global__ void join(const T *out, const float *lse, const float *outside, T *joined, float *total, int64_t rows, int channels) {
    const Row at;
    if (at.row >= rows) return;
    const float inner = lse[at.row], outer = outside[at.row], high = fmaxf(inner, outer);
    const float sum = high == -INFINITY ? high : high + log1pf(expf(fminf(inner, outer) - high));
    const float share = inner == -INFINITY ? 0.f : expf(inner - sum);
    for (int c = at.lane; c < channels; c += 32) put(joined[at.row * channels + c], share * number(out[at.row * channels + c]));
    if (at.lane == 0) total[at.row] = sum;
}

// d outside = -exp(outside - total) (dout . joined).
template <typename T>
__global__ void join_backward(const T *joined, const T *dout, const float *outside, const float *total, float *doutside, int64_t rows,
                              int channels) {
    const Row at;
    if (at.row >= rows) return;
    float delta = 0.f;
    for (int c = at.lane; c < channels; c += 32) delta += number(dout[at.row * channels + c]) * number(joined[at.row * channels + c]);
    for (int distance = 16; distance > 0; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    const float outer = outside[at.row];
    if (at.lane == 0) doutside[at.row] = outer == -INFINITY ? 0.f : -expf(outer - total[at.row]) * delta;
}

template <typename T> __global__ void log_sum_exp(const T *scores, float *lse, int64_t rows, int keys, float scale) {
    const Row at;
    if (at.row >= rows) return;
    float high = -INFINITY, sum = 0.f;
    for (int j = at.lane; j < keys; j += 32) {
        const float x = scale * number(scores[at.row * keys + j]);
        if (x > high) {
            sum = sum * expf(high - x) + 1.f;
            high = x;
        } else if (high > -INFINITY) {
            sum += expf(x - high);
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const float high2 = __shfl_xor_sync(~0u, high, distance), sum2 = __shfl_xor_sync(~0u, sum, distance), both = fmaxf(high, high2);
        if (both > -INFINITY) sum = sum * expf(high - both) + sum2 * expf(high2 - both);
        high = both;
    }
    if (at.lane == 0) lse[at.row] = high + logf(sum);
}

template <typename T>
__global__ void log_sum_exp_backward(const T *scores, const float *lse, const float *dlse, T *dscores, int64_t rows, int keys, float scale) {
    const Row at;
    if (at.row >= rows) return;
    const float sum = lse[at.row], factor = scale * dlse[at.row];
    for (int j = at.lane; j < keys; j += 32) {
        const int64_t i = at.row * keys + j;
        put(dscores[i], sum == -INFINITY ? 0.f : factor * expf(scale * number(scores[i]) - sum));
    }
}

template <typename F> static int for_type(int dtype, F f) {
    switch (dtype) {
        case F32: f(float()); break;
        case F16: f(__half()); break;
        case BF16: f(__nv_bfloat16()); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

static unsigned grid(int64_t rows) { return unsigned((rows + WARPS - 1) / WARPS); }

extern "C" int landmark_outside_join(int dtype, const void *out, const float *lse, const float *outside, void *joined, float *total,
                                     int64_t rows, int channels, cudaStream_t stream) {
    return for_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        join<T><<<grid(rows), 32 * WARPS, 0, stream>>>((const T *)out, lse, outside, (T *)joined, total, rows, channels);
    });
}

extern "C" int landmark_outside_join_backward(int dtype, const void *joined, const void *dout, const float *outside, const float *total,
                                              float *doutside, int64_t rows, int channels, cudaStream_t stream) {
    return for_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        join_backward<T><<<grid(rows), 32 * WARPS, 0, stream>>>((const T *)joined, (const T *)dout, outside, total, doutside, rows, channels);
    });
}

extern "C" int landmark_outside_log_sum_exp(int dtype, const void *scores, float *lse, int64_t rows, int keys, float scale,
                                            cudaStream_t stream) {
    return for_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        log_sum_exp<T><<<grid(rows), 32 * WARPS, 0, stream>>>((const T *)scores, lse, rows, keys, scale);
    });
}

extern "C" int landmark_outside_log_sum_exp_backward(int dtype, const void *scores, const float *lse, const float *dlse, void *dscores,
                                                     int64_t rows, int keys, float scale, cudaStream_t stream) {
    return for_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        log_sum_exp_backward<T><<<grid(rows), 32 * WARPS, 0, stream>>>((const T *)scores, lse, dlse, (T *)dscores, rows, keys, scale);
    });
}
