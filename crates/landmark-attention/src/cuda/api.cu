// What Rust calls; the error codes are a cudaError_t.
#include <cuda_runtime.h>
#include "params.h"
#include <cuda.h>

struct Maps {
    CUtensorMap q, k, v, dout;
};
bool hopper_takes(const Params &, bool backward, Maps &);
cudaError_t hopper_forward(const Params &, const Maps &, cudaStream_t), hopper_backward(const Params &, const Maps &, cudaStream_t);

cudaError_t forward_f32(const Params &, const Splits &, cudaStream_t), backward_f32(const Params &, cudaStream_t);
cudaError_t forward_f16(const Params &, const Splits &, cudaStream_t), backward_f16(const Params &, cudaStream_t);
cudaError_t forward_bf16(const Params &, const Splits &, cudaStream_t), backward_bf16(const Params &, cudaStream_t);

static bool is_hopper() {
    int device, major = 0;
    return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

extern "C" int landmark_attention_forward_split(const Params *p, const Splits *splits, cudaStream_t stream) {
    switch (p->dtype) {
        case F32: return forward_f32(*p, *splits, stream);
        case F16: return forward_f16(*p, *splits, stream);
        case BF16: return forward_bf16(*p, *splits, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int landmark_attention_forward(const Params *p, cudaStream_t stream) {
    Maps maps;
    if (is_hopper() && hopper_takes(*p, false, maps)) return hopper_forward(*p, maps, stream);
    const Splits none = {};
    return landmark_attention_forward_split(p, &none, stream);
}

extern "C" int landmark_attention_backward(const Params *p, cudaStream_t stream) {
    Maps maps;
    if (is_hopper() && hopper_takes(*p, true, maps)) return hopper_backward(*p, maps, stream);
    switch (p->dtype) {
        case F32: return backward_f32(*p, stream);
        case F16: return backward_f16(*p, stream);
        case BF16: return backward_bf16(*p, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" const char *landmark_attention_error(int error) {
    if (error == TOO_LITTLE_SHARED_MEMORY) return "this GPU has too little shared memory for heads this wide in this dtype";
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" unsigned landmark_attention_params_size() { return sizeof(Params); }
