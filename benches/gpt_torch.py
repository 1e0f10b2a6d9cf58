"""The PyTorch peer of crates/landmark-models/examples/train_speed.rs: one GPT, the same sizes and the same work.

Prints {"tok_s": ...}: tokens per second of forward, backward and an AdamW step on random tokens, the median of the steps
after warm-up.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

parser = argparse.ArgumentParser(description=__doc__)
for name, default in dict(batch=8, time=512, vocab=8192, embd=256, heads=4, layers=4, steps=10, warmup=3).items():
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)


def rotary(x, cos, sin):
    """x: [batch, heads, time, head_dim], turned in interleaved pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c, bias=False), nn.LayerNorm(c, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(c, 4 * c, bias=False), nn.Linear(4 * c, c, bias=False)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, args.heads, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(args.vocab, args.embd)
        self.blocks = nn.ModuleList(Block(args.embd) for _ in range(args.layers))
        self.ln_f = nn.LayerNorm(args.embd, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        d = args.embd // args.heads
        angles = torch.arange(args.time)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, ids, targets):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tokens_per_second(**adamw):
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-3, **adamw)
    ids = torch.randint(args.vocab, (args.batch, args.time))
    targets = torch.randint(args.vocab, (args.batch, args.time))
    seconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return args.batch * args.time / statistics.median(seconds[args.warmup :])


best = max(tokens_per_second(foreach=True), tokens_per_second(fused=True))
print(json.dumps({"tok_s": round(best, 1), "torch": torch.__version__, "threads": args.threads}))
