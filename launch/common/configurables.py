"""Configuration from gin files: the one module that knows gin.

A gin file binds fields of the dataclasses in `TABLE`:

    include 'common.gin'                      # relative to this file
    WIDTH = 896                               # a macro ...
    RetroConfig.d_model = %WIDTH              # ... and its use
    DocumentsConfig.corpora = [@wiki/CorpusConfig(), @code/CorpusConfig()]
    wiki/CorpusConfig.name = 'wiki'           # the fields of one of several

`load` reads a file and the bindings of the command line (which win). `make` builds a dataclass from
them, and `operative_config` writes out every setting of the dataclasses built. Every mistake (a
misspelt name, a value of the wrong type, bad syntax, a missing file) is a UserError with file, line
and, for a name, the nearest that exists.
"""

import dataclasses
import difflib
import functools
import importlib
import io
import os
import re
import tokenize
import types
import typing
from typing import Any, TypeVar

import gin
from absl import flags
from gin import config_parser

from launch.common import experiments
from retro_jax.errors import UserError

GIN_FILE = flags.DEFINE_string("gin_file", None, "Settings of the run, as in experiments/*.gin.")
GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "A setting that overrides the file, as in 'TrainConfig.steps = 100'."
)
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print every setting in force, and stop.")

# Which classes a gin file may bind, and where they are; imported when a configuration is loaded.
TABLE = {
    "RetroConfig": "retro_jax.config",
    "DecoderForm": "retro_jax.config",
    "ExecutionConfig": "retro_jax.config",
    "MeshConfig": "retro_jax.sharding",
    "OptimizerConfig": "retro_jax.train.optimizer",
    "TrainConfig": "retro_jax.train.loop",
    "StartConfig": "retro_jax.train.warm_start",
    "CorpusConfig": "data_pipelines.corpora.config",
    "DocumentsConfig": "data_pipelines.documents.documents",
    "LeakageConfig": "data_pipelines.leakage.near_documents",
    "TokenizerConfig": "data_pipelines.chunk_database.tokenizer",
    "KeysConfig": "data_pipelines.retriever.keys",
    "IndexConfig": "data_pipelines.retriever.index_config",
    "Bm25Config": "data_pipelines.retriever.bm25",
    "NeighboursConfig": "data_pipelines.retriever.neighbours",
    "TuneConfig": "data_pipelines.retriever.index_tuning",
    "BatchConfig": "data_pipelines.batches.batches",
}
# Gin's additions to the errors of configurables, nested ones included.
_NESTED = re.compile(r"\n  In call to configurable '(\w+)' \(.*?\)(?: in scope '(.*?)')?")
_UNSUPPLIED = re.compile(r"No values supplied by Gin or caller for arguments: \['(\w+)'")
_WIDE = 1_000_000  # keeps gin from breaking a binding over several lines

T = TypeVar("T")


@functools.cache
def configurable(name: str) -> type:
    """The dataclass of a name in TABLE, known to gin from now on."""
    cls = getattr(importlib.import_module(TABLE[name]), name)
    gin.external_configurable(cls, module="retro")
    return cls


@dataclasses.dataclass(frozen=True)
class _Macro:
    """A use of %name, resolved once everything has been read, as the last definition wins."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A use of @scope/Class(), checked and resolved with the macros."""

    scoped_name: str
    evaluate: bool


@dataclasses.dataclass
class _Reading:
    """The statements read so far; bindings by (scope, class, field), each with its file and line."""

    bindings: dict[tuple[str, str, str], tuple[Any, str]] = dataclasses.field(default_factory=dict)
    macros: dict[str, Any] = dataclasses.field(default_factory=dict)
    references: set[str] = dataclasses.field(default_factory=set)
    open_files: tuple[str, ...] = ()


class _Delegate(config_parser.ParserDelegate):
    """Gin's builder of non-literal values: both kinds stay names until all has been read."""

    def __init__(self, references: set[str]) -> None:
        self._references = references

    def macro(self, macro_name: str) -> _Macro:
        """The use of a macro."""
        return _Macro(macro_name)

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        """The use of a configurable as a value."""
        self._references.add(scoped_configurable_name)
        return _Reference(scoped_configurable_name, evaluate)


def load_from_flags() -> None:
    """Loads --gin_file and --gin_bindings."""
    load(GIN_FILE.value, GIN_BINDINGS.value)


