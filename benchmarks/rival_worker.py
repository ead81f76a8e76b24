"""The other side of `train_step --against=retro-pytorch`: runs in an interpreter that has torch.

    TORCH_PYTHON benchmarks/rival_worker.py SETTINGS.json

Imports nothing of this project. Builds the package's RETRO and its own optimiser once, then answers
every line on standard input with one line of JSON. It has the loss and the clock and processor seconds
of a step (forward, backward, AdamW; or forward alone).

The package's module asks for one number of its retrieval module, which in turn asks for FAISS and
autofaiss; a stand-in gives that number. Everything measured is the package's own code.
"""

import importlib
import importlib.util
import json
import sys
import time
import types
from typing import Any

import torch


def package_modules() -> tuple[Any, Any]:
    """retro_pytorch's model and optimiser modules, without importing their unused dependencies."""
    spec = importlib.util.find_spec("retro_pytorch")
    if spec is None:
        sys.exit("retro_pytorch is not installed in this interpreter")
    package = types.ModuleType("retro_pytorch")
    package.__path__ = list(spec.submodule_search_locations or [])
    retrieval = types.ModuleType("retro_pytorch.retrieval")
    vars(retrieval)["BERT_VOCAB_SIZE"] = 28996
    sys.modules |= {"retro_pytorch": package, "retro_pytorch.retrieval": retrieval}
    model, optimizer = (
        importlib.import_module(f"retro_pytorch.{name}") for name in ("retro_pytorch", "optimizer")
    )
    return model, optimizer


class Work:
    """The model, a batch, and one step on it."""

    def __init__(self, settings: dict[str, Any]):
        torch.manual_seed(0)
        torch.set_num_threads(settings["threads"])
        self.device = "cuda" if settings["cuda"] else "cpu"
        self.forward_only = settings["forward_only"]
        module, optimizer = package_modules()
        self.model = module.RETRO(**settings["model"]).to(self.device)
        self.optimizer = optimizer.get_optimizer(self.model.parameters(), lr=2e-4, wd=0.1)
        shape, vocabulary = settings["batch"], settings["model"]["num_tokens"]
        rows, length, chunks, neighbours, size = (
            shape[name] for name in ("rows", "length", "chunks", "neighbours", "neighbour_length")
        )
        draw = {"low": 1, "high": vocabulary, "device": self.device}
        self.tokens = torch.randint(size=(rows, length + 1), **draw)
        self.retrieved = torch.randint(size=(rows, chunks, neighbours, size), **draw)

    def step(self) -> float:
        """Forward, backward and update, or forward alone; the loss."""
        if self.forward_only:
            with torch.no_grad():
                return float(self.model(self.tokens, self.retrieved, return_loss=True))
        loss = self.model(self.tokens, self.retrieved, return_loss=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def main() -> None:
    """Answers requests until the pipe closes."""
    with open(sys.argv[1]) as file:
        work = Work(json.load(file))
    work.step()
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in work.model.parameters()),
    }
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        loss = work.step()
        answer = {
            "wall": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "loss": loss,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
