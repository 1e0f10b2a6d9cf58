// Forward on Hopper, for blocks of at most 64, regular ones of 49 to 64 without a table: 128 queries a block of threads, 64 a warpgroup, two blocks of keys at a time. The
// scores of the next two blocks are computed while the values of the last two are added.
#pragma once
#include "hopper.cuh"

template <int D, int G> struct HopperForward {
    static constexpr int ROWS = 128, KEYS = 16 * G, STAGES = 2, PANELS = D / 64;
    static constexpr int Q_PANEL = 64 * 128, Q_BYTES = PANELS * Q_PANEL, KEY_PANEL = KEYS * 128, KEY_BYTES = PANELS * KEY_PANEL;
    struct Shared {
        unsigned char q[CONSUMERS][Q_BYTES];
        unsigned char k[STAGES][KEY_BYTES], v[STAGES][KEY_BYTES];
        Ring<STAGES> ring_k, ring_v;
        uint64_t q_full;
    };
    static constexpr int BYTES = sizeof(Shared) + 1024;
};

// Powers of two blocks to weights relative to the running maximum, which they raise.
template <int G, bool MASKED, bool REGULAR>
__device__ __forceinline__ void absorb_pair(float (&s)[8 * G], const Block (&blocks)[2], const int (&position)[2], float scale,
                                            float (&m)[2], float (&sum)[2], float (&fade)[2]) {
    InnerSoftmax<G> inner[2];
#pragma unroll
    for (int u = 0; u < 2; u++)
        inner[u].template run<MASKED, REGULAR>(reinterpret_cast<float(&)[4 * G]>(s[u * 4 * G]), blocks[u], position, scale);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float high = m[r];
#pragma unroll
        for (int u = 0; u < 2; u++) high = fmaxf(high, inner[u].past[r] ? inner[u].landmark[r] : inner[u].max[r]);
        fade[r] = power2(m[r] - high);
        m[r] = high;
        float total = sum[r] * fade[r];
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const bool past = inner[u].past[r];
            const float share = power2((past ? inner[u].landmark[r] : inner[u].max[r]) - high);
            const float factor = past ? share * inverse_of(inner[u].sum[r]) : share;
            total += past ? share : share * inner[u].sum[r];
#pragma unroll
            for (int i = 0; i < G; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) s[(u * G + i) * 4 + 2 * r + e] *= factor;
        }
        sum[r] = total;
    }
}

template <typename T, int D, int G, bool REGULAR>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) hopper_forward_kernel(const __grid_constant__ Params p, const __grid_constant__ Maps maps) {
    using Shape = HopperForward<D, G>;
    extern __shared__ unsigned char memory[];
    auto &shared = *reinterpret_cast<typename Shape::Shared *>(aligned_memory(memory));

    const int b = blockIdx.z, h = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * Shape::ROWS;
    const int history = p.kv_len - p.q_len;
    const Blocks<REGULAR> blocks{p, b};
    const int pairs = (blocks.view(min(first + 64, p.q_len - 1), history).seen + 1) / 2;
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
            barrier_expect(&shared.q_full, CONSUMERS * Shape::Q_BYTES);
            for (int w = 0; w < CONSUMERS; w++)
                for (int c = 0; c < Shape::PANELS; c++)
                    tensor_load(shared.q[w] + c * Shape::Q_PANEL, maps.q, &shared.q_full, 64 * c, first + 64 * w, h, b);
            for (int n = 0; n < pairs; n++) {
                const int pair = pairs - 1 - n, keys[2] = {key_of_slot_0(blocks.at(2 * pair), G), key_of_slot_0(blocks.at(2 * pair + 1), G)};
                uint64_t *full = shared.ring_k.fill(n, Shape::KEY_BYTES);
                for (int i = 0; i < 2 * Shape::PANELS; i++)
                    tensor_load(shared.k[n % Shape::STAGES] + i / 2 * Shape::KEY_PANEL + i % 2 * Shape::KEY_PANEL / 2, maps.k, full,
                                i / 2 * 64, keys[i % 2], kv_head, b);
                full = shared.ring_v.fill(n, Shape::KEY_BYTES);
                for (int i = 0; i < 2 * Shape::PANELS; i++)
                    tensor_load(shared.v[n % Shape::STAGES] + i / 2 * Shape::KEY_PANEL + i % 2 * Shape::KEY_PANEL / 2, maps.v, full,
                                i / 2 * 64, keys[i % 2], kv_head, b);
            }
        }
    } else {
        registers_take<240>();
        const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int row = first + 64 * group + 16 * warp + lane / 4;
        const int position[2] = {history + row, history + row + 8};
        const int pairs_behind = blocks.view(first + 64 * group, history).behind / 2;
        const float scale = p.scale * LOG2_E;
        float s[8 * G], out[D / 2], m[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0, 0}, fade[2];
        uint32_t weights[G][4];
        auto scores = [&](int n) {
            shared.ring_k.wait(n);
            products_begin();
            issue_abt<T, D>(s, shared.q[group], Shape::Q_PANEL, shared.k[n % Shape::STAGES], Shape::KEY_PANEL);
            products_commit();
        };
        auto values = [&](int n) {
            shared.ring_v.wait(n);
            products_begin();
            const uint64_t v = descriptor_transposed(shared.v[n % Shape::STAGES], Shape::KEY_PANEL);
#pragma unroll
            for (int k = 0; k < G; k++) wgmma<T, true>(out, weights[k], advance(v, k * 2048), n > 0 || k > 0);
            products_commit();
        };
        auto absorb = [&](int n) {
            const int pair = pairs - 1 - n;
            const Block two[2] = {blocks.at(2 * pair), blocks.at(2 * pair + 1)};
            if (pair >= pairs_behind)
                absorb_pair<G, true, REGULAR>(s, two, position, scale, m, sum, fade);
            else
                absorb_pair<G, false, REGULAR>(s, two, position, scale, m, sum, fade);
        };
        barrier_wait(&shared.q_full, 0);
        scores(0);
        products_wait<0>();
        settle(s);
        shared.ring_k.release(0);
        absorb(0);
        pack_operand<T, 2 * G>(weights, s);
        for (int n = 1; n < pairs; n++) {
            scores(n);
            values(n - 1);
            products_wait<1>();
            settle(s);
            shared.ring_k.release(n);
            absorb(n);
            products_wait<0>();
            settle(out);
            shared.ring_v.release(n - 1);
#pragma unroll
            for (int i = 0; i < D / 2; i++) out[i] *= fade[i / 2 % 2];
            pack_operand<T, 2 * G>(weights, s);
        }
        values(pairs - 1);
        products_wait<0>();
        settle(out);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int t = row + 8 * r;
            if (t >= p.q_len) continue;
            const int64_t to = (int64_t(b) * p.heads + h) * p.q_len + t;
            const float inverse = sum[r] > 0 ? 1 / sum[r] : 0;
            uint32_t *line = reinterpret_cast<uint32_t *>(static_cast<T *>(p.out) + to * D);
#pragma unroll
            for (int n = 0; n < D / 8; n++) line[n * 4 + lane % 4] = pack<T>(out[4 * n + 2 * r] * inverse, out[4 * n + 2 * r + 1] * inverse);
            if (lane % 4 == 0) p.lse[to] = (m[r] + log2f(sum[r])) * 0.6931471805599453f;
        }
    }
}
