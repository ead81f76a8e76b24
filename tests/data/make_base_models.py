"""Makes base_models/NAME: tiny random models of each architecture, and their logits by transformers.

For developers only; neither library is a dependency of this project. In an environment of its own:

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0
    /tmp/reference/bin/python tests/data/make_base_models.py

Every folder has config.json, the weights as safetensors, tokens.npy [2, 24] int32 and logits.npy
[2, 24, V] float32, computed by transformers in float64. Norms, biases and embeddings are random
too, so that a mistake in any of them shows.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 96
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    **IDS,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **IDS,
}
QWEN3 = LLAMA | {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}
# name -> class, configuration, dtype of the file, bytes of a shard
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA, rope_parameters=LLAMA3), "float32", "40KB"),
    "llama_tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA,
            rope_parameters=LINEAR,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        ),
        "bfloat16",
        "1MB",
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**LLAMA), "bfloat16", "1MB"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**QWEN3), "float16", "1MB"),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), "float32", "1MB"),
    "pythia": (GPTNeoXForCausalLM, GPTNeoXConfig(**NEOX), "float16", "1MB"),
    "neox_sequential": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            **NEOX, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new"
        ),
        "float32",
        "1MB",
    ),
}


def main() -> None:
    """Writes all folders."""
    parent = pathlib.Path(__file__).parent / "base_models"
    for seed, (name, (cls, config, dtype, shard)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        folder = parent / name
        shutil.rmtree(folder, ignore_errors=True)
        model = cls(config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                scale, mean = (0.3, 1.0) if "norm" in key or ".ln_" in key else (0.25, 0.0)
                mean = 0.0 if key.endswith("bias") else mean
                weight.copy_(mean + scale * torch.randn_like(weight))
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
        # Read again: rotary frequencies in the file's dtype would be wrong.
        model = cls.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        tokens = torch.randint(0, VOCAB, (2, 24))
        with torch.inference_mode():
            exact = model.eval()(tokens).logits.numpy().astype(np.float32)
        np.save(folder / "tokens.npy", tokens.numpy().astype(np.int32))
        np.save(folder / "logits.npy", exact)
        (folder / "generation_config.json").unlink(missing_ok=True)
        kept = json.loads((folder / "config.json").read_text())
        print(name, kept["architectures"], float(np.abs(exact).max()))


if __name__ == "__main__":
    main()
