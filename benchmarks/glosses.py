"""Terms and their glosses out of Debian's dictionaries, as facts to ask for and to edit.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb DEBIAN
    python -m benchmarks.glosses --dictionary=wordnet --debian=DEBIAN --facts=F

Writes, in F (the forms are those of docs/facts.md):

    facts.jsonl      the database: a document for each term
    train.jsonl      questions about some of them
    changed.jsonl    questions about others, whose glosses are to be edited
    kept.jsonl       questions about others, which stay as they are
    edited.jsonl     the database after the edits; edits.json: the gloss before and after of each term
    removed.txt      CORPUS/ID of each edited term, for launch.prepare --remove=@F/removed.txt

The dictionaries are wordnet (nouns of one sense), foldoc and gcide. A gloss is the first clause of the
definition; terms with long ones are left out. Two kinds of edits alternate: the whole gloss becomes that
of a term which is in no document, of the same field; or its last long word becomes that of another one.
"""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from data_pipelines.questions.layout import passage_text
from data_pipelines.questions.reader import Passage
from launch.common import app
from retro_jax.errors import UserError
from retro_jax.evaluate.answers import normalised
from retro_jax.storage import files

DICTIONARY = flags.DEFINE_enum("dictionary", "wordnet", ["wordnet", "foldoc", "gcide"], "Which.")
DEBIAN = flags.DEFINE_string("debian", "", "Where the package was unpacked.")
FACTS = flags.DEFINE_string("facts", "facts", "Where the files go.")
TERMS = flags.DEFINE_integer("terms", 3000, "Documents of the database.")
TRAINED = flags.DEFINE_integer("trained", 1000, "Questions to train with.")
CHANGED = flags.DEFINE_integer("changed", 200, "Facts to edit.")
KEPT = flags.DEFINE_integer("kept", 100, "Questions about facts that stay.")

CORPUS = "glosses"
_WORDS = range(4, 11)  # of a gloss
_LONG = 5  # letters of a word that an edit replaces
_PLACES = {
    "wordnet": "usr/share/wordnet/data.noun",
    "foldoc": "usr/share/dictd/foldoc.dict.dz",
    "gcide": "usr/share/dictd/gcide.dict.dz",
}


class Fact(NamedTuple):
    """A term, its gloss, and the field that it belongs to."""

    term: str
    gloss: str
    field: str

    @property
    def document(self) -> dict[str, str]:
        """As a row of a corpus."""
        return {"id": self.term, "text": passage_text(Passage(self.term, self.gloss))}

    @property
    def question(self) -> dict[str, object]:
        """As a row of a file of questions."""
        return {"id": self.term, "question": f"what is {self.term}?", "answers": [self.gloss]}


def main() -> None:
    """Writes the files, and says how many terms there are."""
    folder = pathlib.Path(FACTS.value)
    facts = usable(read_dictionary(DICTIONARY.value, pathlib.Path(DEBIAN.value)))
    needed = TERMS.value + CHANGED.value
    if len(facts) < needed:
        raise UserError(f"{DICTIONARY.value} has {len(facts)} usable terms: expected {needed}")
    write(folder, facts)
    print(f"{folder}: {TERMS.value:,} of {len(facts):,} terms, {CHANGED.value} of them to edit")


def read_dictionary(name: str, root: pathlib.Path) -> Iterator[Fact]:
    """Every term of a dictionary with the first clause of its definition.

    Args:
      name: a key of the flag. root: where the Debian package was unpacked.

    Raises:
      UserError: the dictionary is not there.
    """
    path = root / _PLACES[name]
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the unpacked Debian package of {name}")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".dz" else data).decode(errors="replace")
    return {"wordnet": _wordnet, "foldoc": _foldoc, "gcide": _gcide}[name](text)


def usable(facts: Iterator[Fact]) -> list[Fact]:
    """The facts that can be asked for, in an order by chance: one gloss a term, one term a gloss."""
    every = list(facts)
    terms = collections.Counter(normalised(fact.term) for fact in every)
    glosses = collections.Counter(normalised(fact.gloss) for fact in every)
    kept = [
        fact
        for fact in every
        if terms[normalised(fact.term)] == glosses[normalised(fact.gloss)] == 1
        and len(fact.gloss.split()) in _WORDS
        and fact.gloss.isascii()
        and fact.term.isascii()
        and len(fact.term) > 3
        and not set(normalised(fact.term).split()) & set(normalised(fact.gloss).split())
    ]
    order = np.random.Generator(np.random.Philox(0)).permutation(len(kept))
    return [kept[i] for i in order]


