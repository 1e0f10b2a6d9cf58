"""The PyTorch peer of `landmark bench train`: a GPT of the same size with dense causal attention and AdamW, on the CPU.

usage: gpt_torch.py THREADS SIZES, SIZES being {"vocabulary": 8192, "width": 256, "heads": 4, "layers": 4, "length": 512}. Says
{"torch": VERSION}, then answers every line of its input, {"inputs": [[...], ...], "targets": [[...], ...], "calls": 3}, with
{"seconds": [...]}: a training step for each call. A negative target has no loss.
"""

import json
import sys
import time


def say(**answer):
    print(json.dumps(answer), flush=True)


try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    say(error=str(error))
    sys.exit()


def rotary(x, cos, sin):
    """x: [batch, heads, time, head_dim], turned in interleaved pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(c, bias=False), nn.LayerNorm(c, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(c, 4 * c, bias=False), nn.Linear(4 * c, c, bias=False)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    def __init__(self, vocabulary, width, heads, layers, length):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        d = width // heads
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
        self.cos, self.sin = angles.cos(), angles.sin()

    def loss(self, ids, targets):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def seconds(model, optimizer, ids, targets):
    start = time.perf_counter()
    loss = model.loss(ids, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - start


torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = Gpt(**json.loads(sys.argv[2]))
# The fastest of PyTorch's AdamWs on a CPU.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-3, fused=True)
say(torch=torch.__version__)
for line in sys.stdin:
    ask = json.loads(line)
    ids, targets = torch.tensor(ask["inputs"]), torch.tensor(ask["targets"])
    say(seconds=[seconds(model, optimizer, ids, targets) for _ in range(ask["calls"])])
