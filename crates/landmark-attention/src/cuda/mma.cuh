// Matrix products of one warp on tensor cores (mma.sync m16n8k16), for compute capability 8.0 and newer.
//
// f32 is split into three bf16 planes, x = x0 + x1 + x2, and a product into the six products of planes that matter: as accurate as
// f32 arithmetic, and several times as fast.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

template <typename T> struct Element {
    using Half = T;
    static constexpr int PLANES = 1;
};
template <> struct Element<float> {
    using Half = __nv_bfloat16;
    static constexpr int PLANES = 3;
};

template <typename Half> __device__ __forceinline__ uint32_t pack(float a, float b);
template <> __device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float a, float b) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(b), "f"(a));
    return x;
}
template <> __device__ __forceinline__ uint32_t pack<__half>(float a, float b) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(b), "f"(a));
    return x;
}
template <typename T> __device__ __forceinline__ float to_float(T x) { return static_cast<float>(x); }
template <typename Half> __device__ __forceinline__ float2 unpack(uint32_t x) {
    const Half *h = reinterpret_cast<const Half *>(&x);
    return {to_float(h[0]), to_float(h[1])};
}

// The planes of two neighbouring numbers.
template <typename Half, int PLANES> __device__ __forceinline__ void split(float a, float b, uint32_t (&planes)[PLANES]) {
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        planes[p] = pack<Half>(a, b);
        if (p + 1 < PLANES) {
            float2 taken = unpack<Half>(planes[p]);
            a -= taken.x, b -= taken.y;
        }
    }
}

template <typename Half> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool TRANSPOSED, typename Half> __device__ __forceinline__ void ldmatrix(uint32_t (&x)[4], const Half *row) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

// Rows of COLUMNS halves in shared memory, padded by 16 bytes against bank conflicts; one copy for each plane.
template <typename T, int ROWS, int COLUMNS> struct Tile {
    using Half = typename Element<T>::Half;
    static constexpr int PLANES = Element<T>::PLANES, STRIDE = COLUMNS + 8;
    static constexpr int PLANE = ROWS * STRIDE, BYTES = PLANES * PLANE * 2;
    Half *data;
    __device__ Half *at(int plane, int row, int column) const { return data + plane * PLANE + row * STRIDE + column; }
};

template <int PLANES, typename F> __device__ __forceinline__ void each_product(F f) {
    f(0, 0);
    if constexpr (PLANES == 3) f(0, 1), f(1, 0), f(1, 1), f(0, 2), f(2, 0);
}

// acc[16 x 64] = rows first_row.. of A [. x D] times B [64 x D] transposed.
template <typename TileA, typename TileB>
__device__ __forceinline__ void product_abt(float (&acc)[8][4], const TileA &a, int first_row, const TileB &b, int depth) {
    using Half = typename TileA::Half;
    const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = 0;
    each_product<TileA::PLANES>([&](int pa, int pb) {
#pragma unroll 4
        for (int d = 0; d < depth; d += 16) {
            uint32_t fa[4];
            ldmatrix<false>(fa, a.at(pa, first_row + lane % 16, d + lane / 16 * 8));
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t fb[4];
                ldmatrix<false>(fb, b.at(pb, n * 8 + matrix / 2 * 8 + lane % 8, d + matrix % 2 * 8));
                mma<Half>(acc[n], fa, fb[0], fb[1]);
                mma<Half>(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
    });
}

// A tensor core adds with truncation: over thousands of steps that is worse than f32. f32's products are summed apart, tile by tile.
template <int PLANES, int N, typename F> __device__ __forceinline__ void add_product(float (&acc)[N][4], F product) {
    if constexpr (PLANES == 1) {
        product(acc);
    } else {
        float part[N][4] = {};
        product(part);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[n][e] += part[n][e];
    }
}

// acc[16 x COLUMNS] += weights [16 x 64], as product_abt leaves them, times B [64 x COLUMNS].
template <typename TileB, int N>
__device__ __forceinline__ void product_wb(float (&acc)[N][4], const float (&weights)[8][4], const TileB &b) {
    using Half = typename TileB::Half;
    constexpr int PLANES = TileB::PLANES;
    const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t planes[4][PLANES];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float *w = &weights[2 * k + i / 2][i % 2 * 2];
            split<Half, PLANES>(w[0], w[1], planes[i]);
        }
        each_product<PLANES>([&](int pa, int pb) {
            const uint32_t fa[4] = {planes[0][pa], planes[1][pa], planes[2][pa], planes[3][pa]};
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t fb[4];
                ldmatrix<true>(fb, b.at(pb, k * 16 + matrix % 2 * 8 + lane % 8, n * 8 + matrix / 2 * 8));
                mma<Half>(acc[n], fa, fb[0], fb[1]);
                mma<Half>(acc[n + 1], fa, fb[2], fb[3]);
            }
        });
    }
}

// acc[16 x COLUMNS] += columns first_column.. of A [ROWS x 64], transposed, times B [ROWS x COLUMNS].
template <int ROWS, typename TileA, typename TileB, int N>
__device__ __forceinline__ void product_atb(float (&acc)[N][4], const TileA &a, int first_column, const TileB &b) {
    using Half = typename TileA::Half;
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    each_product<TileA::PLANES>([&](int pa, int pb) {
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            uint32_t fa[4];
            ldmatrix<true>(fa, a.at(pa, k + matrix / 2 * 8 + lane % 8, first_column + matrix % 2 * 8));
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t fb[4];
                ldmatrix<true>(fb, b.at(pb, k + matrix % 2 * 8 + lane % 8, n * 8 + matrix / 2 * 8));
                mma<Half>(acc[n], fa, fb[0], fb[1]);
                mma<Half>(acc[n + 1], fa, fb[2], fb[3]);
            }
        }
    });
}
