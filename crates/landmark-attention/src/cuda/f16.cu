#include "launch.cuh"

cudaError_t forward_f16(const Params &p, const Splits &splits, cudaStream_t stream) { return forward<__half>(p, splits, stream); }
cudaError_t backward_f16(const Params &p, cudaStream_t stream) { return backward<__half>(p, stream); }
