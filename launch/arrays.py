"""Arrays that evaluation leaves in W/evaluation."""

import os
import pathlib

import numpy as np

from data_pipelines import files
from retro_jax.errors import UserError
from retro_jax.train import processes


def read_array(path: pathlib.Path) -> np.ndarray:
    """A .npy file of launch.evaluate's."""
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: move it away and run launch.evaluate again") from error


def write_array(path: pathlib.Path, values: np.ndarray) -> None:
    """A .npy file, whole or not at all; its folder is made. Of several processes the first writes."""
    if not processes.is_first():
        return
    with files.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary_name(path) as temporary:
        files.write_hashed(temporary, lambda file: np.save(file, values))
        os.replace(temporary, path)
