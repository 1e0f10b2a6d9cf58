"""lm-evaluation-harness (`pip install lm_eval[api] transformers`) through `/v1/completions` of `landmark serve`, and the same without a server.

usage: serve_lm_eval.py LANDMARK LOGLIKELIHOOD MODEL TEXT [--items 100]

LOGLIKELIHOOD is `cargo build --release -p landmark-inference --example loglikelihood`. The task is made of TEXT: which of four
continuations of a passage is the passage's own. Ends with an error if the scores differ, or a probability by more than 1e-4.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402


class InProcess(TemplateLM):
    """The model without a server."""

    def __init__(self, program, model, tokenizer):
        super().__init__()
        self.command, self.tokenizer = [program, model], tokenizer

    @property
    def eot_token_id(self):
        return None

    def tok_encode(self, string, **_):
        return self.tokenizer.encode(string, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests, **_):
        lines = "".join(json.dumps({"context": context, "continuation": continuation}) + "\n" for _, context, continuation in requests)
        out = subprocess.run(self.command, input=lines, capture_output=True, text=True, check=True).stdout
        return [tuple(json.loads(line)) for line in out.splitlines()]

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


def make_task(folder, text, items):
    draw = random.Random(1)
    with open(text, encoding="utf-8") as file:
        words = file.read().split()
    with open(os.path.join(folder, "items.jsonl"), "w") as file:
        for _ in range(items):
            places = draw.sample(range(200, len(words) - 20), 4)
            choices = [" " + " ".join(words[place : place + 6]) for place in places]
            target = draw.randrange(4)
            context = " ".join(words[places[target] - draw.randrange(30, 200) : places[target]])
            file.write(json.dumps({"context": context, "choices": choices, "target": target}) + "\n")
    task = {
        "task": "own_words", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": os.path.join(folder, "items.jsonl")}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{target}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    with open(os.path.join(folder, "own_words.yaml"), "w") as file:
        json.dump(task, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("landmark", "loglikelihood", "model", "text"):
        parser.add_argument(name)
    parser.add_argument("--items", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_task(folder, args.text, args.items)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(args.model, "tokenizer.json"))
        tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        command = [args.landmark, "serve", "--checkpoint", args.model, "--sessions", os.path.join(folder, "sessions"), "--port", "0", "--device", "cpu"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = "http://" + server.stdout.readline().split("http://")[1].strip()
            name = os.path.basename(os.path.normpath(args.model))
            served = {"model": name, "base_url": f"{url}/completions", "tokenizer": os.path.join(folder, "tokenizer"), "num_concurrent": 4}
            through = simple_evaluate("local-completions", model_args=served, tasks=["own_words"], task_manager=tasks, bootstrap_iters=0)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        alone = simple_evaluate(InProcess(args.loglikelihood, args.model, tokenizer), tasks=["own_words"], task_manager=tasks, bootstrap_iters=0)
    scores = [found["results"]["own_words"]["acc,none"] for found in (through, alone)]
    responses = [[[float(r[0]) for r in sample["filtered_resps"]] for sample in found["samples"]["own_words"]] for found in (through, alone)]
    off = max(abs(a - b) for one, other in zip(*responses) for a, b in zip(one, other))
    print(f"acc through /v1/completions {scores[0]:.4f}, in process {scores[1]:.4f}, of {args.items} items; log probabilities are off by at most {off:.2e}")
    sys.exit(0 if scores[0] == scores[1] and off < 1e-4 else "they differ")


if __name__ == "__main__":
    main()
