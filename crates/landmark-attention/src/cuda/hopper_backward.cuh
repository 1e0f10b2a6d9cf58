// Backward on Hopper, for the blocks of `hopper_forward.cuh`; the arithmetic is that of `backward.cuh`.
#pragma once
#include "hopper.cuh"

// Powers to weights (in `s`) and dP to ds, for a block.
template <int G>
__device__ __forceinline__ void gradients(float (&s)[G * 4], float (&dp)[G * 4], const InnerSoftmax<G> &inner, const float (&lse)[2],
                                          const float (&delta)[2]) {
    float dot[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < G; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) dot[e / 2] += s[4 * i + e] * dp[4 * i + e];
#pragma unroll
    for (int r = 0; r < 2; r++) dot[r] = quad_sum(dot[r]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool past = inner.past[r];
        const float share = power2((past ? inner.landmark[r] : inner.max[r]) - lse[r]);
        const float inverse = inverse_of(inner.sum[r]);
        const float factor = past ? share * inverse : share, mean = past ? dot[r] * inverse : delta[r];
        const float ds_landmark = past ? share * (mean - delta[r]) : 0.f;
#pragma unroll
        for (int i = 0; i < G; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &w = s[4 * i + 2 * r + e], &d = dp[4 * i + 2 * r + e];
                w *= factor;
                d = w * (d - mean);
            }
        dp[4 * G - 3 + 2 * r] = threadIdx.x % 4 == 3 ? ds_landmark : dp[4 * G - 3 + 2 * r];
    }
}