def load(
    gin_file: str | None, bindings: typing.Sequence[str] = (), *, base: str | None = None
) -> None:
    """Replaces the configuration by that of a file and of bindings that override it.

    Args:
      gin_file: path of a gin file, or None for no file.
      bindings: statements such as "RetroConfig.d_model = 64"; a later one wins.
      base: path of a gin file that both of these override.

    Raises:
      UserError: a missing file, bad syntax, an unknown name or a value of the wrong type.
    """
    gin.clear_config()
    reading = _Reading()
    for path in filter(None, (base, gin_file)):
        _read_file(path, "--gin_file", reading)
    for binding in bindings:
        _read(binding, f"--gin_bindings={binding!r}", reading, directory=os.getcwd())
    for (scope, name, field), (value, where) in reading.bindings.items():
        if scope:
            _check_known(f"{scope}/{name}", reading.references, "scope (no @ refers to it)", where)
        value = _resolve(value, reading.macros, where)
        value = _typed(configurable(name), field, value, where)
        gin.bind_parameter((scope, name, field), value)


def override(name: str, value: Any) -> None:
    """Binds "Class.field" over what was loaded, as a flag of an entry point may ask for.

    A dataclass of TABLE as a value is a reference, and fills the fields that are left open.
    """
    configurable(name.split(".")[0])
    cls = type(value).__name__
    if cls in TABLE:
        bound = gin.get_bindings(configurable(cls), resolve_references=False)
        for field in dataclasses.fields(value):
            if field.name not in bound:
                gin.bind_parameter(f"{cls}.{field.name}", getattr(value, field.name))
        value = gin.config.ConfigurableReference(cls, True)
    gin.bind_parameter(name, value)


def bound(name: str, default: Any) -> Any:
    """What the configuration has for "Class.field", or a default."""
    cls, field = name.split(".")
    return gin.get_bindings(configurable(cls), resolve_references=False).get(field, default)


def make(cls: type[T], **defaults: Any) -> T:
    """Builds a dataclass from the configuration.

    Args:
      cls: one of TABLE.
      **defaults: values of fields that the configuration leaves open; they count as settings.

    Raises:
      UserError: a field without a value, or one that the dataclass refuses.
    """
    name = cls.__name__
    configurable(name)
    bound = gin.get_bindings(cls, resolve_references=False)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in bound:
            continue
        if field.name in defaults:
            override(f"{name}.{field.name}", defaults[field.name])
        elif field.default_factory is not dataclasses.MISSING:  # else not in operative_config
            gin.bind_parameter(f"{name}.{field.name}", field.default_factory())
        elif field.default is dataclasses.MISSING:
            raise UserError(_without_value(f"{name}.{field.name}"))
    try:
        return gin.get_configurable(cls)()
    except (UserError, TypeError) as error:
        raise _nested_error(error) from error


def operative_config() -> str:
    """Every setting of the dataclasses that `make` built, defaults included: one binding a line, sorted."""
    text = gin.operative_config_str(max_line_length=_WIDE, continuation_indent=0)
    bindings = sorted(line for line in text.splitlines() if line and not line.startswith("#"))
    return "".join(f"{line}\n" for line in bindings)


def _nested_error(error: Exception) -> Exception:
    """An error from building a configurable, in one line; others than the user's as they are."""
    message = str(error)
    nested, unsupplied = _NESTED.search(message), _UNSUPPLIED.search(message)
    if nested is None:
        return error
    scope = f"{nested[2]}/" if nested[2] else ""
    if isinstance(error, UserError):
        return UserError(scope + message[: nested.start()])
    if unsupplied is not None:
        return UserError(_without_value(f"{scope}{nested[1]}.{unsupplied[1]}"))
    return error


def _without_value(name: str) -> str:
    """The message about a field that has neither binding nor default."""
    return f"{name} has no value: expected one in the gin file, or --gin_bindings='{name} = ...'"


def _read_file(path: str, named_by: str, reading: _Reading) -> None:
    """Reads one gin file and its includes."""
    path = experiments.located(path)
    real = os.path.realpath(path)
    if real in reading.open_files:
        raise UserError(f"{named_by}: {path} includes itself")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"{named_by}: cannot read {path} ({reason}), expected a gin file"
        ) from error
    reading.open_files += (real,)
    _read(text, path, reading, directory=os.path.dirname(path))
    reading.open_files = reading.open_files[:-1]