def edited(fact: Fact, others: Sequence[Fact], number: int) -> tuple[str, Fact]:
    """A fact with another gloss, after the kind of the edit.

    Args:
      fact: to be edited. others: facts that are in no document; those of its field come first.
      number: of the edit. Even ones are of the kind "gloss": another's gloss without a long word of
        its own. Odd ones are of the kind "word": its last long word becomes that of another gloss.
    """
    start = 71 * number % len(others)
    turned = [*others[start:], *others[:start]]
    own = _long(fact.gloss)
    for other in sorted(turned, key=lambda other: other.field != fact.field):
        words = _long(other.gloss)
        if number % 2 and own and words and words[-1] not in normalised(fact.gloss):
            return "word", fact._replace(gloss=re.sub(rf"\b{own[-1]}\b", words[-1], fact.gloss))
        if not (number % 2 and own) and not set(own) & set(words):
            return "gloss", fact._replace(gloss=other.gloss)
    raise UserError(f"no gloss for {fact.term!r}: expected more terms than --terms")


def write(folder: pathlib.Path, facts: Sequence[Fact]) -> None:
    """Writes all files of the first TERMS facts; the glosses of edits are of the facts after them."""
    known, others = list(facts[: TERMS.value]), facts[TERMS.value :]
    first = TRAINED.value + CHANGED.value
    before = known[TRAINED.value : first]
    after = [edited(fact, others, number) for number, fact in enumerate(before)]
    changes = {new.term: new for _, new in after}
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "facts": [fact.document for fact in known],
        "edited": [changes.get(fact.term, fact).document for fact in known],
        "train": [fact.question for fact in known[: TRAINED.value]],
        "changed": [fact.question for fact in before],
        "kept": [fact.question for fact in known[first : first + KEPT.value]],
    }
    for name, values in rows.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        files.write_atomically(folder / f"{name}.jsonl", text.encode())
    edits = [
        {"term": old.term, "before": old.gloss, "after": new.gloss, "kind": kind}
        for old, (kind, new) in zip(before, after, strict=True)
    ]
    files.write_atomically(folder / "edits.json", files.to_json({"edits": edits}))
    names = "".join(f"{CORPUS}/{old.term}\n" for old in before)
    files.write_atomically(folder / "removed.txt", names.encode())


def _wordnet(text: str) -> Iterator[Fact]:
    """Noun synsets by their first word; a word of several synsets is given several times."""
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        left, _, gloss = line.partition(" | ")
        parts = left.split()
        words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
        for number, word in enumerate(words):
            clause = re.split(r'[;"(]', gloss)[0].strip(" ,:")
            yield Fact(word.replace("_", " "), clause if number == 0 else "", parts[1])


def _foldoc(text: str) -> Iterator[Fact]:
    """Entries with a field in angle brackets, to the end of the first sentence."""
    for term, body in re.findall(r"^(\S[^\n]*)\n\n((?:   [^\n]*\n|\n)+)", text, re.MULTILINE):
        found = re.match(r"<([^>]+)>\s+(.*)", " ".join(body.split()))
        if found:
            clause = re.split(r"[.;](?:\s|$)", re.sub(r"[{}]", "", found[2]))[0]
            yield Fact(term.strip(), clause.strip(), found[1].split(",")[0])


def _gcide(text: str) -> Iterator[Fact]:
    """Entries with a part of speech, to the end of the first sentence."""
    form = r"^(\S[^\n\\]*?) \\[^\n\\]+\\[^\n]*?\b(n|a|v)\.[^\n]*\n((?:   [^\n]*\n|\n)+)"
    for term, speech, body in re.findall(form, text, re.MULTILINE):
        plain = re.sub(r"\[[^\]]*\]|[{}]", "", " ".join(body.split()))
        clause = re.split(r"[.;](?:\s|$)", re.sub(r"^1\. ", "", plain.strip()))[0]
        yield Fact(term.strip(), clause.strip(), speech)


def _long(gloss: str) -> list[str]:
    """The long words of a gloss, in order."""
    return re.findall(rf"\b[a-z]{{{_LONG},}}\b", gloss)


if __name__ == "__main__":
    app.run(main)
