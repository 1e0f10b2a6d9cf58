// Which calls the Hopper kernels take, and their launches.
#include "hopper_backward.cuh"
#include "hopper_forward.cuh"
#include "launch.cuh"

static bool make_map(CUtensorMap &map, const void *data, const Strides &strides, const Params &p, int steps, int heads, int rows) {
    using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void *f = nullptr;
        cudaDriverEntryPointQueryResult found;
        const bool ok = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) == cudaSuccess;
        return reinterpret_cast<Encode>(ok && found == cudaDriverEntryPointSuccess ? f : nullptr);
    }();
    if (!encode) return false;
    // A dimension of one element is never stepped over: its stride may be anything, so it gets one that fits.
    const cuuint64_t dims[4] = {cuuint64_t(p.head_dim), cuuint64_t(steps), cuuint64_t(heads), cuuint64_t(p.batch)};
    const int64_t given[3] = {strides.step, strides.head, strides.batch};
    cuuint64_t bytes[3];
    for (int i = 0; i < 3; i++) {
        bytes[i] = dims[i + 1] > 1 ? cuuint64_t(given[i]) * 2 : 16;
        if (bytes[i] % 16 != 0 || bytes[i] == 0 || bytes[i] >= (1ull << 40)) return false;
    }
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
    const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, unit[4] = {1, 1, 1, 1};
    return encode(&map, p.dtype == BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void *>(data), dims, bytes,
                  box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

static bool is_regular(const Params &p) { return p.block >= 49 && p.block <= 64; }

// Blocks of at most 64 (regular ones that fill seven or eight groups, or listed ones), heads of 64 or 128, 16-bit elements.
bool hopper_takes(const Params &p, bool backward, Maps &maps) {
    if (p.dtype == F32 || (p.head_dim != 64 && p.head_dim != 128) || !(p.scale > 0) || p.q_len < 16) return false;
    if (p.dropout.weights | p.dropout.groups) return false;
    if (!is_regular(p) && !p.blocks) return false;
    const int rows = is_regular(p) ? (p.block + 7) / 8 * 8 : 64;
    return make_map(maps.q, p.q, p.q_strides, p, p.q_len, p.heads, 64) && make_map(maps.k, p.k, p.k_strides, p, p.kv_len, p.kv_heads, rows) &&
           make_map(maps.v, p.v, p.v_strides, p, p.kv_len, p.kv_heads, rows) &&
           (!backward || make_map(maps.dout, p.dout, p.dout_strides, p, p.q_len, p.heads, 64));
}

template <typename T, int D, int G, bool REGULAR> static cudaError_t run_forward(const Params &p, const Maps &maps, cudaStream_t stream) {
    using Shape = HopperForward<D, G>;
    TRY(allow_shared(hopper_forward_kernel<T, D, G, REGULAR>, Shape::BYTES));
    hopper_forward_kernel<T, D, G, REGULAR><<<dim3(tiles_of(p.q_len, Shape::ROWS), p.heads, p.batch), HOPPER_THREADS, Shape::BYTES, stream>>>(p, maps);
    return cudaGetLastError();
}

template <typename T, int D, int G, bool REGULAR> static cudaError_t run_backward(const Params &p, const Maps &maps, cudaStream_t stream) {
    using Queries = HopperQueryGradient<D>;
    using Keys = HopperKeyGradient<D>;
    rows_kernel<T><<<dim3(tiles_of(p.q_pad, 4), p.heads, p.batch), 128, 0, stream>>>(p);
    TRY(cudaGetLastError());
    TRY(allow_shared(hopper_query_gradient_kernel<T, D, G, REGULAR>, Queries::BYTES));
    hopper_query_gradient_kernel<T, D, G, REGULAR><<<dim3(tiles_of(p.q_len, Queries::ROWS), p.heads, p.batch), HOPPER_THREADS, Queries::BYTES, stream>>>(p, maps);
    TRY(cudaGetLastError());
    TRY(allow_shared(hopper_key_gradient_kernel<T, D, G, REGULAR>, Keys::BYTES));
    hopper_key_gradient_kernel<T, D, G, REGULAR><<<dim3(REGULAR ? tiles_of(p.kv_len, 2 * p.block) : p.block_stride / 2, p.kv_heads, p.batch), HOPPER_THREADS, Keys::BYTES, stream>>>(p, maps);
    return cudaGetLastError();
}

template <typename F> static cudaError_t dispatch(const Params &p, F f) {
    auto dim = [&](auto type) {
        auto groups = [&](auto d) {
            using std::integral_constant;
            if (!is_regular(p)) return f(type, d, integral_constant<int, 8>(), std::false_type());
            return p.block <= 56 ? f(type, d, integral_constant<int, 7>(), std::true_type()) : f(type, d, integral_constant<int, 8>(), std::true_type());
        };
        return p.head_dim == 64 ? groups(std::integral_constant<int, 64>()) : groups(std::integral_constant<int, 128>());
    };
    return p.dtype == BF16 ? dim(__nv_bfloat16()) : dim(__half());
}

cudaError_t hopper_forward(const Params &p, const Maps &maps, cudaStream_t stream) {
    return dispatch(p, [&](auto t, auto d, auto g, auto regular) {
        return run_forward<decltype(t), decltype(d)::value, decltype(g)::value, decltype(regular)::value>(p, maps, stream);
    });
}

cudaError_t hopper_backward(const Params &p, const Maps &maps, cudaStream_t stream) {
    return dispatch(p, [&](auto t, auto d, auto g, auto regular) {
        return run_backward<decltype(t), decltype(d)::value, decltype(g)::value, decltype(regular)::value>(p, maps, stream);
    });
}
