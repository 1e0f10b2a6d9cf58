// From a call to kernels, for one element type: `forward` and `backward` of this file are instantiated by f32.cu, f16.cu and bf16.cu.
#pragma once
#include "backward.cuh"

template <typename K> cudaError_t allow_shared(K kernel, int bytes) {
    int device, most;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    if (bytes > most) return cudaError_t(TOO_LITTLE_SHARED_MEMORY);
    return bytes > 48 * 1024 ? cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) : cudaSuccess;
}

#define TRY(call)                                    \
    do {                                             \
        const cudaError_t error = (call);            \
        if (error != cudaSuccess) return error;      \
    } while (0)

inline int tiles_of(int length, int tile) { return (length + tile - 1) / tile; }

template <typename T, int COLUMNS> cudaError_t forward_columns(const Params &p, const Splits &splits, cudaStream_t stream) {
    using Shape = ForwardShape<T, COLUMNS>;
    TRY(allow_shared(forward_kernel<T, COLUMNS>, Shape::BYTES));
    const dim3 grid(tiles_of(p.q_len, Shape::ROWS) * (splits.count > 0 ? splits.count : 1), p.heads, p.batch);
    forward_kernel<T, COLUMNS><<<grid, Shape::THREADS, Shape::BYTES, stream>>>(p, splits);
    TRY(cudaGetLastError());
    if (splits.count > 0) combine_kernel<T><<<unsigned((int64_t(p.batch) * p.heads * p.q_len + 3) / 4), 128, 0, stream>>>(p, splits);
    return cudaGetLastError();
}

template <typename T, int COLUMNS, Pass PASS> cudaError_t key_gradient(const Params &p, int first_long, cudaStream_t stream) {
    using Shape = KeyGradientShape<T, COLUMNS>;
    TRY(allow_shared(key_gradient_kernel<T, COLUMNS, PASS>, Shape::BYTES));
    const dim3 grid(p.max_units, p.kv_heads, p.batch);
    key_gradient_kernel<T, COLUMNS, PASS><<<grid, Shape::THREADS, Shape::BYTES, stream>>>(p, first_long);
    return cudaGetLastError();
}

template <typename T, int COLUMNS> cudaError_t backward_columns(const Params &p, cudaStream_t stream) {
    using Shape = QueryGradientShape<T, COLUMNS>;
    rows_kernel<T><<<dim3(tiles_of(p.q_pad, 4), p.heads, p.batch), 128, 0, stream>>>(p);
    TRY(cudaGetLastError());
    const dim3 grid(tiles_of(p.q_len, Shape::ROWS), p.heads, p.batch);
    TRY(allow_shared(query_gradient_kernel<T, COLUMNS, false>, Shape::BYTES));
    query_gradient_kernel<T, COLUMNS, false><<<grid, Shape::THREADS, Shape::BYTES, stream>>>(p, 0);
    TRY(cudaGetLastError());
    for (int first_long = 0; first_long == 0 || first_long < p.max_long_blocks; first_long += LONG_BLOCKS_AT_ONCE) {
        if (p.max_long_blocks > 0) {
            TRY(allow_shared(query_gradient_kernel<T, COLUMNS, true>, Shape::BYTES));
            query_gradient_kernel<T, COLUMNS, true><<<grid, Shape::THREADS, Shape::BYTES, stream>>>(p, first_long);
            TRY(cudaGetLastError());
        }
        if constexpr (COLUMNS <= 128) {
            TRY((key_gradient<T, COLUMNS, BOTH>(p, first_long, stream)));
        } else {
            TRY((key_gradient<T, COLUMNS, DV>(p, first_long, stream)));
            TRY((key_gradient<T, COLUMNS, DK>(p, first_long, stream)));
        }
    }
    return cudaSuccess;
}

template <typename T> cudaError_t forward(const Params &p, const Splits &splits, cudaStream_t stream) {
    if (p.head_dim <= 32) return forward_columns<T, 32>(p, splits, stream);
    if (p.head_dim <= 64) return forward_columns<T, 64>(p, splits, stream);
    if (p.head_dim <= 128) return forward_columns<T, 128>(p, splits, stream);
    return forward_columns<T, 256>(p, splits, stream);
}

template <typename T> cudaError_t backward(const Params &p, cudaStream_t stream) {
    if (p.head_dim <= 32) return backward_columns<T, 32>(p, stream);
    if (p.head_dim <= 64) return backward_columns<T, 64>(p, stream);
    if (p.head_dim <= 128) return backward_columns<T, 128>(p, stream);
    return backward_columns<T, 256>(p, stream);
}
