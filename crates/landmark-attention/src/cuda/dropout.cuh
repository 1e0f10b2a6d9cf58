// Which weights fall: the hash of `cpu/dropout.rs` of the seed and the place, so that forward and backward agree, a GPU drops what the CPU
// does, and nothing is stored.
#pragma once
#include "params.h"

// The finaliser of MurmurHash3.
__device__ __forceinline__ uint32_t mix(uint32_t x) {
    x = (x ^ 0x9e3779b9u) ^ (x >> 16);
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// The draw of one head of one row.
struct Draw {
    const Dropout &dropout;
    uint32_t key;

    __device__ Draw(const Params &p, int b, int h)
        : dropout(p.dropout), key(mix(dropout.seed_low ^ mix(dropout.seed_high ^ mix(uint32_t(b) ^ mix(uint32_t(h)))))) {}

    __device__ bool drops() const { return dropout.weights | dropout.groups; }

    // Multiplies what belongs to the unit's weights by 0, or by what makes up for the weights that fall. A query's own block never falls as a
    // whole, nor is it scaled for those that do, as in the authors' code. A call with copies, so that kernels without dropout keep their
    // registers.
    __device__ __forceinline__ void apply(float (&x)[GROUPS][4], const Unit &unit, const int (&position)[2]) const {
        Copies copies{{}, unit, {position[0], position[1]}};
#pragma unroll
        for (int i = 0; i < 4 * GROUPS; i++) copies.x[i / 4][i % 4] = x[i / 4][i % 4];
        multiply(copies);
#pragma unroll
        for (int i = 0; i < 4 * GROUPS; i++) x[i / 4][i % 4] = copies.x[i / 4][i % 4];
    }

  private:
    struct Copies {
        float x[GROUPS][4];
        Unit unit;
        int position[2];
    };

    __device__ __noinline__ void multiply(Copies &copies) const {
        auto &[x, unit, position] = copies;
        const int t = threadIdx.x % 4;
        float share[2] = {1, 1};
#pragma unroll
        for (int i = GROUPS - 1; i >= 0; i--) {
            const Group group = unit.groups[i];
            if ((group.flags & SEGMENT_END) && dropout.groups) {
                const bool part = unit.long_block >= 0, closes = group.flags & LANDMARK;
                const int landmark = part ? unit.landmark : group.start + group.count - 1;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const bool is_earlier = (part || closes) && position[r] > landmark;
                    share[r] = is_earlier ? factor(mix(~key ^ mix(landmark)), position[r], dropout.groups, dropout.groups_kept) : 1.f;
                }
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float kept = factor(mix(key ^ mix(group.start + 2 * t + (e & 1))), position[e / 2], dropout.weights, dropout.weights_kept);
                x[i][e] *= share[e / 2] * kept;
            }
        }
    }

    static __device__ float factor(uint32_t key, int position, uint32_t threshold, float kept) {
        return mix(key ^ uint32_t(position)) >= threshold ? kept : 0.f;
    }
};
