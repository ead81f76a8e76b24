"""Makes base_models/NAME: tiny random models of each architecture, and their logits by transformers.

For developers only; neither library is a dependency of this project. A folder begins as a config.json:
a published model's with small sizes, and "dtype" for the file. In an environment of its own:

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0
    /tmp/reference/bin/python tests/data/make_base_models.py tests/data/base_models/NAME

Every folder gets the weights as safetensors, tokens.npy [2, 24] int32 and logits.npy [2, 24, V]
float32, computed by transformers in float64. Norms, biases and embeddings are random too, so that a
mistake in any of them shows.
"""

import pathlib
import sys
import zlib

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SHARDS = {"llama": "40KB"}  # largest shard of a folder with several
_MADE = ("*.safetensors*", "*.npy")


def main(folders: list[str]) -> None:
    """Makes the weights and logits of folders that have a config.json."""
    for folder in map(pathlib.Path, folders):
        torch.manual_seed(zlib.crc32(folder.name.encode()))
        config = AutoConfig.from_pretrained(folder)
        for pattern in _MADE:
            for path in folder.glob(pattern):
                path.unlink()
        _write_weights(config, folder)
        # Read again: rotary frequencies in the file's dtype would be wrong.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        )
        tokens = torch.randint(0, config.vocab_size, (2, 24))
        with torch.inference_mode():
            exact = model.eval()(tokens).logits.numpy().astype(np.float32)
        np.save(folder / "tokens.npy", tokens.numpy().astype(np.int32))
        np.save(folder / "logits.npy", exact)
        (folder / "generation_config.json").unlink(missing_ok=True)
        print(folder.name, config.architectures, float(np.abs(exact).max()))


def _write_weights(config: AutoConfig, folder: pathlib.Path) -> None:
    """Random weights in the dtype of config.json."""
    dtype = config.dtype  # making the model changes it
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            scale, mean = (0.3, 1.0) if "norm" in key or ".ln_" in key else (0.25, 0.0)
            mean = 0.0 if key.endswith("bias") else mean
            weight.copy_(mean + scale * torch.randn_like(weight))
    shard = _SHARDS.get(folder.name, "1MB")
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


if __name__ == "__main__":
    main(sys.argv[1:])
