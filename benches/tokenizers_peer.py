"""The peer of `landmark bench prepare`: Hugging Face tokenizers, from Python.

usage: tokenizers_peer.py THREADS TOKENIZER_JSON PATH. PATH is a text file, or a folder of .txt files, a document each. Says
{"tokenizers": VERSION}, then answers every line of its input, such as {"calls": 3}, with {"seconds": [...]}: how long encode_batch
of all documents took, each time. Reading them is not counted, and nothing is written.
"""

import json
import os
import sys
import time
from pathlib import Path


def say(**answer):
    print(json.dumps(answer), flush=True)


# It asks for them once, when it is first used.
os.environ["RAYON_NUM_THREADS"] = sys.argv[1]
os.environ["TOKENIZERS_PARALLELISM"] = "true"
try:
    import tokenizers
except ImportError as error:
    say(error=str(error))
    sys.exit()


def seconds():
    """A call."""
    start = time.perf_counter()
    tokenizer.encode_batch(texts, add_special_tokens=False)
    return time.perf_counter() - start


tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2])
path = Path(sys.argv[3])
files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
texts = [file.read_bytes().decode() for file in files]
say(tokenizers=tokenizers.__version__)
for line in sys.stdin:
    say(seconds=[seconds() for _ in range(json.loads(line)["calls"])])
