"""Peers of `landmark train` on a GPU: a training step of a dense PyTorch GPT of the seed's size, compiled, and of the authors' landmark model.

usage: gpt_cuda.py [--authors DIR] [--batch 16] [--length 512]; DIR is a checkout of epfml/landmark-attention. Prints a line of JSON each.
bf16 autocast, fused AdamW, 12 layers of 1024, 8 heads, vocabulary 50304, as `landmark train --model landmark --acc_steps 1` is with its defaults.
"""

import argparse
import json
import sys
import time
import types

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LAYERS, LANDMARK, MEM_FREQ = 50304, 1024, 8, 12, 50260, 50


def rotary(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c, bias=False), nn.LayerNorm(c, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(c, 4 * c, bias=False), nn.Linear(4 * c, c, bias=False)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(rotary(q, cos, sin), rotary(k, cos, sin), v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Dense(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        d = WIDTH // HEADS
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids, targets):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def authors(folder, length):
    """Their model through their own configuration's names."""
    sys.path.insert(0, folder + "/lm_benchmark")
    # Only their generation needs it.
    sys.modules.setdefault("tiktoken", types.SimpleNamespace(get_encoding=lambda name: None))
    from models.landmark import GPTBase

    config = argparse.Namespace(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, sequence_length=length, bias=False, dropout=0.0,
        group_dropout=None, landmark_id=LANDMARK, mem_freq=MEM_FREQ, softmax_func="mem_opt", positional_encoder="rotary",
        max_groups_for_softmax=16 if length <= 512 else length // (MEM_FREQ + 1) + 2, lm_cache="none", postpone_lm_cache=False,
        enable_rem_score=False, pos_jump_on_mem=None, rem_cutoff=None, under_rem_score_prob=0.0, allow_cache_during_training=False,
        mem_cache_size=None, mem_cache_freq=None, cache_topk=1, cache_selection_method="per_token_and_head", batch_size=16,
    )  # fmt: skip
    model = GPTBase(config)
    return model, lambda m, ids, targets: m(ids, targets=targets)["loss"]


def measure(name, model, loss_of, batch, length, compiled):
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if compiled else model
    ids = torch.randint(0, 50000, (batch, length), device="cuda")
    ids[:, MEM_FREQ :: MEM_FREQ + 1] = LANDMARK
    targets = torch.randint(0, 50000, (batch, length), device="cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(run, ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(8):
        step()
    torch.cuda.synchronize()
    start, steps = time.perf_counter(), 30
    for _ in range(steps):
        step().item()
    seconds = (time.perf_counter() - start) / steps
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"peer": name, "batch": batch, "length": length, "tokens_per_second": round(batch * length / seconds),
                      "peak_GiB": round(memory, 1), "torch": torch.__version__}), flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--authors")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    measure("dense, compiled", Dense(args.length), lambda m, ids, targets: m(ids, targets), args.batch, args.length, True)
    if args.authors:
        model, loss_of = authors(args.authors, args.length)
        measure("authors' landmark model, compiled", model, loss_of, args.batch, args.length, True)
