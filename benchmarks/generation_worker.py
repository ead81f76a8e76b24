"""The other side of benchmarks.generate for transformers: runs in an interpreter that has it.

    TORCH_PYTHON benchmarks/generation_worker.py SETTINGS.json

Imports nothing of this project. Loads the model once, then answers every line on standard input with
one line of JSON: seconds of a greedy continuation of all prompts, its tokens, and seconds of the
prompts with one token alone.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers


def generate(model: Any, prompts: torch.Tensor, tokens: int) -> torch.Tensor:
    """All prompts, each continued by so many tokens."""
    with torch.inference_mode():
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            use_cache=True,
            pad_token_id=0,
        )


def main() -> None:
    """Answers requests until the pipe closes."""
    with open(sys.argv[1]) as file:
        settings = json.load(file)
    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["folder"], dtype=torch.float32
    )
    model.eval()
    prompts, tokens = torch.tensor(settings["prompts"]), settings["tokens"]
    generate(model, prompts, 2)
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        generate(model, prompts, 1)
        first = time.perf_counter() - start
        wall, processor = time.perf_counter(), time.process_time()
        texts = generate(model, prompts, tokens)
        answer = {
            "wall": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "first": first,
            "tokens": texts[:, prompts.shape[1] :].tolist(),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
