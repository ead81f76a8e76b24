"""What is put before a text, so that an embedder knows a query from a passage.

E5 was trained with "query: " and "passage: ", BGE with an instruction before queries alone. Newer folders
of sentence-transformers say so in config_sentence_transformers.json, under `prompts`:

    {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": null}
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.retriever.bert import modules_folder, read_json
from retro_jax.errors import UserError

_FILE = "config_sentence_transformers.json"
_PASSAGE = ("document", "passage", "corpus")  # as sentence-transformers looks them up


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Attributes: query, passage: texts that are put before those of the two kinds."""

    query: str = ""
    passage: str = ""

    @property
    def differ(self) -> bool:
        """Whether a chunk has another key as a query than as a passage."""
        return self.query != self.passage

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest records: nothing where there is none."""
        return {"prefixes": dataclasses.asdict(self)} if self.query or self.passage else {}

    @classmethod
    def recorded(cls, embedder: Mapping[str, Any]) -> "Prefixes":
        """Those in a manifest's description of an embedder."""
        return cls(**embedder.get("prefixes", {}))

    @classmethod
    def read(cls, folder: Path) -> "Prefixes":
        """Those of a folder of sentence-transformers; none without its file.

        Raises:
          UserError: the file is no JSON, or a prompt is no text.
        """
        path = modules_folder(folder) / _FILE
        if not path.exists():
            return cls()
        stored = read_json(path)
        prompts = stored.get("prompts") or {}
        if not (isinstance(prompts, dict) and all(isinstance(p, str) for p in prompts.values())):
            raise UserError(f"{path}: prompts is {prompts!a}: expected texts by name")
        name = stored.get("default_prompt_name")
        if name is not None and name not in prompts:
            raise UserError(
                f"{path}: default_prompt_name is {name!a}: expected one of {list(prompts)}"
            )
        usual: str = "" if name is None else prompts[name]
        passage: str = next((prompts[key] for key in _PASSAGE if key in prompts), usual)
        return cls(prompts.get("query", usual), passage)


NO_PREFIXES = Prefixes()
