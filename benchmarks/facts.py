"""Edited facts: do a fitted model's answers follow its database?

    python -m benchmarks.facts --workdir=W --debian=DEBIAN
    python -m benchmarks.facts --workdir=W --debian=DEBIAN --from_scratch

DEBIAN is an unpacked dictionary (benchmarks/glosses.py says how). The command prepares a database of
glosses with the tokeniser of SmolLM2-135M-Instruct, fits CCA on questions about some of its terms,
and asks for others. Then it edits the glosses of 200 of these in the database alone, and asks again.
Nothing is trained after the edit. After a stop, the same command goes on. With --from_scratch a RETRO of
1.6M parameters is trained on the questions alone, with a database four times as large.

It prints, and writes to W/facts.md and W/facts.json:

    asked        exact match and F1 of the answers before the edit, with retrieval on and off
    retrieved    the share of edited facts whose new document is among the passages of the question
    follows      of these, the share whose answer follows the edit: its F1 with the new gloss is above
                 that with the old one, and it contains a word that only the new gloss has
    before       the same share of the answers before the edit: what chance gives
    stays        of the facts that were not edited, the share whose answer is the same text as before
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks.glosses import CORPUS, DEBIAN, DICTIONARY
from launch.common import app, configurables
from launch.quickstart import run_steps
from retro_jax.evaluate.answers import exact_match, f1, mean_with_interval, normalised
from retro_jax.evaluate.uncertainty import plain
from retro_jax.report.answer_tables import figures
from retro_jax.report.result_files import EVALUATION, answers_file
from retro_jax.report.tables import as_text, interval, section
from retro_jax.report.views import Table
from retro_jax.retrofit.smollm2 import smollm2_path
from retro_jax.storage import files

FACTS_BASE = flags.DEFINE_string(
    "facts_base",
    None,
    "The model to fit: a folder or a .gguf file. Default: SmolLM2-135M-Instruct.",
)
FROM_SCRATCH = flags.DEFINE_bool("from_scratch", False, "Train a small RETRO, and fit no base.")

__all__ = ["DEBIAN", "DICTIONARY", "main"]  # flags of the dictionary, which --help shows too

_GIN_FILE, _SMALL_GIN_FILE = "experiments/facts.gin", "experiments/facts_small.gin"
_SMALL_TERMS = ["--terms=12000", "--trained=10000"]
# More tokens than any gloss has; two passages, as the best is the wrong one for every tenth question.
_ASKED = ["--answer_tokens=24", "--num_neighbours=2"]
_KINDS = ("gloss", "word")


def main() -> None:
    """Runs the missing steps, and writes the figures."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of the whole run"))
    base = "" if FROM_SCRATCH.value else FACTS_BASE.value or str(smollm2_path())
    gin_file = configurables.GIN_FILE.value or (_GIN_FILE if base else _SMALL_GIN_FILE)
    run_steps(steps(workdir, base, gin_file))
    result = measured(workdir)
    tables = tables_of(result)
    files.write_atomically(workdir / "facts.json", files.to_json(result))
    files.write_atomically(workdir / "facts.md", "\n\n".join(map(section, tables)).encode() + b"\n")
    for table in tables:
        print(f"\n{table.title}\n\n{as_text(table)}")
    print(f"\nwritten to {workdir}/facts.md")


def steps(workdir: pathlib.Path, base: str, gin_file: str) -> list[tuple[str, list[str]]]:
    """The steps that are not done yet: description, module and arguments of each.

    Args:
      workdir: W. base: the model to fit; "" to train from scratch. gin_file: of all settings.
    """
    facts, where = workdir / "dictionary", f"--workdir={workdir}"
    more = [f"--gin_bindings={binding}" for binding in configurables.GIN_BINDINGS.value]
    bindings = [f"--gin_file={gin_file}", *more]

    def with_path(name: str) -> list[str]:
        """Settings with the corpus in a file."""
        tokenizer = [f"--gin_bindings=TokenizerConfig.base = {base!r}"] if base else []
        path = f"--gin_bindings={CORPUS}/CorpusConfig.path = {str(facts / name)!r}"
        return [*bindings, path, *tokenizer, where]

    def ask(when: str) -> list[str]:
        """The command that asks for changed and kept facts."""
        asked = [f"--questions={n}-{when}={facts / n}.jsonl" for n in ("changed", "kept")]
        retrieval = [] if when == "before" else ["--retrieval=on"]
        return ["launch.answer", where, *_ASKED, *asked, *retrieval]

    source = [f"--dictionary={DICTIONARY.value}", f"--debian={DEBIAN.value}", f"--facts={facts}"]
    source += [] if base else _SMALL_TERMS
    fit = ["launch.retrofit", f"--base={base}"] if base else ["launch.train"]
    removed = f"--remove=@{facts / 'removed.txt'}"
    after = with_path("edited.jsonl")
    every = [
        (facts / "removed.txt", "Facts of a dictionary", ["benchmarks.glosses", *source]),
        (
            workdir / "prepare.gin",
            "The database of facts",
            ["launch.prepare", *with_path("facts.jsonl")],
        ),
        (
            workdir / "questions" / "train" / "manifest.json",
            "Questions to train with",
            ["launch.prepare", where, f"--questions=train={facts / 'train.jsonl'}"],
        ),
        (
            answers_file(workdir / EVALUATION, "changed-before"),
            "Train on the questions",
            [*fit, *with_path("facts.jsonl")],
        ),
        (answers_file(workdir / EVALUATION, "kept-before"), "Ask", ask("before")),
        (
            workdir / "revisions" / "00001" / "neighbours" / "test" / "manifest.json",
            "Edit facts in the database",
            ["launch.prepare", *after, "--append", removed],
        ),
        (answers_file(workdir / EVALUATION, "kept-after"), "Ask again", ask("after")),
    ]
    return [(title, arguments) for done, title, arguments in every if not done.exists()]


