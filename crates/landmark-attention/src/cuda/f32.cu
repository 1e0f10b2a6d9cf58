#include "launch.cuh"

cudaError_t forward_f32(const Params &p, const Splits &splits, cudaStream_t stream) { return forward<float>(p, splits, stream); }
cudaError_t backward_f32(const Params &p, cudaStream_t stream) { return backward<float>(p, stream); }