// Rows 8G.. of the tiles are read as keys of weight 0, and no copy writes them: they must be numbers.
template <int STAGES, int BYTES> __device__ __forceinline__ void clear_last_rows(unsigned char (&tiles)[STAGES][BYTES], int thread) {
    for (int i = thread; i < STAGES * BYTES / 8192 * 64; i += 128 * CONSUMERS) {
        unsigned char *panel = tiles[0] + i / 64 * 8192;
        *reinterpret_cast<uint4 *>(panel + 7 * 1024 + i % 64 * 16) = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync 7, %0;" ::"n"(128 * CONSUMERS) : "memory");
}

__device__ __forceinline__ void load_row_values(const Params &p, int64_t head, int row, float (&lse)[2], float (&delta)[2]) {
    const float2 *rows = reinterpret_cast<const float2 *>(p.rows) + head * p.q_pad + row;
    const float2 a = rows[0], b = rows[8];
    lse[0] = a.x, delta[0] = a.y, lse[1] = b.x, delta[1] = b.y;
}

template <int D> struct HopperQueryGradient {
    static constexpr int ROWS = 128, STAGES = 3, PANELS = D / 64, PANEL = 64 * 128, TILE = PANELS * PANEL;
    struct Shared {
        unsigned char q[CONSUMERS][TILE], dout[CONSUMERS][TILE];
        unsigned char k[STAGES][TILE], v[STAGES][TILE];
        Ring<STAGES> ring_k, ring_v;
        uint64_t q_full;
    };
    static constexpr int BYTES = sizeof(Shared) + 1024;
};

template <typename T, int D, int G, bool REGULAR>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_query_gradient_kernel(const __grid_constant__ Params p, const __grid_constant__ Maps maps) {
    using Shape = HopperQueryGradient<D>;
    extern __shared__ unsigned char memory[];
    auto &shared = *reinterpret_cast<typename Shape::Shared *>(aligned_memory(memory));

    const int b = blockIdx.z, h = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * Shape::ROWS;
    const int history = p.kv_len - p.q_len;
    const Blocks<REGULAR> blocks{p, b};
    const int seen = blocks.view(min(first + 64, p.q_len - 1), history).seen;
    if (threadIdx.x == 0) {
        shared.ring_k.init(4 * CONSUMERS), shared.ring_v.init(4 * CONSUMERS);
        barrier_init(&shared.q_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_give<24>();
        if (threadIdx.x == 0) {
            const int kv_head = h / (p.heads / p.kv_heads);
            barrier_expect(&shared.q_full, 2 * CONSUMERS * Shape::TILE);
            for (int w = 0; w < CONSUMERS; w++)
                for (int c = 0; c < Shape::PANELS; c++) {
                    tensor_load(shared.q[w] + c * Shape::PANEL, maps.q, &shared.q_full, 64 * c, first + 64 * w, h, b);
                    tensor_load(shared.dout[w] + c * Shape::PANEL, maps.dout, &shared.q_full, 64 * c, first + 64 * w, h, b);
                }
            for (int n = 0; n < seen; n++) {
                const int stage = n % Shape::STAGES, key = key_of_slot_0(blocks.at(n), G);
                uint64_t *full = shared.ring_k.fill(n, Shape::PANELS * G * 1024);
                for (int c = 0; c < Shape::PANELS; c++)
                    tensor_load(shared.k[stage] + c * Shape::PANEL, maps.k, full, 64 * c, key, kv_head, b);
                full = shared.ring_v.fill(n, Shape::PANELS * G * 1024);
                for (int c = 0; c < Shape::PANELS; c++)
                    tensor_load(shared.v[stage] + c * Shape::PANEL, maps.v, full, 64 * c, key, kv_head, b);
            }
        }
    } else {
        registers_take<240>();
        const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int row = first + 64 * group + 16 * warp + lane / 4;
        const int position[2] = {history + row, history + row + 8};
        const int behind = blocks.view(first + 64 * group, history).behind;
        const int64_t head = int64_t(b) * p.heads + h;
        const float scale = p.scale * LOG2_E;
        float lse[2], delta[2];
        load_row_values(p, head, row, lse, delta);
        float s[4 * G], dp[4 * G], dq[D / 2] = {};
        uint32_t ds[4][4];
        if (G < 8) clear_last_rows(shared.k, threadIdx.x - 128);
        barrier_wait(&shared.q_full, 0);
        InnerSoftmax<G> inner;
        auto scores = [&](int n) {
            shared.ring_k.wait(n);
            products_begin();
            issue_abt<T, D>(s, shared.q[group], Shape::PANEL, shared.k[n % Shape::STAGES], Shape::PANEL);
            products_commit();
            shared.ring_v.wait(n);
            products_begin();
            issue_abt<T, D>(dp, shared.dout[group], Shape::PANEL, shared.v[n % Shape::STAGES], Shape::PANEL);
            products_commit();
        };
        auto softmax = [&](int n) {
            const Block block = blocks.at(n);
            if (n >= behind)
                inner.template run<true, REGULAR>(s, block, position, scale);
            else
                inner.template run<false, REGULAR>(s, block, position, scale);
        };
        auto add = [&](int n) {
            products_begin();
            const uint64_t k = descriptor_transposed(shared.k[n % Shape::STAGES], Shape::PANEL);
#pragma unroll
            for (int i = 0; i < 4; i++) wgmma<T, true>(dq, ds[i], advance(k, i * 2048), 1);
            products_commit();
        };
        scores(0);
        products_wait<0>();
        settle(s), settle(dp);
        shared.ring_v.release(0);
        softmax(0);
        for (int n = 0; n + 1 < seen; n++) {
            gradients<G>(s, dp, inner, lse, delta);
            pack_operand<T, G>(ds, dp);
            scores(n + 1);
            add(n);
            products_wait<2>();
            settle(s);
            softmax(n + 1);
            products_wait<0>();
            settle(dp), settle(dq);
            shared.ring_k.release(n);
            shared.ring_v.release(n + 1);
        }
        gradients<G>(s, dp, inner, lse, delta);
        pack_operand<T, G>(ds, dp);
        add(seen - 1);
        products_wait<0>();
        settle(dq);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int t = row + 8 * r;
            if (t >= p.q_len) continue;
            uint32_t *line = reinterpret_cast<uint32_t *>(static_cast<T *>(p.dq) + (head * p.q_len + t) * D);
#pragma unroll
            for (int n = 0; n < D / 8; n++) line[n * 4 + lane % 4] = pack<T>(dq[4 * n + 2 * r] * p.scale, dq[4 * n + 2 * r + 1] * p.scale);
        }
    }
}

template <int D> struct HopperKeyGradient {
    static constexpr int ROWS = 64, STAGES = 3, PANELS = D / 64, PANEL = 64 * 128, BYTES_TILE = PANELS * PANEL;
    struct Shared {
        unsigned char k[CONSUMERS][BYTES_TILE], v[CONSUMERS][BYTES_TILE];
        unsigned char q[STAGES][BYTES_TILE], dout[STAGES][BYTES_TILE];
        unsigned char weights[CONSUMERS][PANEL], ds[CONSUMERS][PANEL];
        Ring<STAGES> ring;
        uint64_t keys_full;
    };
    static constexpr int BYTES = sizeof(Shared) + 1024;
};

// 64 rows of G groups into a swizzled panel, columns beyond as zeros.
template <typename T, int G> __device__ __forceinline__ void store_panel(unsigned char *panel, const float (&x)[G * 4], int warp) {
    const int lane = threadIdx.x % 32, row = 16 * warp + lane / 8 % 2 * 8 + lane % 8;
    uint32_t operand[4][4];
    pack_operand<T, G>(operand, x);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const uint32_t (&a)[4] = operand[k];
        const uint32_t to = shared_address(panel + row * 128 + ((2 * k + lane / 16) ^ row % 8) * 16);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                     : "memory");
    }
}

