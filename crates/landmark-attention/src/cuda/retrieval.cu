// Retrieval: which blocks a query reads, and what it gets from them. What Rust calls, and the launches.
#include "retrieval_attend.cuh"
#include "retrieval_choose.cuh"
#include <cuda_runtime.h>

#define TRY(call)                               \
    do {                                        \
        const cudaError_t error = (call);       \
        if (error != cudaSuccess) return error; \
    } while (0)

// Memory for score tables at once, but at least for four rows.
constexpr int64_t SCORE_BYTES = 256ll << 20;

// Tiles of queries that fit their number, and the memory.
static int queries_per_tile(const RetrievalParams &p, int mode) {
    const int64_t row_bytes = mode == STATS ? Columns(p).tiles * 8ll : Columns(p).count() * 4;
    const int rows = mode == HEADS || mode == TOKENS ? p.time : p.heads / p.kv_heads * p.time;
    for (int tile : {64, 16})
        if (rows * 3 >= tile && (mode == TOKENS || tile * row_bytes <= SCORE_BYTES)) return tile;
    return 4;
}

// One pass over the landmarks: its units, how many at once, and where its tables are.
struct Pass {
    Work work;
    int at_once;
    int64_t scores, peaks;  // floats

    Pass(const RetrievalParams &p, int mode) : work(p, mode, queries_per_tile(p, mode)) {
        const Columns columns(p);
        const int64_t score_floats = mode == STATS ? 0 : columns.count(), peak_floats = columns.tiles * (mode == STATS ? 2 : 1);
        const int64_t unit = work.rows() * (score_floats + peak_floats), fit = SCORE_BYTES / 4 / unit;
        at_once = int(fit < 1 ? 1 : fit < work.units ? fit : work.units);
        scores = int64_t(at_once) * work.rows() * score_floats;
        peaks = int64_t(at_once) * work.rows() * peak_floats;
    }
};

static int mode_of(const RetrievalParams &p) { return p.selection == MAX_OVER_HEADS ? HEADS : p.selection == MAX_OVER_TOKENS ? TOKENS : ROWS; }

// Floats before the tables: scores of the newest blocks, log-sum-exps.
static int64_t rows_of(const RetrievalParams &p) { return int64_t(p.batch) * p.heads * p.time; }
static int64_t newest_floats(const RetrievalParams &p) { return (rows_of(p) * p.newest + 3) / 4 * 4; }
static int64_t lse_floats(const RetrievalParams &p) { return mode_of(p) == ROWS ? 0 : (rows_of(p) + 3) / 4 * 4; }

extern "C" int64_t landmark_select_scratch(const RetrievalParams *p) {
    const Pass pass(*p, mode_of(*p));
    int64_t tables = pass.scores + pass.peaks;
    if (mode_of(*p) != ROWS) {
        const Pass stats(*p, STATS);
        if (stats.peaks > tables) tables = stats.peaks;
    }
    return newest_floats(*p) + lse_floats(*p) + tables;
}

template <typename T, int MODE> static cudaError_t run_pass(const RetrievalParams &p, const float *newest, float *lse, float *tables, cudaStream_t stream) {
    const Pass pass(p, MODE);
    const Columns columns(p);
    float *scores = tables, *peaks = tables + pass.scores;
    for (int first = 0; first < pass.work.units; first += pass.at_once) {
        const int units = pass.work.units - first < pass.at_once ? pass.work.units - first : pass.at_once;
        const unsigned grid = unsigned(units) * columns.tiles, rows = unsigned(units) * pass.work.rows();
        switch (pass.work.tile) {
            case 64: score_kernel<T, 64, 8, 8, MODE><<<grid, SCORE_THREADS, 0, stream>>>(p, first, units, newest, lse, scores, peaks); break;
            case 16: score_kernel<T, 16, 4, 4, MODE><<<grid, SCORE_THREADS, 0, stream>>>(p, first, units, newest, lse, scores, peaks); break;
            default: score_kernel<T, 4, 4, 1, MODE><<<grid, SCORE_THREADS, 0, stream>>>(p, first, units, newest, lse, scores, peaks);
        }
        TRY(cudaGetLastError());
        if (MODE == STATS) lse_kernel<<<(rows + 7) / 8, 256, 0, stream>>>(p, first, units, pass.work.tile, peaks, lse);
        else choose_kernel<<<rows, CHOOSE_THREADS, p.k * sizeof(int), stream>>>(p, MODE, first, pass.work.tile, scores, peaks);
        TRY(cudaGetLastError());
    }
    return cudaSuccess;
}

template <typename T> static cudaError_t select(const RetrievalParams &p, float *scratch, cudaStream_t stream) {
    float *newest = scratch, *lse = newest + newest_floats(p), *tables = lse + lse_floats(p);
    if (p.newest > 0) {
        newest_kernel<T><<<unsigned((rows_of(p) * p.newest + 7) / 8), 256, 0, stream>>>(p, newest);
        TRY(cudaGetLastError());
    }
    if (mode_of(p) == ROWS) return run_pass<T, ROWS>(p, newest, lse, tables, stream);
    TRY((run_pass<T, STATS>(p, newest, lse, tables, stream)));
    return mode_of(p) == HEADS ? run_pass<T, HEADS>(p, newest, lse, tables, stream) : run_pass<T, TOKENS>(p, newest, lse, tables, stream);
}

template <typename T> static cudaError_t attend(const RetrievalParams &p, cudaStream_t stream) {
    const unsigned grid = unsigned(rows_of(p)), threads = 32 * (p.k < 8 ? p.k : 8);
    if (p.head_dim <= 64) attend_kernel<T, 64><<<grid, threads, 0, stream>>>(p);
    else if (p.head_dim <= 128) attend_kernel<T, 128><<<grid, threads, 0, stream>>>(p);
    else attend_kernel<T, 256><<<grid, threads, 0, stream>>>(p);
    return cudaGetLastError();
}

static cudaError_t place(const PlaceParams &p, cudaStream_t stream) {
    // Memory of its own begins at a multiple of 256 bytes, and what is sent at one of 16.
    if (p.part_bytes % 16 == 0) place_kernel<uint4><<<unsigned(p.count), 256, 0, stream>>>(p, p.part_bytes / 16);
    else place_kernel<uint16_t><<<unsigned(p.count), 256, 0, stream>>>(p, p.part_bytes / 2);
    return cudaGetLastError();
}

template <typename T> static cudaError_t join(const JoinParams &p, cudaStream_t stream) {
    join_kernel<T><<<unsigned((p.rows + 7) / 8), 256, 0, stream>>>(p);
    return cudaGetLastError();
}

template <typename F> static cudaError_t with_type(int dtype, F f) {
    switch (dtype) {
        case F32: return f(float());
        case F16: return f(__half());
        case BF16: return f(__nv_bfloat16());
    }
    return cudaErrorInvalidValue;
}

extern "C" int landmark_select(const RetrievalParams *p, float *scratch, cudaStream_t stream) {
    return with_type(p->dtype, [&](auto type) { return select<decltype(type)>(*p, scratch, stream); });
}
extern "C" int landmark_attend(const RetrievalParams *p, cudaStream_t stream) {
    return with_type(p->dtype, [&](auto type) { return attend<decltype(type)>(*p, stream); });
}
extern "C" int landmark_place(const PlaceParams *p, cudaStream_t stream) { return place(*p, stream); }
extern "C" int landmark_join(const JoinParams *p, cudaStream_t stream) {
    return with_type(p->dtype, [&](auto type) { return join<decltype(type)>(*p, stream); });
}
