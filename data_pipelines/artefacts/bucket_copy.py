"""Artefacts in a bucket, copied to this host's own disk: what is read of them, checked, resumable.

    gs://B/W/chunks/train/manifest.json     1. is read: it names every shard, its size and its hash
    DISK/chunks/train/staged.json           2. says where the copies are from, and what is left out
    DISK/chunks/train/chunks-00000.npy      3. each shard, under a temporary name until its hash is right
    DISK/chunks/train/manifest.json         4. last: the directory can be opened

A shard under its own name is whole, so a killed copy resumes with the missing shards. Shards left
out are fetched at their first read (`fetch`), and the following file ahead of that.
"""

import concurrent.futures
import contextlib
import fcntl
import pathlib
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from tqdm import tqdm

from data_pipelines.artefacts.manifest import MANIFEST_FILE, STAGED_FILE, Manifest, Path, Shard
from retro_jax.errors import UserError
from retro_jax.storage import buckets, files

_BLOCK = 8 << 20
_THREADS = 8
_ahead = concurrent.futures.ThreadPoolExecutor(1, "staging")
_fetching = threading.Lock()  # what is being fetched ahead is waited for, and not fetched twice


class Bucket(buckets.Bucket):
    """A place with artefacts."""

    def copy(self, name: str, path: pathlib.Path, shard: Shard) -> None:
        """Copies an object to a file, which is written whole or not at all.

        Raises:
          UserError: it is missing, cannot be read, or is not what the manifest says.
        """
        place = f"{self.url}/{name}"
        with files.temporary_name(path) as temporary:
            try:
                size, digest = buckets.again(lambda: self._copy(name, temporary, shard.size))
            except FileNotFoundError as error:
                raise UserError(
                    f"{place} is missing: expected a shard of {shard.size} bytes"
                ) from error
            except Exception as error:  # every protocol has errors of its own
                if str(getattr(error, "filename", "") or "").startswith(str(path.parent)):
                    raise  # of this disk
                raise UserError(f"{place} cannot be read: {error}") from error
            if (size, digest) != (shard.size, shard.sha256):
                raise UserError(
                    f"{place} has {size} bytes and SHA-256 {digest[:12]}: expected {shard.size} and "
                    f"{shard.sha256[:12]}, as its manifest says"
                )
            files.replace(temporary, path)

    def _copy(self, name: str, path: pathlib.Path, expected: int) -> tuple[int, str]:
        """Copies an object once: its size and SHA-256. A shorter one than listed was cut on its way."""
        listed = self._files.size(f"{self._root}/{name}")
        with self._files.open(f"{self._root}/{name}", "rb") as source:

            def write(file: BinaryIO) -> None:
                shutil.copyfileobj(source, file, _BLOCK)

            size, digest = files.write_hashed(path, write)
        if listed == expected != size:
            raise OSError(f"{size} bytes came of {listed}")
        return size, digest


