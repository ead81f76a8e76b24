"""A small random BERT as a Hugging Face folder, for tests that need some BERT."""

import json
import pathlib
import string

import numpy as np
from safetensors.numpy import save_file

_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "def", "return", "lobster", "crust", "##acean"]
VOCABULARY += [*_CHARACTERS, *(f"##{c}" for c in _CHARACTERS)]

CONFIG = {
    "model_type": "bert",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def weights(config=CONFIG, seed=0) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face's names; none of them is left at what it would start as."""
    rng = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
    }
    dense = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in dense.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (width,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (width,)
    arrays = {}
    for name, shape in shapes.items():
        centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        arrays[name] = (centre + 0.5 * rng.normal(size=shape)).astype(np.float32)
    return arrays


def write(folder: pathlib.Path, *, config=CONFIG, arrays=None, prefix="", normalise=True):
    """Writes the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = weights(config) if arrays is None else arrays
    save_file({prefix + n: a for n, a in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    if normalise:
        (folder / "modules.json").write_text(json.dumps(MODULES))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    return folder


def tokenizer_json(**changes) -> str:
    """As transformers 5 saves a BERT's tokeniser; it writes no vocab.txt.

    Args:
      **changes: PART__FIELD=value.
    """
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    normalizer |= {"strip_accents": None, "lowercase": True}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100}
    model["vocab"] = {piece: i for i, piece in enumerate(VOCABULARY)}
    stored = {"version": "1.0", "normalizer": normalizer, "model": model}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        stored[part][field] = value
    return json.dumps(stored)
