"""Documents whose 13-gram Jaccard similarity is known, and the slow obvious way to compute it."""

import fractions
import itertools
import json

from data_pipelines.corpora import CorpusConfig
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents

WORDS = 102  # 90 grams of 13


def text(name, *, changed=0, words=WORDS):
    """Distinct words; the last `changed` are others: similarity (90 - changed) / (90 + changed)."""
    kept = [f"{name}{i}" for i in range(words - changed)]
    return " ".join(kept + [f"{name}-other{i}" for i in range(changed)])


def similarity(one, other):
    """By definition, as a fraction."""

    def grams(words):
        tuples = zip(*(words[i:] for i in range(13)))
        return set(tuples) if len(words) >= 13 else {tuple(words)} if words else set()

    a, b = grams(one.split()), grams(other.split())
    return fractions.Fraction(len(a & b), len(a | b)) if a | b else fractions.Fraction(0)


def nearest(training, held_out, threshold):
    """{id: (similarity, {ids of the nearest})} of training texts at or above a threshold."""
    found = {}
    for name, own in training.items():
        scores = {other: similarity(own, text) for other, text in held_out.items()}
        best = max(scores.values(), default=0)
        if best >= threshold:
            found[name] = best, {other for other, score in scores.items() if score == best}
    return found


def write(folder, splits, *, shard_bytes=64 << 20):
    """FOLDER/documents/{train,validation,test} of {split: {id: text}}; returns that folder."""
    corpora = []
    for split, texts in splits.items():
        path = folder / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in texts.items()))
        corpora.append(CorpusConfig(split, "jsonl", str(path), id_field="id", split=split))
    config = DocumentsConfig(tuple(corpora), shard_bytes=shard_bytes)
    prepare_documents(folder / "documents", config)
    return folder / "documents"


def mutated(rng, base, others):
    """A text with some runs of its words replaced by those of others."""
    words = base.split()
    for _ in range(int(rng.integers(0, 4))):
        start, length = int(rng.integers(len(words))), int(rng.integers(1, 8))
        words[start : start + length] = others.split()[start : start + length]
    return " ".join(itertools.chain(words))
