"""The gin files that come with the project, in the repository or in an installation."""

import pathlib

_NAME = "experiments"
# setup.py puts them into the package; the repository has them at its root.
_INSTALLED = pathlib.Path(__file__).parents[1] / _NAME
FOLDER = _INSTALLED if _INSTALLED.is_dir() else pathlib.Path(__file__).parents[2] / _NAME


def located(path: str) -> str:
    """The file at a path; where there is none, the project's experiments/NAME.gin."""
    parts = pathlib.PurePath(path).parts
    if parts[:1] != (_NAME,) or ".." in parts or pathlib.Path(path).exists():
        return path
    shipped = FOLDER.joinpath(*parts[1:])
    return str(shipped) if shipped.is_file() else path
