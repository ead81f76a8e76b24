"""Writes docs/settings.md: every field of the configuration dataclasses, from their docstrings.

python -m tests.docs.settings
"""

import dataclasses
import inspect
import pathlib
import re
import types
import typing

from launch.common.configurables import TABLE, configurable

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "settings.md"
_INTRODUCTION = """\
<!-- written by: python -m tests.docs.settings -->

# Settings

A gin file under `experiments/`, or one of your own, sets fields of these classes. The command line
overrides a file with `--gin_bindings="Class.field = value"`. Each command reads the classes that it
needs, and reports a misspelt name, a wrong type or a bad value before it does any work.
`python -m launch.train --print_config` prints every setting in force, defaults included.

This page is written from the classes' docstrings, and a test keeps it true.
"""
_HEADER = "| field | type | default | meaning |\n|---|---|---|---|"
_ENTRY = re.compile(r"  (\w+(?:, \w+)*): (.*)")


def page() -> str:
    """The text of docs/settings.md.

    Raises:
      ValueError: a field has no line in its class's docstring, or a line names no field.
    """
    return "\n".join([_INTRODUCTION, *(_section(configurable(name)) for name in TABLE)])


def meanings(cls: type) -> dict[str, str]:
    """What the Attributes section of a dataclass's docstring says of each field.

    Raises:
      ValueError: a field is missing there, or an entry names no field.
    """
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in section.split("\n\n")[0].splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry is not None:
            names = entry[1].split(", ")
            entries |= dict.fromkeys(names, entry[2])
        else:
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
    fields = {field.name for field in dataclasses.fields(cls)}
    for problem, of in (
        ("no line for", fields - set(entries)),
        ("no field", set(entries) - fields),
    ):
        if of:
            raise ValueError(f"{cls.__name__}'s docstring: {problem} {', '.join(sorted(of))}")
    return entries


def _section(cls: type) -> str:
    """One class: its first paragraph and the table of its fields."""
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    about = [text for text in paragraphs if not text.startswith("Attributes:")]
    types_by_name, said = typing.get_type_hints(cls), meanings(cls)
    rows = [
        f"| `{field.name}` | {_type(types_by_name[field.name])} | {_default(field)} |"
        f" {_cell(said[field.name])} |"
        for field in dataclasses.fields(cls)
    ]
    where = f"In `{cls.__module__}`."
    return "\n".join([f"## {cls.__name__}\n", *about, "", where, "", _HEADER, *rows, ""])


def _type(declared: typing.Any) -> str:
    """A type as a reader of gin files knows it."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in arguments)
    if declared in (None, type(None)):
        return "None"
    if arguments:
        inner = ", ".join("..." if each is Ellipsis else _type(each) for each in arguments)
        return f"{origin.__name__.lower()}[{inner}]"
    return declared.__name__


def _default(field: dataclasses.Field) -> str:
    """The default as gin writes it."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "required"


def _cell(text: str) -> str:
    """Text that keeps to its cell: a whole sentence without bars, `*` of patterns as they are."""
    first = text.split()[0].rstrip(",:")
    text = (
        text[0].upper() + text[1:] if first.isalpha() and (len(first) > 1 or first == "a") else text
    )
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").rstrip(".") + "."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
