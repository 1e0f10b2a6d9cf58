#include "launch.cuh"

cudaError_t forward_f16(const Params &p, cudaStream_t stream) { return forward<__half>(p, stream); }
cudaError_t backward_f16(const Params &p, cudaStream_t stream) { return backward<__half>(p, stream); }
