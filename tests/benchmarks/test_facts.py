"""Facts out of dictionaries, their edits, and what counts as following one."""

import gzip
import json

import pytest

from benchmarks import facts, glosses
from launch.common import app

WORDNET = """  1 This line is of the licence
00000001 04 n 02 foray 0 raid 0 001 @ 00975452 n 0000 | a sudden short attack; "they went on a foray"
00000002 04 n 01 swoop_down 1 000 | a very rapid raid on something (of birds)
00000003 04 n 01 raid 0 000 | an attack by police on a place
"""
FOLDOC = """
16650

   <hardware> A version of the {16550A} {UART} with a
   {FIFO}.  Superseded by the {16750C}.

no field

   Nothing.

"""
GCIDE = """
Affear \\Af*fear"\\, v. t. [OE. aferen, AS. [=a]f?ran.]
   To frighten or make afraid. [Obs.] --Spenser.
   [1913 Webster]

"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "wordnet",
            WORDNET,
            [
                ("foray", "a sudden short attack"),
                ("raid", ""),
                ("swoop down", "a very rapid raid on something"),
                ("raid", "an attack by police on a place"),
            ],
        ),
        ("foldoc", FOLDOC, [("16650", "A version of the 16550A UART with a FIFO")]),
        ("gcide", GCIDE, [("Affear", "To frighten or make afraid")]),
    ],
)
def test_terms_and_glosses_are_read(tmp_path, name, text, expected):
    path = (
        tmp_path
        / {
            "wordnet": "usr/share/wordnet/data.noun",
            "foldoc": "usr/share/dictd/foldoc.dict.dz",
            "gcide": "usr/share/dictd/gcide.dict.dz",
        }[name]
    )
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode() if name == "wordnet" else gzip.compress(text.encode()))
    found = list(glosses.read_dictionary(name, tmp_path))
    assert [(fact.term, fact.gloss) for fact in found] == expected
    usable = {fact.term for fact in glosses.usable(iter(found))}
    assert "raid" not in usable and (name != "wordnet" or "swoop down" in usable)


def test_edits_change_the_database_and_nothing_else(tmp_path, capsys):
    lines = "".join(
        f"{i:08d} {i % 3:02d} n 01 term{i} 0 000 | one kind of a {w}\n"
        for i, w in enumerate(f"{a}{b}{c}xyzw" for a in "abcd" for b in "efgh" for c in "ijkl")
    )
    (tmp_path / "usr/share/wordnet").mkdir(parents=True)
    (tmp_path / "usr/share/wordnet/data.noun").write_text(lines)
    flags = [f"--debian={tmp_path}", f"--facts={tmp_path / 'F'}", "--terms=40", "--trained=20"]
    assert app.execute(glosses.main, ["glosses", *flags, "--changed=6", "--kept=10"]) == 0
    rows = {
        name: [json.loads(line) for line in (tmp_path / "F" / f"{name}.jsonl").open()]
        for name in ("facts", "edited", "train", "changed", "kept")
    }
    assert {name: len(values) for name, values in rows.items()} == {
        "facts": 40,
        "edited": 40,
        "train": 20,
        "changed": 6,
        "kept": 10,
    }
    edits = json.loads((tmp_path / "F" / "edits.json").read_text())["edits"]
    assert [edit["kind"] for edit in edits] == ["gloss", "word"] * 3
    different = [old["id"] for old, new in zip(rows["facts"], rows["edited"]) if old != new]
    assert different == [edit["term"] for edit in edits] == [row["id"] for row in rows["changed"]]
    for edit, row in zip(edits, rows["changed"]):
        assert row["answers"] == [edit["before"]] != [edit["after"]]
        if edit["kind"] == "word":
            pairs = zip(edit["before"].split(), edit["after"].split(), strict=True)
            assert sum(a != b for a, b in pairs) == 1
    names = (tmp_path / "F" / "removed.txt").read_text().split()
    assert names == [f"glosses/{edit['term']}" for edit in edits]
    capsys.readouterr()
    assert app.execute(glosses.main, ["glosses", f"--debian={tmp_path}", "--terms=9000"]) == 1
    assert "wordnet has 64 usable terms: expected 9200" in capsys.readouterr().err
    assert app.execute(glosses.main, ["glosses", "--dictionary=foldoc"]) == 1
    assert "foldoc.dict.dz is missing: expected the unpacked" in capsys.readouterr().err


def test_an_answer_follows_an_edit_by_words_of_the_new_gloss():
    old, new = "a small red fruit", "a small red vessel"
    assert facts.follows("A small red vessel.", old, new)
    assert facts.follows("vessel", old, new)
    assert not facts.follows("a small red fruit", old, new)
    assert not facts.follows("a small red", old, new)  # of both
    assert not facts.follows("fruit or vessel", old, new)  # equally near


def test_steps_that_are_done_are_left_out(tmp_path):
    every = facts.steps(tmp_path, "", "x.gin")
    assert [arguments[0] for _, arguments in every] == [
        "benchmarks.glosses",
        "launch.prepare",
        "launch.prepare",
        "launch.train",
        "launch.answer",
        "launch.prepare",
        "launch.answer",
    ]
    (tmp_path / "dictionary").mkdir()
    (tmp_path / "dictionary" / "removed.txt").touch()
    assert facts.steps(tmp_path, "base", "x.gin")[2][1][0] == "launch.retrofit"
