"""The peers of `landmark bench op --device cuda`, bf16 and causal: PyTorch's dense scaled_dot_product_attention, and other landmark
kernels where their checkouts are given.

usage: op_cuda.py THREADS JSON, JSON being {"gpu": 0, "authors": DIR or null, "olmo": DIR or null}, the folders of
flash_landmark_attention.py (epfml/landmark-attention, llama/ltriton) and of landmark_fast.py (allenai/OLMo-core, src/olmo_core/nn/attention).
Says {"torch": VERSION}, then answers every line of its input, such as
{"who": "cudnn", "shape": [4, 32, 2048, 128], "backward": true, "calls": 3}, with {"seconds": [MEAN]}, the calls being one behind the other
on the GPU, after warm-up; or with {"error": WHY}.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile


def say(**answer):
    print(json.dumps(answer), flush=True)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    say(error=str(error))
    sys.exit()

WARM_UP = 3
# A power of two: the other landmark kernels take nothing else.
BLOCK = 64


def dense(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def landmark(function):
    return lambda q, k, v: function.apply(q, k, v, 0, q.shape[3] ** -0.5, BLOCK)


def authors(folder):
    sys.path.insert(0, folder)
    return importlib.import_module("flash_landmark_attention").FusedLandmarkAttention


def olmo(folder):
    """The kernels without the model around them, which needs the whole package."""
    kernels = tempfile.mkdtemp()
    text = open(os.path.join(folder, "landmark_fast.py")).read().split("class FastLandmarkAttention")[0]
    begin, end = text.index("from olmo_core"), text.index("try:\n    import triton")
    names = "FusedLandmarkAttention, _bwd_preprocess, _fwd_kernel"
    with open(os.path.join(kernels, "olmo_fast.py"), "w") as file:
        file.write(f"{text[:begin]}from landmark_kernel import {names}\n{text[end:]}")
    with open(os.path.join(kernels, "landmark_kernel.py"), "w") as file:
        file.write(open(os.path.join(folder, "landmark_kernel.py")).read())
    sys.path.insert(0, kernels)
    return importlib.import_module("olmo_fast")._FusedLandmarkAttentionFast


class Peers:
    """What can be timed, and the tensors of the shape that is being measured."""

    def __init__(self, checkouts):
        self.backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        self.calls = dict.fromkeys(self.backends, dense)
        self.broken, self.shape = {}, None
        for who, load in ("authors", authors), ("olmo", olmo):
            if checkouts[who]:
                try:
                    self.calls[who] = landmark(load(checkouts[who]))
                except Exception as error:  # whatever someone else's module does
                    self.broken[who] = first_line(error)

    def inputs(self, shape):
        if shape != self.shape:
            self.tensors = self.outs = None
            torch.cuda.empty_cache()
            self.tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
            self.outs, self.shape = {}, shape
        return self.tensors

    def seconds(self, who, shape, backward, calls):
        if who in self.broken:
            raise RuntimeError(self.broken[who])
        call, backend = self.calls[who], self.backends.get(who)
        q, k, v, dout = self.inputs(shape)
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            if not backward:
                return timed(lambda: call(q, k, v), calls)
            if who not in self.outs:
                variables = [x.clone().requires_grad_() for x in (q, k, v)]
                self.outs[who] = call(*variables), variables
            out, variables = self.outs[who]
            return timed(lambda: torch.autograd.grad(out, variables, dout, retain_graph=True), calls)


def timed(run, calls):
    for _ in range(WARM_UP):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def main():
    torch.set_num_threads(int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    if not torch.cuda.is_available():
        return say(error="this PyTorch sees no GPU")
    torch.cuda.set_device(settings["gpu"])
    torch.manual_seed(0)
    peers = Peers(settings)
    say(torch=torch.__version__)
    for line in sys.stdin:
        try:
            say(seconds=[peers.seconds(**json.loads(line))])
        except Exception as error:  # a backend that does not take the shape, no memory, whatever someone else's kernel does
            say(error=first_line(error))


main()
