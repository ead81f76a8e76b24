"""The first layers of a BERT as a separate model: keys of less meaning at a fraction of the cost.

For runs that measure the machinery at a size for which the whole model would take hours. Word pieces,
width, pooling and everything around them are the whole model's.
"""

import json
import pathlib
import re
import shutil

from safetensors.numpy import load_file, save_file

from data_pipelines.retriever.embedder import find_model

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def cut(model: str, layers: int, parent: pathlib.Path) -> pathlib.Path:
    """Writes the first layers of a model, unless they are there.

    Args:
      model: a packaged BERT's name, or a Hugging Face folder.
      layers: how many to keep.
      parent: where the new folder goes, named after the model and layers.

    Returns:
      The folder.
    """
    source = find_model(model)
    config = json.loads((source / _CONFIG).read_text())
    if not 0 < layers <= config["num_hidden_layers"]:
        raise SystemExit(
            f"--layers={layers}: expected 1 to {config['num_hidden_layers']}, which {model} has"
        )
    folder = parent / f"{pathlib.Path(model).name}-first-{layers}-layers"
    if (folder / _CONFIG).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.rglob("*"):  # pooling and normalisation have separate folders
        target = folder / path.relative_to(source)
        if path.suffix in (".json", ".txt") and target != folder / _CONFIG:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    weights = load_file(source / _WEIGHTS)
    subset = {name: value for name, value in weights.items() if _layer_of(name) < layers}
    save_file(subset, folder / _WEIGHTS, metadata={"format": "pt"})
    # Last: a folder that has it is whole.
    (folder / _CONFIG).write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=1))
    return folder


def _layer_of(name: str) -> int:
    """The layer that a weight belongs to; -1 for weights of every depth."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1
