"""Models of the LLaMA family here against transformers: logits of each family and each rope_scaling, and folders with landmarks that go
back to transformers.

    python benches/llama_hf.py [--peer target/release/examples/llama_peer]

Needs `pip install torch transformers` and `cargo build --release -p landmark-cli --example llama_peer`. Makes small models of random weights; ends with
an error if logits are off by more than 1e-4, or a weight, a token or a key of the configuration is not what it was.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 5
SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
             bos_token_id=1, eos_token_id=2)
ROPE = dict(rope_theta=10000.0)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, biases, one head of keys each": ("Llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=6)),
    "llama 3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64, rope_theta=5e5))),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, **ROPE))),
    "dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, **ROPE), max_position_embeddings=40)),
    "yarn": ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, **ROPE),
                           max_position_embeddings=128)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, head_dim=None)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
}


def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def ask(peer, folder, *questions):
    lines = "\n".join(json.dumps(question) for question in questions) + "\n"
    done = subprocess.run([peer, folder], input=lines, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{folder}: {done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="target/release/examples/llama_peer")
    peer = parser.parse_args().peer
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tok = tokenizer()
    ids = tok(TEXT)["input_ids"]
    known = len(tok)
    failed = []
    for name, (family, changes) in FAMILIES.items():
        for padding in [0, 20]:
            torch.manual_seed(1)
            config_class = getattr(transformers, f"{family}Config")
            model_class = getattr(transformers, f"{family}ForCausalLM")
            sizes = {key: value for key, value in {**SMALL, **changes}.items() if value is not None or key == "sliding_window"}
            config = config_class(vocab_size=known + padding, **{"max_position_embeddings": 256, **sizes})
            model = model_class(config).eval()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.copy_(torch.randn_like(weight) * (0.15 if weight.dim() == 2 else 0.3) + (weight.dim() == 1))
            here = ids[:60]
            with tempfile.TemporaryDirectory() as folder:
                base, made, back = (os.path.join(folder, part) for part in ("base", "made", "back"))
                model.save_pretrained(base)
                tok.save_pretrained(base)
                encoded, ours, saved = ask(peer, base, {"encode": TEXT}, {"all_logits": here}, {"save": made, "landmark": 15, "window": 64})
                off = (torch.tensor(ours["logits"]) - logits(model, here)).abs().max().item()
                checks = {"logits": off < 1e-4, "tokens": encoded["ids"] == ids, "landmark's id": saved["mem_id"] == known}

                # What we wrote, to transformers. It has no class of the authors' name; theirs has all that LLaMA's has.
                again = model_class.from_pretrained(made).eval()
                # transformers 5 reads a configuration of an unknown model_type with rope_scaling only if it is told of which class it is.
                tok_again = transformers.AutoTokenizer.from_pretrained(made, config=again.config)
                rows = max(known + padding, known + 1)
                before, after = model.state_dict(), again.state_dict()
                for key, weight in before.items():
                    table = key in ("model.embed_tokens.weight", "lm_head.weight")
                    kept = after[key][:known] if table else after[key]
                    checks[key] = torch.equal(kept, weight[:known] if table else weight)
                    if table:
                        mean = weight[:known].double().mean(0)
                        checks[f"landmark's row of {key}"] = (after[key][known].double() - mean).abs().max() < 1e-7 and len(after[key]) == rows
                written = json.load(open(os.path.join(made, "config.json")))
                checks["keys"] = {"mem_id": known, "mem_freq": 15, "train_context_length": 64, "include_landmark_in_loss": True}.items() <= written.items()
                checks["model_type"] = written["model_type"] == ("llama_with_landmark" if family == "Llama" else family.lower())
                checks["<landmark>"] = tok_again.convert_tokens_to_ids("<landmark>") == known and tok_again(TEXT)["input_ids"] == ids
                checks["special"] = "<landmark>" in tok_again.all_special_tokens and tok_again.decode([known], skip_special_tokens=True) == ""
                # Without landmarks in it, the text is what it was: but for one more column, the same logits.
                checks["logits again"] = (logits(again, here)[:, :known] - logits(model, here)[:, :known]).abs().max() < 1e-5
                # And back, bit for bit.
                again.save_pretrained(back)
                tok_again.save_pretrained(back)
                theirs, own = load_file(os.path.join(back, "model.safetensors")), load_file(os.path.join(made, "model.safetensors"))
                checks["weights of both folders"] = theirs.keys() == own.keys() and all(torch.equal(theirs[key], own[key]) for key in own)
                kept = json.load(open(os.path.join(back, "config.json")))
                checks["keys after transformers"] = kept.get("mem_id") == known and kept.get("mem_freq") == 15
                (last,) = ask(peer, back, {"all_logits": here})
                (first,) = ask(peer, made, {"all_logits": here})
                checks["the same model"] = last == first
            wrong = [check for check, ok in checks.items() if not ok]
            print(f"{name}, {padding} rows of padding: logits off by {off:.1e}; {len(checks)} checks, {', '.join(wrong) or 'all passed'}", flush=True)
            failed += [f"{name}: {check}" for check in wrong]
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
