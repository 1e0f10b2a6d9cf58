"""Fine-tuning steps on a GPU: `landmark finetune`, LoRA and all of a model, beside transformers with SDPA, compiled.

usage: llama_cuda.py --landmark BINARY --dataset NAME --data_dir DIR [--json FILE]

A model of SmolLM2-135M's shape with random weights; the data set is one of `landmark prepare` with its tokenizer. bf16, AdamW, 32,768 positions a
step. Ours are rows of 504 and 2016 tokens, which with a landmark after every 63 are 512 and 2048 positions; theirs are as long, plain text. LoRA
is rank 16 on the projections of attention, over weights in bf16; all of a model learns in f32 under autocast, as the Trainer of transformers
has it with --bf16. Each side runs in a process of its own. Tokens per second count positions and are by the median step; memory is all that the
process holds on the GPU, at its most.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile

import torch
from gpt_cuda import in_process, timed
from torch import nn
from torch.nn import functional as F

POSITIONS, MEM_FREQ, RANK, ALPHA = 32768, 63, 16, 32
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=8192, rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Lora(nn.Module):
    """peft's linear layer: the base's result, and that of the adapter."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK)


def measure(kind, batch, length):
    """A peer in this process: prints a line of JSON."""
    torch.set_float32_matmul_precision("high")
    llama = model().cuda().train()
    if kind == "lora":
        llama = llama.bfloat16().requires_grad_(False)
        for layer in llama.model.layers:
            for name in MODULES:
                setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)).cuda())
    parameters = [p for p in llama.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    run = torch.compile(llama)
    ids = torch.randint(0, 49000, (batch, length), device="cuda")

    timed(lambda: run(input_ids=ids, labels=ids).loss, optimizer, batch * length, parameters, warm=5, steps=20)


def ours(args, kind, batch, length, base, folder):
    """`landmark finetune` for some steps: the command, and how to read what it leaves."""
    tokens = length // (MEM_FREQ + 1) * MEM_FREQ
    command = [
        args.landmark, "finetune", "--model_name_or_path", base, "--dataset", args.dataset, "--data_dir", args.data_dir, "--device", "cuda",
        "--bf16", "True", "--model_max_length", str(tokens), "--mem_freq", str(MEM_FREQ), "--per_device_train_batch_size", str(batch),
        "--max_steps", "30", "--logging_steps", "1", "--save_strategy", "no", "--output_dir", os.path.join(folder, "out"),
    ]  # fmt: skip
    if kind == "lora":
        command += ["--lora_r", str(RANK), "--lora_alpha", str(ALPHA), "--lora_target_modules", *MODULES]

    def read(_):
        with open(os.path.join(folder, "out", "metrics.jsonl")) as file:
            rows = [json.loads(line).get("tokens_per_second") for line in file]
        return statistics.median([speed for speed in rows if speed][10:])

    return command, read


def main(args):
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as base:
        llama = model()
        count = sum(p.numel() for p in llama.parameters())
        llama.save_pretrained(base)
        del llama
        named = os.path.join(args.data_dir, args.dataset)
        shutil.copy(os.path.join(named if os.path.isdir(named) else args.data_dir, "tokenizer.json"), base)
        for kind in ("lora", "full"):
            for length in (512, 2048):
                for name in ("landmark finetune", "transformers, compiled"):
                    batch = POSITIONS // length
                    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                        if name.startswith("landmark"):
                            command, read = ours(args, kind, batch, length, base, folder)
                        else:
                            command = [sys.executable, __file__, "--peer", kind, "--batch", str(batch), "--length", str(length)]
                            read = lambda out: json.loads(out.splitlines()[-1])["tokens_per_second"]
                        rows.append({"kind": kind, "side": name, "batch": batch, "length": length})
                        rows[-1].update(in_process(command, read, args.seconds))
                    print(rows[-1], file=sys.stderr, flush=True)
    import transformers

    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{', '.join(f'{name} {value}' for name, value in versions.items())}; {count:,} parameters\n")
    print("| what learns | batch x T | side | tokens/s | ms a step | GiB | ours / theirs |\n| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        speed = row.get("tokens_per_second")
        same = [other for other in rows if (other["kind"], other["length"]) == (row["kind"], row["length"])]
        mine = same[0].get("tokens_per_second")
        row["ratio"] = round(mine / speed, 3) if mine and speed and row is not same[0] else None
        cells = row["failed"] if not speed else f"{speed:,} | {1e3 * POSITIONS / speed:.1f} | {row['GiB']} | {row['ratio'] or ''}"
        print(f"| {row['kind']} | {row['batch']} x {row['length']} | {row['side']} | {cells} |")
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps({**row, **versions}) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landmark")
    parser.add_argument("--dataset", default="pg19")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=int, default=200, help="for each side; the peer compiles for a minute")
    parser.add_argument("--scratch", help="a folder on a disk with 3 GB free")
    parser.add_argument("--peer", choices=("lora", "full"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        measure(args.peer, args.batch, args.length)
    elif not args.landmark:
        parser.error("--landmark: the binary to measure")
    else:
        main(args)
