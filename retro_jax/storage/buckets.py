"""Places in object stores, and whatever else fsspec reads and writes, as a few operations that try again.

A request that fails is made again, up to six times within about half a minute: stores refuse requests
when they are busy, and networks cut them. What is not there, or not permitted, is an error at once.
"""

import contextlib
import pathlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from retro_jax.errors import UserError
from retro_jax.storage import files, urls

_TRIES, _FIRST_WAIT, _LONGEST_WAIT = 6, 0.5, 8.0  # seconds; each wait is twice the one before
_REFUSED = (401, 403)  # statuses of HTTP that stay as they are
_FORBIDDEN = "Forbidden:"  # how gcsfs begins the OSError of a 403
_VERSIONS = ("ETag", "md5Hash", "etag", "mtime", "created")  # what stores call an object's version

T = TypeVar("T")


class Bucket:
    """A place that fsspec can read. Its errors are UserErrors, one line with the object's URL.

    Attributes:
      url: as it was given, without a slash at its end.
    """

    def __init__(self, url: str) -> None:
        """Finds what reads the url's protocol; connects to nothing yet.

        Raises:
          UserError: nobody knows the protocol, or its package is not installed.
        """
        self.url = url.rstrip("/")
        self._files, self._root = urls.file_system(self.url)

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        with self.telling(name):
            try:
                return again(lambda: self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Some bytes of an object.

        Raises:
          UserError: there are fewer.
        """

        def read() -> bytes:
            path, end = f"{self._root}/{name}", offset + length
            data = self._files.cat_file(path, start=offset, end=end) if length else b""
            if len(data) != length:
                raise OSError(f"{len(data)} bytes from {offset} on, expected {length}")
            return data

        with self.telling(name):
            return again(read)

    def list(self, place: str) -> list[str]:
        """The names of all objects below a place, without it; none where there is no such place."""
        return sorted(self.details(place))

    def details(self, place: str) -> dict[str, tuple[int, str]]:
        """{name: (bytes, version)} of all objects below a place; "" for all of the bucket's."""
        root = f"{self._root}/{place}".rstrip("/")

        def find() -> dict[str, Any]:
            self._files.invalidate_cache()
            try:
                return self._files.find(root, detail=True)
            except FileNotFoundError:
                return {}

        with self.telling(place):
            found = again(find)
        inside = f"{root.lstrip('/')}/"
        return {
            name.partition(inside)[2]: (int(info.get("size") or 0), _version(info))
            for name, info in found.items()
            if info.get("type") != "directory"
        }

    def get(self, name: str, path: pathlib.Path) -> None:
        """Copies an object to a file, which is written whole or not at all."""
        with self.telling(name), files.writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.temporary_name(path) as temporary:
                again(lambda: self._files.get_file(f"{self._root}/{name}", str(temporary)))
                files.replace(temporary, path)

    def put(self, path: pathlib.Path, name: str) -> None:
        """Copies a file to an object.

        Raises:
          FileNotFoundError: there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(path)
        with self.telling(name, "written"):
            again(lambda: self._put(path, f"{self._root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object."""
        with self.telling(name, "written"):
            self._make_folder(f"{self._root}/{name}")
            again(lambda: self._files.pipe_file(f"{self._root}/{name}", data))

    def remove(self, place: str) -> None:
        """Removes all objects below a place, or the object of that name."""
        with self.telling(place, "removed"), contextlib.suppress(FileNotFoundError):
            again(lambda: self._files.rm(f"{self._root}/{place}", recursive=True))

    @contextlib.contextmanager
    def telling(self, name: str, what: str = "read") -> Iterator[None]:
        """Turns whatever the protocol's package raises into a line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.url}/{name} cannot be {what}: {reason}") from error

    def _put(self, path: pathlib.Path, target: str) -> None:
        """Copies a file once."""
        self._make_folder(target)
        self._files.put_file(str(path), target)

    def _make_folder(self, target: str) -> None:
        """The folder of an object, where the protocol has folders: buckets are never made."""
        if not urls.is_object_store(self.url):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)


def again(action: Callable[[], T]) -> T:
    """The result of an action on a store, which is done again where it fails for a time."""
    for number in range(_TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError, UserError):
            raise
        except Exception as error:  # every protocol has errors of its own
            refused = str(error).startswith(_FORBIDDEN) or getattr(error, "code", None) in _REFUSED
            last = number + 1 == _TRIES or refused
            if last or getattr(error, "filename", None):  # of this host's disk
                raise
        wait = min(_FIRST_WAIT * 2**number, _LONGEST_WAIT)
        time.sleep(wait * random.uniform(0.5, 1.0))
    raise AssertionError


def _version(info: dict[str, Any]) -> str:
    """What a store says of an object's version; empty where it says nothing."""
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