__device__ __forceinline__ void group_barrier(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// The groups that a block takes in the kernel of dk and dv, where a warpgroup has the same block all along.
template <int G, bool REGULAR> __device__ __forceinline__ int groups_of(const Block &block) { return !REGULAR && block.n <= 56 ? 7 : G; }

// dk and dv of a warpgroup's block in G groups. `tiles` of queries a head see it, from `first_tile` on.
template <typename T, int D, int G, bool REGULAR, typename Shared>
__device__ __forceinline__ void key_gradient(const Params &p, Shared &shared, const Block &block, int group, int b, int kv_head, int first_tile, int tiles) {
    using Shape = HopperKeyGradient<D>;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int history = p.kv_len - p.q_len, heads = p.heads / p.kv_heads, total = tiles * heads, first_key = key_of_slot_0(block, G);
    const float scale = p.scale * LOG2_E;
    float s[4 * G], dp[4 * G], dk[D / 2] = {}, dv[D / 2] = {};
    barrier_wait(&shared.keys_full, 0);
    InnerSoftmax<G> inner;
    float lse[2], delta[2];
    auto scores = [&](int n) {
        shared.ring.wait(n);
        products_begin();
        issue_abt<T, D>(s, shared.q[n % Shape::STAGES], Shape::PANEL, shared.k[group], Shape::PANEL);
        products_commit();
        products_begin();
        issue_abt<T, D>(dp, shared.dout[n % Shape::STAGES], Shape::PANEL, shared.v[group], Shape::PANEL);
        products_commit();
    };
    auto softmax = [&](int n) {
        const int step = (first_tile + n % tiles) * Shape::ROWS, row = step + 16 * warp + lane / 4;
        const int position[2] = {history + row, history + row + 8};
        load_row_values(p, int64_t(b) * p.heads + kv_head * heads + n / tiles, row, lse, delta);
        if (history + step < block.start + block.n)
            inner.template run<true, REGULAR>(s, block, position, scale);
        else
            inner.template run<false, REGULAR>(s, block, position, scale);
    };
    auto store = [&] {
        gradients<G>(s, dp, inner, lse, delta);
        group_barrier(group);  // no warp still reads the last weights
        store_panel<T, G>(shared.weights[group], s, warp);
        store_panel<T, G>(shared.ds[group], dp, warp);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        group_barrier(group);
    };
    auto add = [&](int n) {
        products_begin();
        const uint64_t weights = descriptor_transposed(shared.weights[group], Shape::PANEL), ds = descriptor_transposed(shared.ds[group], Shape::PANEL);
        const uint64_t dout = descriptor_transposed(shared.dout[n % Shape::STAGES], Shape::PANEL), q = descriptor_transposed(shared.q[n % Shape::STAGES], Shape::PANEL);
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma<T, true, true>(dv, advance(weights, i * 2048), advance(dout, i * 2048), 1);
#pragma unroll
        for (int i = 0; i < 4; i++) wgmma<T, true, true>(dk, advance(ds, i * 2048), advance(q, i * 2048), 1);
        products_commit();
    };
    if (total > 0) {
        scores(0);
        products_wait<0>();
        settle(s), settle(dp);
        softmax(0);
        for (int n = 0; n + 1 < total; n++) {
            store();
            scores(n + 1);
            add(n);
            products_wait<2>();
            settle(s);
            softmax(n + 1);
            products_wait<0>();
            settle(dp), settle(dk), settle(dv);
            shared.ring.release(n);
        }
        store();
        add(total - 1);
        products_wait<0>();
        settle(dk), settle(dv);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int slot = 16 * warp + lane / 4 + 8 * r, key = first_key + slot;
        // Of a piece of an unfinished block, the last slot is another's.
        if (key < block.start || slot >= 8 * G - (block.n == BEYOND) || key >= p.kv_len) continue;
        const int64_t to = ((int64_t(b) * p.kv_heads + kv_head) * p.kv_len + key) * D;
        uint32_t *line_k = reinterpret_cast<uint32_t *>(static_cast<T *>(p.dk) + to), *line_v = reinterpret_cast<uint32_t *>(static_cast<T *>(p.dv) + to);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            line_k[n * 4 + lane % 4] = pack<T>(dk[4 * n + 2 * r] * p.scale, dk[4 * n + 2 * r + 1] * p.scale);
            line_v[n * 4 + lane % 4] = pack<T>(dv[4 * n + 2 * r], dv[4 * n + 2 * r + 1]);
        }
    }
}

