"""Training steps on a GPU: `landmark train`, a dense PyTorch GPT of the same size, compiled, and the authors' landmark model, eager and compiled.

usage: gpt_cuda.py --landmark BINARY --dataset NAME --data_dir DIR [--authors DIR] [--json FILE]

DIR of --authors is a checkout of epfml/landmark-attention, the data set is one of `landmark prepare` with GPT-2's tokenizer. bf16 autocast, fused
AdamW, 12 layers of 1024, 8 heads, vocabulary 50304. Each side runs in a process of its own, ours and the dense one first; a side that is not done
after --seconds is named with that. Tokens per second are by the median step, ours as `landmark train` logs them; memory is all that the process
holds on the GPU, at its most.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
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


def timed(loss_of, optimizer, positions, clipped=None, warm=8, steps=40):
    """Prints tokens a second of training steps, by their median, as a line of JSON; `clipped` are parameters whose gradients are clipped to 1."""

    def step():
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - start

    for _ in range(warm):
        step()
    seconds = statistics.median(step() for _ in range(steps))
    print(json.dumps({"tokens_per_second": positions / seconds}), flush=True)


def measure(name, batch, length, folder):
    """One peer in this process: prints a line of JSON."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    if name.startswith("dense"):
        model, loss_of = Dense(length), lambda m, ids, targets: m(ids, targets)
    else:
        model, loss_of = authors(folder, length)
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if name.endswith("compiled") else model
    ids = torch.randint(0, 50000, (batch, length), device="cuda")
    ids[:, MEM_FREQ :: MEM_FREQ + 1] = LANDMARK
    targets = torch.randint(0, 50000, (batch, length), device="cuda")

    timed(lambda: loss_of(run, ids, targets), optimizer, batch * length)


def ours(args, batch, length, folder):
    """`landmark train` for some steps: the command, and how to read what it leaves."""
    command = [
        args.landmark, "train", "--dataset", args.dataset, "--data_dir", args.data_dir, "--model", "landmark", "--n_embd", str(WIDTH),
        "--n_head", str(HEADS), "--n_layer", str(LAYERS), "--batch_size", str(batch), "--sequence_length", str(length), "--acc_steps", "1",
        "--vocab_size", str(VOCABULARY), "--mem_freq", str(MEM_FREQ), "--device", "cuda", "--iterations", "80", "--eval_freq", "1000",
        "--results_base_folder", folder, "--exp_name", "speed",
    ]  # fmt: skip

    def read(_):
        with open(os.path.join(folder, args.dataset, "landmark", "speed", "metrics.jsonl")) as file:
            rows = [json.loads(line).get("tokens_per_second") for line in file]
        return statistics.median([speed for speed in rows if speed][20:])

    return command, read


def in_process(command, read, seconds):
    """Runs a side and returns tokens per second and GiB on the GPU, or why there are none."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = lambda: int(subprocess.check_output(query).split()[0])
    before, most, done = used(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.5):
            most = max(most, used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    # A session of its own, so that the processes in which PyTorch compiles end with it.
    side = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = side.communicate(timeout=seconds)
        if side.returncode:
            reason = (errors.strip() or output.strip() or "no output").splitlines()[-1]
            return {"failed": f"exit code {side.returncode}: {reason[:300]}"}
        speed = read(output)
    except subprocess.TimeoutExpired:
        os.killpg(side.pid, signal.SIGKILL)
        side.wait()
        return {"failed": f"not done after {seconds} s"}
    finally:
        done.set()
        watcher.join()
    took = time.perf_counter() - start
    return {"tokens_per_second": round(speed), "GiB": round((most - before) / 1024, 1), "seconds": round(took, 1)}


def main(args):
    def peer(name, batch, length):
        command = [sys.executable, __file__, "--peer", name, "--batch", str(batch), "--length", str(length)]
        return command + (["--authors", args.authors] if args.authors else []), lambda out: json.loads(out.splitlines()[-1])["tokens_per_second"]

    plan = [(name, *shape) for shape in ((16, 512), (4, 2048)) for name in ("landmark train", "dense, compiled")]
    if args.authors:
        plan += [("authors, eager", 16, 512), ("authors, compiled", 16, 512)]
    rows = []
    for name, batch, length in plan:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            command, read = ours(args, batch, length, folder) if name == "landmark train" else peer(name, batch, length)
            rows.append({"side": name, "batch": batch, "length": length, **in_process(command, read, args.seconds)})
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    print("| batch x T | side | tokens/s | ms a step | GiB | ours / theirs |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        shape, speed = (row["batch"], row["length"]), row.get("tokens_per_second")
        mine = next(other.get("tokens_per_second") for other in rows if (other["batch"], other["length"]) == shape)
        row["ratio"] = round(mine / speed, 3) if mine and speed else None
        cells = row["failed"] if not speed else f"{speed:,} | {1e3 * shape[0] * shape[1] / speed:.2f} | {row['GiB']} | {row['ratio'] or ''}"
        print(f"| {shape[0]} x {shape[1]} | {row['side']} | {cells} |")
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps({**row, "device": torch.cuda.get_device_name(), "torch": torch.__version__}) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landmark")
    parser.add_argument("--dataset", default="pg19")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--authors")
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=int, default=300, help="for each side; the authors' code takes minutes to compile")
    parser.add_argument("--scratch", help="a folder on a disk with 3 GB free")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        measure(args.peer, args.batch, args.length, args.authors)
    elif not args.landmark:
        parser.error("--landmark: the binary to measure")
    else:
        main(args)
