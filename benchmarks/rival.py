"""The PyPI packages retro-pytorch and transformers to take turns with: processes behind two pipes."""

import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

from benchmarks.timing import Turn
from retro_jax.config import RetroConfig
from retro_jax.errors import UserError

_WORKER = pathlib.Path(__file__).with_name("rival_worker.py")
_GENERATION_WORKER = pathlib.Path(__file__).with_name("generation_worker.py")


def settings(config: RetroConfig, *, rows: int, length: int, neighbours: int) -> dict[str, Any]:
    """The package's arguments for a RETRO of the same widths, layers and batch.

    Raises:
      UserError: a size that the package cannot be given.
    """
    heads = {config.num_heads, config.encoder_num_heads}
    head_dims = {config.head_dim, config.encoder_head_dim}
    # Its encoder and decoder never see `heads`: they always have 8.
    same = heads == {8} and len(head_dims) == 1 and config.d_ff == 4 * config.d_model
    if not same or config.encoder_d_ff != 4 * config.encoder_d_model:
        raise UserError(
            f"heads {sorted(heads)} of {sorted(head_dims)}, feed-forward {config.d_ff}: retro-pytorch "
            "has 8 heads of one size and feed-forwards of 4 widths; use --preset=peer"
        )
    model = {
        "num_tokens": config.vocab_size,
        "max_seq_len": length,
        "enc_dim": config.encoder_d_model,
        "enc_depth": config.encoder_num_layers,
        "enc_cross_attn_layers": list(config.encoder_cca_layers),
        "dec_depth": config.num_layers,
        "dec_cross_attn_layers": list(config.cca_layers),
        "heads": 8,
        "dec_dim": config.d_model,
        "dim_head": config.head_dim,
        "chunk_size": config.chunk_length,
    }
    batch = {
        "rows": rows,
        "length": length,
        "chunks": length // config.chunk_length,
        "neighbours": neighbours,
        "neighbour_length": config.neighbour_length,
    }
    return {"model": model, "batch": batch}


class Rival:
    """A worker process. Its threads sleep while they wait, so that turns do not disturb each other.

    Attributes:
      facts: what it says of itself.
    """

    def __init__(self, name: str, python: str, worker: pathlib.Path, work: dict[str, Any]):
        """Starts it and waits until it has made its first step.

        Args:
          name: in messages. python: its interpreter. worker: the file that it runs.
          work: its settings; it is told the number of threads too.

        Raises:
          UserError: the interpreter is not there, or lacks a package of the worker.
        """
        self._name = name
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "settings.json"
            path.write_text(json.dumps(work | {"threads": os.cpu_count()}))
            try:
                self._process = subprocess.Popen(
                    [python, str(worker), str(path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"OMP_WAIT_POLICY": "passive"},
                )
            except OSError as error:
                raise UserError(
                    f"--rival_python={python} does not run ({error.strerror}): expected an "
                    f"interpreter with torch and {name}; --help tells how to make one"
                ) from error
            self.facts = self.ask()

    def ask(self) -> dict[str, Any]:
        """The next line of JSON."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            last = errors.strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"{self._name} stopped: {last[0]}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """The answer to one step over there."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.ask()

    def turn(self) -> Turn:
        """One step over there, timed over there."""
        answer = self.step()
        return Turn(answer["wall"], answer["processor"])

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


class RetroPytorch(Rival):
    """The package's RETRO, training or reading."""

    def __init__(self, python: str, work: dict[str, Any], *, forward_only: bool, cuda: bool):
        """As for Rival; `work` is that of `settings`."""
        work = work | {"forward_only": forward_only, "cuda": cuda}
        super().__init__("retro-pytorch", python, _WORKER, work)


class Transformers(Rival):
    """transformers' generation with its own cache, greedily."""

    def __init__(self, python: str, folder: pathlib.Path, prompts: list[list[int]], *, tokens: int):
        """As for Rival.

        Args:
          folder: a model in Hugging Face's layout. prompts: of equal length, continued together.
          tokens: that each is continued by.
        """
        work = {"folder": str(folder), "prompts": prompts, "tokens": tokens}
        super().__init__("transformers", python, _GENERATION_WORKER, work)
