"""Places that are no directory of this machine: URLs that fsspec reads, as in gs://B/W."""

import re
from typing import Any

from retro_jax.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STORES = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_EXTRAS = {**_STORES, "hf": "hf"}


def is_url(place: Any) -> bool:
    """Whether something names a place that fsspec reads, and not a path of this machine."""
    return bool(_URL.match(str(place or "")))


def is_object_store(place: str) -> bool:
    """Whether a URL is of a store without folders, in which buckets are made by their owner."""
    return place.partition("://")[0] in _STORES


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it; connects to nothing yet.

    Args:
      url: as in gs://B/W. options: of the file system.

    Raises:
      UserError: nobody knows the protocol, or its package is not installed.
    """
    import fsspec  # not for those that read this machine's files only

    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        extra = _EXTRAS.get(protocol)
        expected = (
            f"pip install 'retro-jax[{extra}]'"
            if extra
            else "a protocol that fsspec knows, and its package"
        )
        reason = str(error).split("\n")[0]
        raise UserError(f"{url} cannot be opened ({reason}): expected {expected}") from error
