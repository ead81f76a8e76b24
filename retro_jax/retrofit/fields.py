"""Values of a config.json or of a GGUF's metadata, each checked when it is read."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from retro_jax.errors import UserError

_REQUIRED = object()


class Fields:
    """A mapping with types; every error names the file, the field, its value and the expected one."""

    def __init__(self, values: Mapping[str, Any], path: str):
        self.values, self.path = values, path

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """An integer; the default, of any type, where the field is absent or null."""
        return self._typed(
            name, default, "an integer", lambda v: _is_number(v) and v == int(v), int
        )

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number as float."""
        return self._typed(name, default, "a number", _is_number, float)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._typed(name, default, "true or false", lambda v: isinstance(v, bool), bool)

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._typed(name, default, "a string", lambda v: isinstance(v, str), str)

    def one_of(self, name: str, known: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """The value in `known` for the string of a field."""
        value = self.text(name, default)
        if value not in known:
            raise self.error(name, f"one of {sorted(known)}")
        return known[value]

    def only(self, name: str, value: Any) -> None:
        """Refuses another value than this one, which is also the meaning of an absent field."""
        if self.values.get(name, value) not in (value, None):
            raise self.error(name, f"{value!r}; other models of this architecture are not read")

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: one, several, or none."""
        value = self.values.get(name)
        if value is None:
            return ()
        many = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(i, int) and i >= 0 for i in many):
            raise self.error(name, "a token id, or several")
        return tuple(int(i) for i in many)

    def special_ids(self, names: Mapping[str, str]) -> dict[str, Any]:
        """BaseConfig's bos_id, eos_ids and pad_id, by the names that the file gives them."""
        bos, eos, pad = (self.ids(names[field]) for field in ("bos_id", "eos_ids", "pad_id"))
        return {
            "bos_id": bos[0] if bos else None,
            "eos_ids": eos,
            "pad_id": pad[0] if pad else None,
        }

    def inside(self, name: str) -> "Fields | None":
        """An object within this one, or None."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return None if value is None else Fields(value, f"{self.path}: {name}")

    def error(self, name: str, rule: str) -> UserError:
        """The one-line error about a field."""
        if name not in self.values:
            return UserError(f"{self.path} has no {name}: expected {rule}")
        return UserError(f"{self.path}: {name} is {self.values[name]!r}: expected {rule}")

    def _typed(self, name: str, default: Any, rule: str, fits: Any, convert: Any) -> Any:
        """A field that fits a rule, converted, or the default."""
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if value is None or not fits(value):
            raise self.error(name, rule)
        return convert(value)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Puts the file before a UserError that does not begin with it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error


def _is_number(value: Any) -> bool:
    """Whether JSON means a finite number by it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
