"""Speed of a GGUF model here, through the landmark cache, and in llama.cpp on the same threads, in one run.

    gguf_speed.py MODEL.gguf [--lengths 512,2048,8192,32768] [--peer_tokens 8192] [--json FILE]

For each length: tokens a second of reading so many, and milliseconds of each token that is written after them (the median). llama.cpp reads with
and without flash attention, since one is faster at reading and the other at writing, and its better number counts. Its time grows with the
length: past --peer_tokens its numbers are not measured but the line through those that were (least squares, of the time of a token over its
place), and are marked with ~.

A model without landmarks gets one: what it learnt changes nothing of its speed. The tokens are random.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time

import numpy as np
from llama_cpp import Llama

BATCH = 512


def ours(args, ids):
    environment = {**os.environ, "RAYON_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen([args.peer, args.model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(n, tokens):
        question = {"speed": ids[:n], "landmark": args.mem_freq, "window": args.window, "top_k": args.top_k, "tokens": tokens}
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            sys.exit("llama_peer ended")
        return json.loads(line)

    ask(BATCH, 4)
    for n in args.lengths:
        answer = ask(n, args.new_tokens)
        yield n, n / answer["read"], 1000 * statistics.median(answer["tokens"])
    process.stdin.close()
    process.wait()


def theirs(args, ids, flash):
    """Rates and times by length, measured or on the line through what was measured."""
    most = max(n for n in args.lengths if n <= args.peer_tokens)
    llama = Llama(
        args.model, n_ctx=most + args.new_tokens + BATCH, n_batch=BATCH, n_threads=args.threads, n_threads_batch=args.threads,
        flash_attn=flash, verbose=False,
    )
    llama.eval(ids[:BATCH])
    llama.reset()
    read, written, places, seconds, spent = {}, {}, [], [], 0.0
    for first in range(0, most, BATCH):
        begin = time.perf_counter()
        llama.eval(ids[first : first + BATCH])
        took = time.perf_counter() - begin
        spent += took
        places.append(first + BATCH / 2)
        seconds.append(took / BATCH)
        n = first + BATCH
        if n in args.lengths:
            read[n] = n / spent
            times = []
            for _ in range(args.new_tokens):
                begin = time.perf_counter()
                llama.eval([ids[0]])
                times.append(time.perf_counter() - begin)
            written[n] = 1000 * statistics.median(times)
            # What was written is taken back.
            llama.n_tokens = n
            llama._ctx.kv_cache_seq_rm(-1, n, -1)
    per_place, at_once = np.polyfit(places, seconds, 1) if len(places) > 1 else (0.0, seconds[0])
    write_per_place, write_at_once = np.polyfit(list(written), list(written.values()), 1) if len(written) > 1 else (0.0, written[most])
    return {
        # The mean time of a token of the first n is that of the one in the middle.
        n: (read.get(n, 1 / (at_once + per_place * n / 2)), written.get(n, write_at_once + write_per_place * n), n in read)
        for n in args.lengths
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer", default="target/release/examples/llama_peer")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[512, 2048, 8192, 32_768])
    parser.add_argument("--peer_tokens", type=int, default=8192, help="llama.cpp reads no more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--mem_freq", type=int, default=63)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--top_k", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if any(n % BATCH for n in args.lengths) or min(args.lengths) > args.peer_tokens:
        parser.error(f"--lengths: expected multiples of {BATCH}, one of at most --peer_tokens")

    ids = [random.Random(1).randrange(100, 40_000) for _ in range(BATCH)]
    ids = [random.Random(i).choice(ids) for i in range(max(args.lengths))]
    peers = [theirs(args, ids, flash) for flash in (False, True)]
    rows = []
    print(f"{'':>8} | {'tokens a second, reading':^33} | {'ms a token, writing':^33}")
    print(f"{'tokens':>8} | {'here':>10} {'llama.cpp':>12} {'ratio':>9} | {'here':>10} {'llama.cpp':>12} {'ratio':>9}")
    for n, rate, ms in ours(args, ids):
        their_rate, their_ms = max(peer[n][0] for peer in peers), min(peer[n][1] for peer in peers)
        measured = peers[0][n][2]
        mark = "" if measured else "~"
        print(
            f"{n:>8} | {rate:>10.0f} {mark + format(their_rate, '.0f'):>12} {rate / their_rate:>8.2f}x |"
            f" {ms:>10.2f} {mark + format(their_ms, '.2f'):>12} {their_ms / ms:>8.2f}x",
            flush=True,
        )
        rows.append({
            "tokens": n, "read": rate, "write_ms": ms, "peer": "llama.cpp", "peer_measured": measured,
            "peer_read": {"plain": peers[0][n][0], "flash": peers[1][n][0]},
            "peer_write_ms": {"plain": peers[0][n][1], "flash": peers[1][n][1]},
        })
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"threads": args.threads, "mem_freq": args.mem_freq, "window": args.window, "top_k": args.top_k, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
