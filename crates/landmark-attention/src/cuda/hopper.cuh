// The instructions of Hopper that the kernels of `hopper_*.cuh` are made of: barriers, the tensor copy engine, operand descriptors.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <type_traits>
#include "mma.cuh"
#include "params.h"
#include "segments.cuh"
#include "wgmma.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Barriers in shared memory, one 8-byte word each.
__device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, int parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again_%=;\n"
        "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// A box of a tensor [batch, head, step, channel] to shared memory.
__device__ __forceinline__ void tensor_load(void *to, const CUtensorMap &map, uint64_t *barrier, int channel, int step, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            shared_address(to)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(channel), "r"(step), "r"(head), "r"(batch)
        : "memory");
}

// Operands lie in panels of 64 elements (128 bytes) a row, swizzled by 128 bytes: what a tensor map with a box of 64 channels writes.
// Descriptor of an operand whose contiguous dimension is the product's depth; 16 of depth further is 32 bytes further.
__device__ __forceinline__ uint64_t descriptor(const void *p) {
    return uint64_t(shared_address(p) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The same where the contiguous dimension is not the depth: `panel` bytes from one 64 of it to the next; 16 of depth are 2048 bytes.
__device__ __forceinline__ uint64_t descriptor_transposed(const void *p, int panel) {
    return uint64_t(shared_address(p) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving reads of an accumulator above the wait for it.
template <int R> __device__ __forceinline__ void settle(float (&c)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+f"(c[i])::"memory");
}

template <int N> __device__ __forceinline__ void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// C [64 x 2R] = A [64 x DEPTH] B [2R x DEPTH] transposed, both in panels: `a_panel` and `b_panel` bytes each.
template <typename T, int DEPTH, int R>
__device__ __forceinline__ void issue_abt(float (&c)[R], const unsigned char *a, int a_panel, const unsigned char *b, int b_panel) {
#pragma unroll
    for (int d = 0; d < DEPTH; d += 16) {
        const int within = d % 64 * 2, panel = d / 64;
        wgmma<T, false, false>(c, advance(descriptor(a), panel * a_panel + within), advance(descriptor(b), panel * b_panel + within), d > 0);
    }
}

// Accumulators of GROUPS_OF_8 times 8 columns as an operand in registers, 16 columns of depth a step; columns beyond are zeros.
template <typename T, int GROUPS_OF_8, int K> __device__ __forceinline__ void pack_operand(uint32_t (&a)[K][4], const float (&x)[GROUPS_OF_8 * 4]) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[k][i] = 2 * k + i / 2 < GROUPS_OF_8 ? pack<T>(x[(8 * k + 2 * i) % (GROUPS_OF_8 * 4)], x[(8 * k + 2 * i + 1) % (GROUPS_OF_8 * 4)]) : 0u;
}

// Rounds up to whole 1024 bytes, where swizzled tiles begin.
__device__ __forceinline__ unsigned char *aligned_memory(unsigned char *p) { return p + (-shared_address(p) & 1023); }

// A ring of tiles between the copy engine and the products: `full` when its bytes are there, `empty` when every warp is through.
template <int STAGES> struct Ring {
    uint64_t full[STAGES], empty[STAGES];
    __device__ void init(int warps) {
        for (int i = 0; i < STAGES; i++) barrier_init(&full[i], 1), barrier_init(&empty[i], warps);
    }
    __device__ uint64_t *fill(int n, int bytes) {
        barrier_wait(&empty[n % STAGES], n / STAGES % 2 ^ 1);
        barrier_expect(&full[n % STAGES], bytes);
        return &full[n % STAGES];
    }
    __device__ void wait(int n) { barrier_wait(&full[n % STAGES], n / STAGES % 2); }
    __device__ void release(int n) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&empty[n % STAGES]);
    }
};

// The tensors of a call as the copy engine sees them.
struct Maps {
    CUtensorMap q, k, v, dout;
};

constexpr int CONSUMERS = 2;  // warpgroups that compute; one more loads
constexpr int HOPPER_THREADS = 128 * (CONSUMERS + 1);
constexpr float LOG2_E = 1.4426950408889634f;

// The blocks of a row. REGULAR: every p.block keys.
template <bool REGULAR> struct Blocks {
    const Params &p;
    int b;
    __device__ __forceinline__ Block at(int i) const {
        if (REGULAR) return {i * p.block, p.block};
        const int2 x = __ldg(reinterpret_cast<const int2 *>(p.blocks) + int64_t(b) * p.block_stride + i);
        return {x.x, x.y};
    }
    // Of the 64 queries from `first` on, where the positions begin after `history`.
    __device__ __forceinline__ View view(int first, int history) const {
        if (REGULAR) return {(history + min(first + 64, p.q_len) - 1) / p.block + 1, (history + first) / p.block};
        const int tiles = (p.q_len + 63) / 64, tile = min(first / 64, tiles - 1);
        const int2 x = __ldg(reinterpret_cast<const int2 *>(p.views) + int64_t(b) * tiles + tile);
        return {x.x, x.y};
    }
};

// A block ends in the last slot of its groups, so that the landmark's place is the same whatever the block's length. The slots before its
// first key have keys of the block before it. The last slot of a piece of an unfinished block has a key of the next piece.
__device__ __forceinline__ int slots_before(const Block &block, int groups) { return max(8 * groups - block.n, 0); }
__device__ __forceinline__ int key_of_slot_0(const Block &block, int groups) { return block.start - slots_before(block, groups); }

// The maximum of a block of which nothing is seen, or that has nothing but its landmark: finite, so that the powers relative to it are 0.
constexpr float LOWEST = -1e30f;
// One over the sum of a block's powers, which is about 1 or more, or 0 where nothing is seen: then nothing is shared out.
__device__ __forceinline__ float inverse_of(float sum) { return __fdividef(1.f, fmaxf(sum, 0.5f)); }

// Raw scores of a block, 64 queries a warpgroup. First half of its softmax: the landmark's score and the block's maximum in base 2, and
// in place of the scores their powers relative to the maximum, 0 where nothing is seen.
template <int G> struct InnerSoftmax {
    float landmark[2], max[2], sum[2];
    bool past[2];

    template <bool MASKED, bool REGULAR>
    __device__ __forceinline__ void run(float (&s)[4 * G], const Block &block, const int (&position)[2], float scale) {
        // The usual lengths of listed blocks have code of their own where no query is masked, the hot case: it leaves out empty groups.
        if constexpr (REGULAR) {
            apply<MASKED, 0>(s, block, position, scale);
        } else if constexpr (MASKED) {
            apply<MASKED, -1>(s, block, position, scale);
        } else {
            switch (slots_before(block, G) / 8) {
                case 0: apply<MASKED, 0>(s, block, position, scale); break;
                case 1: apply<MASKED, 1>(s, block, position, scale); break;
                case 2: apply<MASKED, 2>(s, block, position, scale); break;
                case 3: apply<MASKED, 3>(s, block, position, scale); break;
                default: apply<MASKED, -1>(s, block, position, scale);
            }
        }
    }

  private:
    // FIRST: the group of the first key, or -1 if it may be any.
    template <bool MASKED, int FIRST>
    __device__ __forceinline__ void apply(float (&s)[4 * G], const Block &block, const int (&position)[2], float scale) {
        constexpr int EMPTY = FIRST < 0 ? 0 : FIRST;
        const int lane = threadIdx.x % 32, t = lane % 4, before = slots_before(block, G), first = block.start - before;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            landmark[r] = __shfl_sync(~0u, s[4 * G - 3 + 2 * r], lane | 3) * scale;
            past[r] = !MASKED || position[r] >= block.start + block.n;
            if (t == 3) s[4 * G - 3 + 2 * r] = NEGATIVE_INFINITY;
        }
#pragma unroll
        for (int i = 0; i < G; i++) {
            // One branch for the whole warp.
            if (FIRST < 0 ? 8 * i >= before : i != FIRST) continue;
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * i + 2 * t + e % 2 < before) s[4 * i + e] = NEGATIVE_INFINITY;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high = LOWEST;
#pragma unroll
            for (int i = EMPTY; i < G; i++) {
                float &a = s[4 * i + 2 * r], &b = s[4 * i + 2 * r + 1];
                const int key = first + 8 * i + 2 * t;
                if (MASKED && key > position[r]) a = NEGATIVE_INFINITY;
                if (MASKED && key + 1 > position[r]) b = NEGATIVE_INFINITY;
                high = fmaxf(high, fmaxf(a, b));
            }
            max[r] = high;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) max[r] = quad_max(max[r]) * scale;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = 0;
#pragma unroll
            for (int i = 0; i < EMPTY; i++) s[4 * i + 2 * r] = s[4 * i + 2 * r + 1] = 0;
#pragma unroll
            for (int i = EMPTY; i < G; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &score = s[4 * i + 2 * r + e];
                    score = power2(score * scale - max[r]);
                    total += score;
                }
            sum[r] = total;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) sum[r] = quad_sum(sum[r]);
    }
};
