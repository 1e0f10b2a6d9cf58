// Cross entropy over the rows of a chunk of logits.

#include "common.cuh"

namespace {

constexpr int THREADS = 512;
// Shared memory of a block, so that a GPU's multiprocessor has two.
constexpr int MOST_KEPT = 112 * 1024;
constexpr int WARPS = THREADS / WARP;

struct MaxSum {
    float max, sum;
};

__device__ __forceinline__ MaxSum join(MaxSum a, MaxSum b) {
    const float max = fmaxf(a.max, b.max);
    return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max)};
}

// Over the block, the same in every thread.
__device__ MaxSum block_join(MaxSum x) {
    __shared__ MaxSum warps[WARPS];
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        x = join(x, {__shfl_xor_sync(0xffffffffu, x.max, lane), __shfl_xor_sync(0xffffffffu, x.sum, lane)});
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warps[0];
    for (int w = 1; w < WARPS; w++) x = join(x, warps[w]);
    return x;
}

// A block per row. losses[row] = share (lse - logit of the target); with gradients logits become share (softmax - 1 at the target). A row
// of share 0 (no target) has neither. Rows are `pitch` logits apart. correct[row], if asked for: whether no logit is above the target's. KEPT: the row is in shared memory when
// it is looked at again.
template <typename T, int V, bool KEPT>
__global__ void __launch_bounds__(THREADS)
    cross_entropy(T *logits, const uint32_t *targets, const float *shares, float *losses, uint8_t *correct, int vocab, int pitch,
                  bool gradients) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int64_t row = blockIdx.x;
    T *x = logits + row * pitch;
    // Whole packs; of what is left a thread has one logit at most.
    const int packed = vocab / V * V, odd = packed + threadIdx.x;
    T *again = KEPT ? reinterpret_cast<T *>(shared) : x; // of which a thread reads what it wrote
    const float share = shares[row];
    if (share == 0.f) {
        if (threadIdx.x == 0) {
            losses[row] = 0.f;
            if (correct) correct[row] = 0;
        }
        if (gradients) {
            const float zero[V] = {};
            for (int c = threadIdx.x * V; c < packed; c += THREADS * V) store<V>(x + c, zero);
            if (odd < vocab) from_float(x[odd], 0.f);
        }
        return;
    }
    MaxSum mine{-1e30f, 0.f};
#pragma unroll 4
    for (int c = threadIdx.x * V; c < packed; c += THREADS * V) {
        float v[V];
        const auto pack = *reinterpret_cast<const Pack<T, V> *>(x + c);
        if (KEPT) *reinterpret_cast<Pack<T, V> *>(again + c) = pack;
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = to_float(pack.x[i]);
        float max = v[0];
#pragma unroll
        for (int i = 1; i < V; i++) max = fmaxf(max, v[i]);
        MaxSum here{max, 0.f};
#pragma unroll
        for (int i = 0; i < V; i++) here.sum += __expf(v[i] - max);
        mine = join(mine, here);
    }
    if (odd < vocab) {
        if (KEPT) again[odd] = x[odd];
        mine = join(mine, {to_float(x[odd]), 1.f});
    }
    const MaxSum all = block_join(mine);
    const int target = (int)targets[row];
    const float at_target = to_float(x[target]);
    __syncthreads(); // everybody has read the target's logit
    if (threadIdx.x == 0) {
        losses[row] = share * (all.max - at_target + logf(all.sum));
        if (correct) correct[row] = at_target >= all.max;
    }
    if (!gradients) return;
    const float scale = share / all.sum;
    if (odd < vocab) from_float(x[odd], __expf(to_float(again[odd]) - all.max) * scale - (odd == target ? share : 0.f));
    for (int c = threadIdx.x * V; c < packed; c += THREADS * V) {
        float v[V];
        load<V>(v, again + c);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = __expf(v[i] - all.max) * scale - (c + i == target ? share : 0.f);
        store<V>(x + c, v);
    }
}

// The sum of x in a fixed order.
__global__ void sum(const float *x, float *out, int n) {
    __shared__ float sums[1024];
    float mine = 0.f;
    for (int i = threadIdx.x; i < n; i += 1024) mine += x[i];
    sums[threadIdx.x] = mine;
    __syncthreads();
    for (int half = 512; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *out = sums[0];
}

// x *= *factor. A factor of 1, the usual one, costs no pass over x.
template <typename T> __global__ void scale(T *x, const float *factor, int64_t n) {
    const float by = *factor;
    if (by == 1.f) return;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        from_float(x[i], to_float(x[i]) * by);
}

template <typename T>
cudaError_t launch(void *logits, const uint32_t *targets, const float *shares, float *losses, uint8_t *correct, int rows, int vocab,
                   int pitch, bool gradients, cudaStream_t stream) {
    const int bytes = vocab * (int)sizeof(T);
    const auto with = [&](auto kernel, int shared) {
        const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
        kernel<<<rows, THREADS, shared, stream>>>((T *)logits, targets, shares, losses, correct, vocab, pitch, gradients);
        return cudaGetLastError();
    };
    int device, most;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error) return error;
    if (pitch % 8 != 0) return with(cross_entropy<T, 1, false>, 0);
    if (gradients && bytes <= MOST_KEPT && bytes <= most) return with(cross_entropy<T, 8, true>, bytes);
    return with(cross_entropy<T, 8, false>, 0);
}

} // namespace

extern "C" {

int landmark_cross_entropy(void *logits, int type, const uint32_t *targets, const float *shares, float *losses, uint8_t *correct,
                           int rows, int vocab, int pitch, int gradients, cudaStream_t stream) {
    if (type == F32) return launch<float>(logits, targets, shares, losses, correct, rows, vocab, pitch, gradients, stream);
    return launch<__nv_bfloat16>(logits, targets, shares, losses, correct, rows, vocab, pitch, gradients, stream);
}

int landmark_scale(void *x, int type, const float *factor, int64_t n, cudaStream_t stream) {
    constexpr int BLOCKS = 1024, OF = 256;
    if (type == F32)
        scale<<<BLOCKS, OF, 0, stream>>>((float *)x, factor, n);
    else
        scale<<<BLOCKS, OF, 0, stream>>>((__nv_bfloat16 *)x, factor, n);
    return cudaGetLastError();
}

int landmark_sum(const float *x, float *out, int n, cudaStream_t stream) {
    sum<<<1, 1024, 0, stream>>>(x, out, n);
    return cudaGetLastError();
}
}