// dk and dv of two blocks of keys, one a warpgroup, over all queries that see them.
template <typename T, int D, int G, bool REGULAR>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_key_gradient_kernel(const __grid_constant__ Params p, const __grid_constant__ Maps maps) {
    using Shape = HopperKeyGradient<D>;
    extern __shared__ unsigned char memory[];
    auto &shared = *reinterpret_cast<typename Shape::Shared *>(aligned_memory(memory));

    const int b = blockIdx.z, kv_head = blockIdx.y, history = p.kv_len - p.q_len, heads = p.heads / p.kv_heads;
    const Blocks<REGULAR> blocks{p, b};
    const int first_tile = max(blocks.at(2 * blockIdx.x).start - history, 0) / Shape::ROWS;
    const int tiles = max((p.q_len + Shape::ROWS - 1) / Shape::ROWS - first_tile, 0);
    if (threadIdx.x == 0) {
        shared.ring.init(4 * CONSUMERS);
        barrier_init(&shared.keys_full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_give<24>();
        if (threadIdx.x == 0) {
            barrier_expect(&shared.keys_full, 2 * CONSUMERS * Shape::PANELS * G * 1024);
            for (int w = 0; w < CONSUMERS; w++) {
                const Block block = blocks.at(2 * blockIdx.x + w);
                const int key = key_of_slot_0(block, groups_of<G, REGULAR>(block));
                for (int c = 0; c < Shape::PANELS; c++) {
                    tensor_load(shared.k[w] + c * Shape::PANEL, maps.k, &shared.keys_full, 64 * c, key, kv_head, b);
                    tensor_load(shared.v[w] + c * Shape::PANEL, maps.v, &shared.keys_full, 64 * c, key, kv_head, b);
                }
            }
            for (int n = 0; n < tiles * heads; n++) {
                const int h = kv_head * heads + n / tiles, step = (first_tile + n % tiles) * Shape::ROWS, stage = n % Shape::STAGES;
                uint64_t *full = shared.ring.fill(n, 2 * Shape::BYTES_TILE);
                for (int c = 0; c < Shape::PANELS; c++) {
                    tensor_load(shared.q[stage] + c * Shape::PANEL, maps.q, full, 64 * c, step, h, b);
                    tensor_load(shared.dout[stage] + c * Shape::PANEL, maps.dout, full, 64 * c, step, h, b);
                }
            }
        }
    } else {
        registers_take<240>();
        const int group = threadIdx.x / 128 - 1;
        const Block block = blocks.at(2 * blockIdx.x + group);
        if (groups_of<G, REGULAR>(block) == G)
            key_gradient<T, D, G, REGULAR>(p, shared, block, group, b, kv_head, first_tile, tiles);
        else
            key_gradient<T, D, 7, REGULAR>(p, shared, block, group, b, kv_head, first_tile, tiles);
    }
}
