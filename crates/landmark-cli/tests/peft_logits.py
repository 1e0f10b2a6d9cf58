"""Logits of an adapter beside its base in peft, and of the merged model in transformers."""

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

LANDMARK = 257

ids = torch.tensor([[72, 101, 108, 108, 111, 44, 32, 73, 115, 104, 109, 97, 101, 108, 46]])
base = LlamaForCausalLM.from_pretrained("base", dtype=torch.float32)
base.resize_token_embeddings(LANDMARK + 1, mean_resizing=False)
model = PeftModel.from_pretrained(base, "whole").eval()
# The folder says model_type llama_with_landmark, which is the authors' own class; its weights are a LLaMA's.
merged = LlamaForCausalLM.from_pretrained("merged", dtype=torch.float32).eval()
with torch.no_grad():
    landmark = model.get_input_embeddings()(torch.tensor([LANDMARK]))[0]
    save_file(
        {
            "ids": ids,
            "adapter": model(ids).logits.contiguous(),
            "merged": merged(ids).logits.contiguous(),
            "landmark": landmark.contiguous(),
        },
        "logits.safetensors",
    )
