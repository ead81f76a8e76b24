"""W/prepare.gin: every setting of a preparation as bindings, which the commands read as their base."""

import dataclasses
from typing import Any

from data_pipelines.artefacts.manifest import SETTINGS_FILE as SETTINGS_FILE
from data_pipelines.corpora import CorpusConfig, TextCorpus
from data_pipelines.workdir.preparation import PrepareConfig


def settings_text(config: PrepareConfig) -> str:
    """One binding per line, sorted: "Class.field = value", of a corpus "NAME/CorpusConfig.field".

    Corpora in memory have no binding: a command that needs them asks for a value of
    DocumentsConfig.corpora.
    """
    parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
    lines = [line for part in parts for line in _bindings(part)]
    corpora = config.documents.corpora
    if any(isinstance(corpus, TextCorpus) for corpus in corpora):
        lines = [line for line in lines if not line.startswith("DocumentsConfig.corpora = ")]
    else:
        lines += [line for corpus in corpora for line in _bindings(corpus, f"{corpus.name}/")]
    return "".join(f"{line}\n" for line in sorted(lines))


def _bindings(config: Any, scope: str = "") -> list[str]:
    """The bindings of one dataclass."""
    name = type(config).__name__
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return [f"{scope}{name}.{field} = {_literal(value)}" for field, value in values.items()]


def _literal(value: Any) -> str:
    """A value as the file spells it; a corpus by a reference to its bindings."""
    if isinstance(value, CorpusConfig):
        return f"@{value.name}/CorpusConfig()"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
