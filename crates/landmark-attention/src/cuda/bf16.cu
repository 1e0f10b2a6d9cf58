#include "launch.cuh"

cudaError_t forward_bf16(const Params &p, const Splits &splits, cudaStream_t stream) { return forward<__nv_bfloat16>(p, splits, stream); }
cudaError_t backward_bf16(const Params &p, cudaStream_t stream) { return backward<__nv_bfloat16>(p, stream); }