@contextlib.contextmanager
def alone(disk: Path) -> Iterator[pathlib.Path]:
    """Makes a directory and keeps other processes of this host from staging into it meanwhile."""
    folder = pathlib.Path(disk)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".staging", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def stage(
    bucket: Bucket,
    place: str,
    disk: pathlib.Path,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Manifest:
    """Copies one artefact, or what is missing of it.

    Args:
      bucket: a workdir in a bucket.
      place: the artefact's directory in it, as in "chunks/train"; "" for the bucket's own.
      disk: where the workdir's copy is.
      wanted: whether the shard of a name is copied now.

    Returns:
      Its manifest.

    Raises:
      UserError: something is missing or damaged there, or the copy here has another source.
    """
    source = "/".join(filter(None, (bucket.url, place)))
    inside = f"{place}/" if place else ""
    data = bucket.read(f"{inside}{MANIFEST_FILE}")
    if data is None:
        raise UserError(f"{source}/{MANIFEST_FILE} is missing: expected a finished artefact there")
    folder = disk / place
    manifest = Manifest.parse(data, f"{source}/{MANIFEST_FILE}")
    copied = folder / MANIFEST_FILE
    if copied.is_file() and copied.read_bytes() != data:
        raise UserError(
            f"{folder} is a copy of something else than {source} holds now: expected another --stage_to"
        )
    left_out = [shard.name for shard in manifest.shards if not wanted(shard.name)]
    missing = [s for s in manifest.shards if wanted(s.name) and not _is_whole(folder / s.name, s)]
    description = files.to_json({"source": source, "left_out": left_out})
    record = folder / STAGED_FILE
    if copied.is_file() and not missing and record.is_file() and record.read_bytes() == description:
        return manifest
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(record, description)
    sizes = sum(shard.size for shard in manifest.shards if wanted(shard.name))
    _copy(bucket, place, folder, missing, sizes)
    files.write_atomically(copied, data)
    return manifest


def _copy(
    bucket: Bucket, artefact: str, folder: pathlib.Path, missing: list[Shard], size: int
) -> None:
    """Copies an artefact's missing shards, with a bar of the bytes of all that are wanted."""
    inside = f"{artefact}/" if artefact else ""
    bar = tqdm(
        total=size,
        initial=size - sum(shard.size for shard in missing),
        desc=f"staging {bucket.url}/{artefact}".rstrip("/"),
        unit="B",
        unit_scale=True,
        mininterval=1,
    )
    with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:

        def copy(shard: Shard) -> None:
            bucket.copy(f"{inside}{shard.name}", folder / shard.name, shard)
            bar.update(shard.size)

        try:
            list(pool.map(copy, missing))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def stage_workdir(url: str, disk: pathlib.Path, *, left_out: Collection[str] = ()) -> pathlib.Path:
    """Copies all artefacts of a workdir, or what is missing of them.

    Args:
      url: of it. disk: where its copy is.
      left_out: names of folders of which manifests alone are copied.

    Returns:
      The copy.

    Raises:
      UserError: as `stage`; or there is no artefact.
    """
    bucket = Bucket(url)
    names = bucket.list("")
    places = [
        name.removesuffix(f"/{MANIFEST_FILE}")
        for name in names
        if name.endswith(f"/{MANIFEST_FILE}")
    ]
    if not places:
        raise UserError(f"{url} has no prepared data: expected a workdir, or --data of one")
    with alone(disk) as folder:
        for place in places:
            whole = place.split("/")[0] not in left_out
            stage(bucket, place, folder, wanted=lambda name: whole)  # noqa: B023
            for name in names:  # what stands beside a manifest and in no list of it, as marks
                beside = name.rpartition("/")[0] == place and name.endswith((".json", ".gin"))
                if beside and not (folder / name).is_file():
                    bucket.get(name, folder / name)
        for name in names:
            if "/" not in name and name.endswith((".json", ".gin")):
                bucket.get(name, folder / name)
    return folder


def exists(bucket: Bucket, place: str) -> bool:
    """Whether there is a finished artefact in a workdir's directory; "" for the bucket's own."""
    inside = f"{place}/" if place else ""
    return bucket.read(f"{inside}{MANIFEST_FILE}") is not None


def fetch(directory: pathlib.Path, name: str) -> pathlib.Path:
    """A shard of an artefact, copied now if the artefact is a copy that left it out.

    Raises:
      UserError: as `stage`.
    """
    path = directory / name
    with _fetching:
        if path.is_file() or not (directory / STAGED_FILE).is_file():
            return path
        (shard,) = (shard for shard in Manifest.read(directory).shards if shard.name == name)
        Bucket(files.read_json(directory / STAGED_FILE)["source"]).copy(name, path, shard)
    return path


def fetch_ahead(directory: pathlib.Path, name: str) -> None:
    """Begins to `fetch` in the background; errors are reported when the shard is needed."""
    if (directory / STAGED_FILE).is_file() and not (directory / name).is_file():
        _ahead.submit(fetch, directory, name)


def _is_whole(path: pathlib.Path, shard: Shard) -> bool:
    """Whether a shard was copied already."""
    return path.is_file() and path.stat().st_size == shard.size
