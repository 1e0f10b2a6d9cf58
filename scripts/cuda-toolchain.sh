#!/usr/bin/env bash
# Puts a CUDA 13.0 build toolchain (nvcc, headers, libraries to link against) under one folder, from PyPI wheels alone, for
# building with a `cuda` feature on a machine that has neither a GPU nor the toolkit. What is built runs where a driver (CUDA 13.0 or
# newer) and these libraries are; here on the CPU alone, with a stand-in for the driver that answers every call with an error.
# Usage:  eval "$(scripts/cuda-toolchain.sh)"
set -euo pipefail
root=${CUDA_TOOLCHAIN_DIR:-$HOME/.cache/cuda-13.0}
if [ ! -e "$root/.ready" ]; then
  mkdir -p "$root"
  python3 -m venv "$root/venv" >&2
  "$root/venv/bin/pip" install -q \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35 \
    ${CUDA_TOOLCHAIN_EXTRA:-} >&2
  wheel=$(echo "$root"/venv/lib/python3*/site-packages/nvidia/cu13)
  mkdir -p "$root/lib64"
  ln -sfn "$wheel/bin" "$root/bin"; ln -sfn "$wheel/include" "$root/include"; ln -sfn "$wheel/nvvm" "$root/nvvm"
  for nccl in "$root"/venv/lib/python3*/site-packages/nvidia/nccl; do
    [ -d "$nccl" ] && ln -sf "$nccl"/lib/* "$root/lib64/"
  done
  for lib in "$wheel"/lib/*; do
    name=$(basename "$lib"); ln -sf "$lib" "$root/lib64/$name"
  done
  for lib in "$root"/lib64/*.so.*; do
    ln -sf "$lib" "$(echo "$lib" | sed -E 's/\.so\.[0-9.]+$/.so/')"
  done
  # The driver library is not in any wheel: link against a stand-in that has its symbols (every cu* name in cuda.h).
  { grep -hoE '\bcu[A-Z][A-Za-z0-9_]+' "$wheel/include/cuda.h"; echo cuProfilerStart; echo cuProfilerStop; } \
    | sort -u | sed 's/.*/int &(void){return 999;}/' >"$root/libcuda_stand_in.c"
  gcc -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$root/lib64/libcuda.so" "$root/libcuda_stand_in.c"
  "$root/bin/nvcc" --version >/dev/null
  touch "$root/.ready"
fi
libraries=$root/lib64
if ! PATH=$PATH:/sbin ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; then
  mkdir -p "$root/no-driver"
  ln -sfn "$root/lib64/libcuda.so" "$root/no-driver/libcuda.so.1"
  libraries=$libraries:$root/no-driver
fi
cat <<ENV
export CUDA_HOME=$root CUDA_PATH=$root CUDA_ROOT=$root CUDA_TOOLKIT_ROOT_DIR=$root NVCC=$root/bin/nvcc
export PATH=$root/bin:\$PATH LIBRARY_PATH=$root/lib64:\${LIBRARY_PATH:-} CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
export LD_LIBRARY_PATH=$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
ENV