def follows(answer: str, before: str, after: str) -> bool:
    """Whether an answer follows an edit of a gloss.

    Its F1 with the new gloss is above that with the old one, and it contains a word of the new gloss
    that the old one lacks.
    """
    new = set(normalised(after).split()) - set(normalised(before).split())
    contains = bool(new & set(normalised(answer).split()))
    return contains and f1(answer, [after]) > f1(answer, [before])


def measured(workdir: pathlib.Path) -> dict[str, Any]:
    """Every figure, from the answers in W/evaluation."""
    folder = workdir / EVALUATION
    asked = {
        name: files.read_json(answers_file(folder, name))
        for name in ("changed-before", "kept-before", "changed-after", "kept-after")
    }
    edits = files.read_json(workdir / "dictionary" / "edits.json")["edits"]
    before, after = (asked[f"changed-{when}"]["questions"] for when in ("before", "after"))
    rows = []
    for edit, old, new in zip(edits, before, after, strict=True):
        assert edit["term"] == old["id"] == new["id"]
        glosses = (edit["before"], edit["after"])
        rows.append(
            edit
            | {
                "retrieved": f"{CORPUS}/{edit['term']}" in new["on"]["passages"],
                "answer_before": old["on"]["answer"],
                "answer_after": new["on"]["answer"],
                "follows": follows(new["on"]["answer"], *glosses),
                "followed_before": follows(old["on"]["answer"], *glosses),
                "exact_match": exact_match(new["on"]["answer"], [edit["after"]]),
                "f1": f1(new["on"]["answer"], [edit["after"]]),
            }
        )
    kept = [asked[f"kept-{when}"]["questions"] for when in ("before", "after")]
    same = [old["on"]["answer"] == new["on"]["answer"] for old, new in zip(*kept, strict=True)]
    return {
        "answers": {name: each["conditions"] for name, each in asked.items()},
        "model": asked["changed-after"]["model"],
        "databases": [asked[f"changed-{when}"]["database"] for when in ("before", "after")],
        "edited": {"all": edited_figures(rows)}
        | {kind: edited_figures([r for r in rows if r["kind"] == kind]) for kind in _KINDS},
        "stays": {"questions": len(same)} | plain(mean_with_interval(same)),
        "edits": rows,
    }


def edited_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of some edited facts."""
    found = [row for row in rows if row["retrieved"]]
    share = {
        "retrieved": [row["retrieved"] for row in rows],
        "follows": [row["follows"] for row in found],
        "before": [row["followed_before"] for row in found],
    }
    means = {name: plain(mean_with_interval(values)) for name, values in share.items()}
    return {"facts": len(rows), "found": len(found)} | means | figures(found)


def tables_of(result: Mapping[str, Any]) -> list[Table]:
    """The figures as two tables."""
    names = {"changed": "to be edited", "kept": "not edited"}
    asked = []
    for name, conditions in result["answers"].items():
        which, when = name.split("-")
        for condition, each in conditions.items():
            cells = [interval(each[figure], digits=3) for figure in ("exact_match", "f1")]
            asked.append([f"{names[which]}, {when}", condition, *cells])
    edited = []
    for kind, each in result["edited"].items():
        shares = [
            interval(each[name], digits=3) for name in ("retrieved", "follows", "before", "f1")
        ]
        edited.append([kind, f"{each['facts']}", *shares])
    stays = interval(result["stays"], digits=3)
    return [
        Table(
            ["facts", "retrieval", "exact match", "F1"],
            asked,
            "Asked",
            "Answers against the glosses before the edit. In brackets: 95% intervals over questions.",
        ),
        Table(
            ["edit", "facts", "retrieved", "follows", "followed before", "F1 with the new gloss"],
            edited,
            "Edited",
            f"The last three columns are of the facts that were retrieved. Answers to"
            f" {result['stays']['questions']} questions about other facts are the same text as before"
            f" in {stays} of them.",
        ),
    ]


if __name__ == "__main__":
    app.run(main)
