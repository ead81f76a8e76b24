"""docs/settings.md is what its program writes, and every field has a meaning."""

import dataclasses

import pytest

from tests.docs import settings


def test_the_page_is_what_the_docstrings_say():
    assert settings.PAGE.read_text(encoding="utf-8") == settings.page(), (
        "a setting or its docstring changed: run python -m tests.docs.settings"
    )


@dataclasses.dataclass
class Whole:
    """Two fields.

    Attributes:
      first, second: of this
        and the next line.
    """

    first: int = 1
    second: str | None = None


@dataclasses.dataclass
class Lacking:
    """Two fields.

    Attributes:
      first: the one.
    """

    first: int
    second: int


@dataclasses.dataclass
class Excessive:
    """One field.

    Attributes:
      first: the one.
      second: another.
    """

    first: int


def test_a_meaning_may_cover_several_fields_and_lines():
    assert settings.meanings(Whole) == dict.fromkeys(
        ("first", "second"), "of this and the next line."
    )


@pytest.mark.parametrize(
    ("cls", "problem"), [(Lacking, "no line for second"), (Excessive, "no field second")]
)
def test_a_field_without_a_meaning_or_a_meaning_without_a_field_is_refused(cls, problem):
    with pytest.raises(ValueError, match=rf"{cls.__name__}'s docstring: {problem}"):
        settings.meanings(cls)
