"""Packaging of retro-jax; pyproject.toml has its version. constraints.txt has exact ones of the rest.

The lower bounds are versions with which tests of model, training and data passed on Python 3.11.
"""

import os
import pathlib
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
EXPERIMENTS = "experiments"
PAPER = "https://arxiv.org/abs/2112.04426"

DATA = [
    "tensorflow~=2.20.0",
    "tensorflow-text~=2.20.0",
    "scann==1.4.2",
    "rensa>=0.5",
    "pydivsufsort>=0.0.18",
]
# Training, evaluation and sampling without scoring new texts: what every installation has is enough.
TRAIN: list[str] = []
CLUSTER = ["ray>=2.60"]
PARQUET = ["pyarrow>=18"]
FAISS = ["faiss-cpu>=1.10"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]
FIT = ["gguf>=0.17.1", "tokenizers>=0.21"]
GCS, S3 = ["gcsfs"], ["s3fs"]
HF = ["huggingface_hub>=0.34"]
# Object stores on this machine: S3, and Google's.
STORES = [*GCS, *S3, "moto[s3]>=5.1", "flask", "flask-cors", "gcp-storage-emulator>=2024.8.3"]
TEST = [
    *CLUSTER,
    *PARQUET,
    *FAISS,
    *FIT,
    *SERVE,
    *STORES,
    *HF,
    "jsonschema",
    "openai>=1.40",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "setuptools>=68",
    "setuptools-scm>=8.1",
    "nbclient>=0.10",
    "ipykernel>=6.29",
]
# Headless Chromium for `python -m tests.report.browser`.
BROWSER = ["playwright>=1.65"]
DEV = ["ruff", "mypy", "mkdocs-material"]


class BuildWithExperiments(build_py):
    """Puts experiments/ into the package launch, where an installation has no repository around it."""

    def run(self) -> None:
        """Builds the packages, then copies the gin files beside them."""
        super().run()
        if not getattr(self, "editable_mode", False):
            for path in self._experiments():
                copy = pathlib.Path(self.build_lib, "launch", path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, copy)

    def get_source_files(self) -> list[str]:
        """What a source distribution needs: the modules and the gin files."""
        return [*super().get_source_files(), *map(str, self._experiments())]

    def _experiments(self) -> list[pathlib.Path]:
        """The gin files, relative to the repository."""
        return sorted(path.relative_to(ROOT) for path in (ROOT / EXPERIMENTS).rglob("*.gin"))


def home() -> str | None:
    """The address of the repository that is built, which a GitHub workflow knows."""
    server, repository = (os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY"))
    return f"{server}/{repository}" if server and repository else None


def long_description() -> str:
    """README.md with absolute links; without its relative links and pictures where no home is known."""
    text, base = (ROOT / "README.md").read_text(encoding="utf-8"), home()
    relative = r"\[([^\]]*)\]\((?!https?://|#)([^)]+)\)"
    if base is None:
        text = re.sub(rf"^!{relative}\n\n?", "", text, flags=re.MULTILINE)
        return re.sub(relative, r"\1", text)
    text = re.sub(f"!{relative}", rf"![\1]({base}/raw/main/\2)", text)
    return re.sub(relative, rf"[\1]({base}/blob/main/\2)", text)


def urls() -> dict[str, str]:
    """The links beside the description."""
    base = home()
    if base is None:
        return {"Paper": PAPER}
    changes = f"{base}/blob/main/CHANGELOG.md"
    return {"Source": base, "Issues": f"{base}/issues", "Changelog": changes, "Paper": PAPER}


setup(
    name="retro-jax",
    description="Retrieval-enhanced transformers (RETRO) in JAX and Flax, trained on TPU and GPU meshes",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls=urls(),
    keywords=["retrieval", "language model", "transformer", "RETRO", "JAX", "Flax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(
        include=["retro_jax*", "data_pipelines*", "launch*"],
    ),
    package_data={name: ["py.typed"] for name in ("retro_jax", "data_pipelines", "launch")},
    entry_points={"console_scripts": ["retro = launch.retro:main"]},
    cmdclass={"build_py": BuildWithExperiments},
    install_requires=[
        "absl-py>=2.1",
        'flax>=0.12.8; python_version < "3.12"',
        'flax>=0.12.12; python_version >= "3.12"',  # older ones fail on the jax of these Pythons
        "fsspec>=2024.10",
        "gin-config>=0.5",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "numpy>=2.0.2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "packaging>=24",
        "safetensors>=0.4.5",
        "sentencepiece>=0.2.2",
        "tensorboardX>=2.6.2.2",
        "tqdm>=4.66",
        "zstandard>=0.23",
    ],
    extras_require={
        "data": DATA,
        "train": TRAIN,
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "cluster": CLUSTER,
        "parquet": PARQUET,
        "faiss": FAISS,
        "fit": FIT,
        "serve": SERVE,
        "gcs": GCS,
        "s3": S3,
        "hf": HF,
        "lm-eval": ["lm-eval>=0.4.13"],
        "wandb": ["wandb"],
        "dist": ["build", "twine"],
        "browser": BROWSER,
        "test": DATA + TEST,
        "dev": DATA + TEST + DEV,
    },
)
