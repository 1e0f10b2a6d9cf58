"""A GGUF model here against llama.cpp, of the same file: tokens, logits, greedy continuations, perplexity.

    python benches/gguf_peer.py MODEL.gguf TEXT.txt [--peer target/release/examples/llama_peer] [--threads 2]

Needs `pip install llama-cpp-python numpy` and `cargo build --release -p landmark-cli --example llama_peer`. TEXT is a book of at least 200,000 characters.
Ends with an error if a bar is missed: 20 prompts of 100 to 1,500 tokens continue by the same greedy tokens, but from near ties on; perplexity
over 20,000 tokens within 0.5 %.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
from llama_cpp import Llama


class Peer:
    def __init__(self, path, model):
        self.process = subprocess.Popen([path, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("llama_peer ended")
        return json.loads(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--peer", default="target/release/examples/llama_peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--near_tie", type=float, default=0.25, help="logits so close may be drawn in another order")
    parser.add_argument("--perplexity_tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()

    peer = Peer(args.peer, args.model)
    llama = Llama(args.model, n_ctx=2048, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads, logits_all=True, verbose=False)
    text = open(args.text, encoding="utf-8").read()

    failed = []
    strange = "naïve café 1234567 \t\n\n  x=3.14; // — “quoted” 你好 🙂 don't DON'T 'll\r\n   end "
    for what, piece in [("book", text[:200_000]), ("strange", strange)]:
        ours = peer.ask(encode=piece)["ids"]
        theirs = llama.tokenize(piece.encode(), add_bos=False, special=False)
        print(f"tokens of the {what}: {len(ours)} here, {len(theirs)} there, {'the same' if ours == theirs else 'DIFFERENT'}")
        if ours != theirs:
            failed.append(f"tokens of the {what}")
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            print("  first at", at, repr(llama.detokenize(ours[at - 2 : at + 4])), repr(llama.detokenize(theirs[at - 2 : at + 4])))
    ids = llama.tokenize(text.encode(), add_bos=False, special=False)

    worst, same, ties, drawn = 0.0, 0, 0, 0
    begin = time.time()
    for prompt in range(args.prompts):
        length = 100 + 1400 * prompt // max(args.prompts - 1, 1)
        start = 5000 + 1600 * prompt
        context = ids[start : start + length]
        llama.reset()
        llama.eval(context)
        expected = np.array(llama.scores[len(context) - 1])
        got = np.array(peer.ask(logits=context)["logits"])
        centred = (got - got.mean()) - (expected - expected.mean())
        off = np.sqrt((centred**2).mean()) / expected.std()
        worst = max(worst, off)
        ours = peer.ask(greedy=context, tokens=args.new_tokens)
        for token, ahead in zip(ours["ids"], ours["ahead"]):
            scores = np.array(llama.scores[llama.n_tokens - 1])
            best = int(scores.argmax())
            drawn += 1
            if best == token:
                same += 1
            elif scores[best] - scores[token] <= args.near_tie:
                ties += 1
            else:
                failed.append(f"prompt {prompt}: {token} here, {best} there, which is {scores[best] - scores[token]:.3f} ahead")
            # The text goes on as ours does: each choice is compared after the same words.
            llama.eval([token])
        print(f"prompt {prompt}: {length} tokens, logits off by {off:.4f} of their deviation", flush=True)
    print(f"greedy: {same} of {drawn} the same, {ties} near ties (within {args.near_tie}); logits off by {worst:.4f} at most; {time.time() - begin:.0f} s")

    book = ids[: args.perplexity_tokens]
    ours = peer.ask(perplexity=book, window=args.window)
    loss, count = 0.0, 0
    for first in range(0, len(book), args.window):
        window = book[first : first + args.window]
        llama.reset()
        llama.eval(window[:-1])
        scores = np.array(llama.scores[: len(window) - 1], dtype=np.float64)
        scores -= scores.max(1, keepdims=True)
        lse = np.log(np.exp(scores).sum(1))
        loss += (lse - scores[np.arange(len(window) - 1), window[1:]]).sum()
        count += len(window) - 1
    assert count == ours["count"], (count, ours["count"])
    here, there = np.exp(ours["loss"] / count), np.exp(loss / count)
    print(f"perplexity of {count} tokens in windows of {args.window}: {here:.4f} here, {there:.4f} there, {100 * (here / there - 1):+.3f} %")
    if abs(here / there - 1) > 0.005:
        failed.append("perplexity")
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