def _read(text: str, source: str, reading: _Reading, directory: str) -> None:
    """Reads the statements of one text into `reading`; `source` names it in errors."""
    lines = text.splitlines()
    try:
        for statement in config_parser.ConfigParser(
            io.StringIO(text), _Delegate(reading.references)
        ):
            line = statement.location.line_num
            where = f"{source}:{line}" if len(lines) > 1 else source
            _apply(statement, where, reading, directory)
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        line = min(line or 1, len(lines))  # an unclosed bracket is found after the last line
        reason = str(error.args[0])
        if reason.startswith("malformed node"):
            reason = "expected a literal (a string needs quotes), %MACRO or @Class()"
        shown = lines[line - 1].strip()
        raise UserError(f"{source}:{line}: bad syntax in {shown!r}: {reason}") from error


def _apply(statement: Any, where: str, reading: _Reading, directory: str) -> None:
    """Records one statement."""
    if isinstance(statement, config_parser.IncludeStatement):
        _read_file(os.path.join(directory, statement.filename), where, reading)
    elif isinstance(statement, config_parser.ImportStatement):
        raise UserError(f"{where}: 'import' is not supported, expected bindings and includes")
    elif isinstance(statement, config_parser.BlockDeclaration):
        _check_known(statement.selector, TABLE, "configurable", where)
    elif not statement.arg_name:  # NAME = value
        reading.macros["/".join(filter(None, (statement.scope, statement.selector)))] = (
            statement.value
        )
    else:
        _check_known(statement.selector, TABLE, "configurable", where)
        fields = [field.name for field in dataclasses.fields(configurable(statement.selector))]
        _check_known(statement.arg_name, fields, f"parameter of {statement.selector}", where)
        key = (statement.scope, statement.selector, statement.arg_name)
        reading.bindings[key] = (statement.value, where)


def _check_known(name: str, names: typing.Iterable[str], kind: str, where: str = "") -> None:
    """Refuses a name that does not exist, suggesting the nearest that does."""
    names = sorted(names)
    if name in names:
        return
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"expected one of {', '.join(names)}" if names else "none is defined"
    if nearest:
        hint = f"did you mean {nearest[0]!r}?"
    raise UserError(f"{where + ': ' if where else ''}unknown {kind} {name!r}: {hint}")


def _resolve(value: Any, macros: dict[str, Any], where: str, depth: int = 0) -> Any:
    """Replaces the macros in a value, at any depth."""
    if isinstance(value, _Macro):
        _check_known(value.name, macros, "macro", where)
        if depth > len(macros):
            raise UserError(f"{where}: macro {value.name!r} is defined by itself")
        return _resolve(macros[value.name], macros, where, depth + 1)
    if isinstance(value, _Reference):
        scope, name = (["", *value.scoped_name.rsplit("/", 1)])[-2:]
        _check_known(name, TABLE, "configurable", where)
        configurable(name)
        return gin.config.ConfigurableReference(
            "/".join(filter(None, (scope, name))), value.evaluate
        )
    if isinstance(value, (list, tuple)):
        return tuple(_resolve(item, macros, where, depth) for item in value)
    if isinstance(value, dict):
        return {key: _resolve(item, macros, where, depth) for key, item in value.items()}
    return value


def _typed(cls: type, field: str, value: Any, where: str) -> Any:
    """The literal in the field's declared type; refused when it has another."""
    declared = typing.get_type_hints(cls)[field]
    if not _fits(value, declared):
        expected = declared.__name__ if isinstance(declared, type) else declared
        raise UserError(f"{where}: {cls.__name__}.{field} is {value!r}: expected {expected}")
    return float(value) if declared is float and isinstance(value, int) else value


def _fits(value: Any, declared: Any) -> bool:
    """Whether a value fits a declared type."""
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (tuple, list) or declared in (tuple, list):
        return isinstance(value, (tuple, list)) and all(
            _fits(item, arguments[0] if arguments else Any) for item in value
        )
    if declared in (type(None), None):
        return value is None
    if declared is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    base = origin or declared
    if isinstance(value, gin.config.ConfigurableReference):
        return issubclass(configurable(value.selector.rsplit(".", 1)[-1]), base)
    return isinstance(value, base)
