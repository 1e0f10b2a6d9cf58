"""The PyTorch peer of `landmark bench op`: dense causal scaled_dot_product_attention on the CPU.

usage: sdpa.py THREADS. Says {"torch": VERSION}, then answers every line of its input, such as
{"length": 512, "heads": 8, "head_dim": 64, "backward": true, "calls": 3}, with {"seconds": [...]}, one for each call.
"""

import json
import sys
import time


def say(**answer):
    print(json.dumps(answer), flush=True)


try:
    import torch
    from torch.nn.functional import scaled_dot_product_attention
except ImportError as error:
    say(error=str(error))
    sys.exit()


def seconds(q, k, v, dout):
    """A call; with the backward pass if there is a gradient of its output."""
    start = time.perf_counter()
    with torch.set_grad_enabled(dout is not None):
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
    if dout is not None:
        torch.autograd.grad(out, (q, k, v), dout)
    return time.perf_counter() - start


torch.set_num_threads(int(sys.argv[1]))
say(torch=torch.__version__)
for line in sys.stdin:
    ask = json.loads(line)
    shape = 1, ask["heads"], ask["length"], ask["head_dim"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, requires_grad=ask["backward"]) for _ in range(3))
    dout = torch.ones(shape) if ask["backward"] else None
    say(seconds=[seconds(q, k, v, dout) for _ in range(ask["calls"])])
