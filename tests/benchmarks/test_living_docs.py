"""Two versions of a documentation: which files are held out, whether they are compressed or not."""

import gzip

import pytest

from benchmarks.living_docs import changed_files, earlier_versions, read_docs
from retro_jax.errors import UserError


def test_changed_files_are_those_of_both_versions_with_other_text(tmp_path):
    body = "word " * 1000
    old = {"a.rst": body, "b.rst": body, "gone.rst": body, "sub/c.rst": body, "small.rst": "x"}
    new = {
        **old,
        "a.rst": body + "more",
        "sub/c.rst": body + "c",
        "small.rst": "y",
        "new.rst": body,
    }
    del new["gone.rst"]
    for version, texts in (("old", old), ("new", new)):
        for name, text in {**texts, "translations/a.rst": version}.items():
            path = tmp_path / version / "doc" / "Documentation" / f"{name}.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(text.encode()))
    (tmp_path / "new" / "doc" / "Documentation" / "plain.rst").write_text("plain")
    found = {version: read_docs(tmp_path / version) for version in ("old", "new")}
    assert found["old"] == old and found["new"] == {**new, "plain.rst": "plain"}
    assert sorted(changed_files(found["old"], found["new"], 9)) == ["a.rst", "sub/c.rst"]
    (chosen,) = changed_files(found["old"], found["new"], 1)
    (other,) = {"a.rst", "sub/c.rst"} - {chosen}
    earlier = earlier_versions(found["old"], found["new"], without=[chosen])
    assert earlier == {name: old[name] for name in (other, "small.rst")}


def test_a_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.rst file"):
        read_docs(tmp_path)
