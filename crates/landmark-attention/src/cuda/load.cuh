// Rows from global to shared memory.
#pragma once
#include "mma.cuh"
#include "params.h"

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Rows `source(row)` (null: zeros) of `head_dim` elements into a tile, zeros beyond. Asynchronous where rows are 16-byte aligned.
template <int THREADS, typename T, int ROWS, int COLUMNS, typename F>
__device__ __forceinline__ void load_rows(const Tile<T, ROWS, COLUMNS> &tile, int rows, int head_dim, bool aligned, F source) {
    constexpr int CHUNKS = COLUMNS / 8;
    if constexpr (sizeof(T) == 2) {
        if (aligned) {
            for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
                const int row = i / CHUNKS, column = i % CHUNKS * 8;
                const T *from = source(row);
                const bool here = from && column < head_dim;
                const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(tile.at(0, row, column)));
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(here ? from + column : nullptr),
                             "r"(here ? 16 : 0) : "memory");
            }
            return;
        }
    }
    for (int i = threadIdx.x; i < rows * CHUNKS * 4; i += THREADS) {
        const int row = i / (CHUNKS * 4), column = i % (CHUNKS * 4) * 2;
        const T *from = source(row);
        const float a = from && column < head_dim ? to_float(from[column]) : 0.f;
        const float b = from && column + 1 < head_dim ? to_float(from[column + 1]) : 0.f;
        uint32_t planes[Element<T>::PLANES];
        split<typename Element<T>::Half, Element<T>::PLANES>(a, b, planes);
#pragma unroll
        for (int p = 0; p < Element<T>::PLANES; p++) *reinterpret_cast<uint32_t *>(tile.at(p, row, column)) = planes[p];
    }
}

// One head of a tensor.
template <typename T> struct Head {
    const T *data;
    int64_t step;
    bool aligned;
    __device__ Head(const void *tensor, const Strides &s, int b, int h, int head_dim)
        : data(static_cast<const T *>(tensor) + b * s.batch + h * s.head), step(s.step),
          aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0 && step * sizeof(T) % 16 == 0 && head_dim % 8 == 0) {}
    __device__ const T *row(int64_t t) const { return data + t * step; }
};

// The keys of a unit, or their values.
template <int THREADS, typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_unit(const Tile<T, ROWS, COLUMNS> &tile, const Head<T> &head, const Unit &unit, int head_dim) {
    load_rows<THREADS>(tile, UNIT, head_dim, head.aligned, [&](int slot) -> const T * {
        const Group group = unit.groups[slot / 8];
        return slot % 8 < group.count ? head.row(group.start + slot % 8) : nullptr;
    });
}

// Steps first.. of a head, zeros from `steps` on.
template <int THREADS, typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_steps(const Tile<T, ROWS, COLUMNS> &tile, const Head<T> &head, int first, int steps, int head_dim) {
    load_rows<THREADS>(tile, ROWS, head_dim, head.aligned,
                       [&](int row) -> const T * { return first + row < steps ? head.row(first + row) : nullptr; });
}

template <typename T> __device__ __forceinline__ void store_pair(T *row, int column, int head_dim, float a, float b) {
    if (column < head_dim) row[column] = static_cast<T>(a);
    if (column + 1 < head_dim) row[column + 1] = static_cast<T>(b);
}
