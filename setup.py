"""Packaging of retro-jax. Exact versions stand in constraints.txt; reasons in WORKSPACE.md."""

from setuptools import find_packages, setup

DATA = [
    "tensorflow~=2.20.0",
    "tensorflow-text~=2.20.0",
    "scann==1.4.2",
    "rensa",
    "bm25s",
    "pydivsufsort",
]
CLUSTER = ["ray"]
PARQUET = ["pyarrow"]
FIT = ["gguf", "tokenizers"]
TEST = [*CLUSTER, *PARQUET, *FIT, "jsonschema", "pytest", "pytest-xdist", "hypothesis"]
DEV = ["ruff", "mypy", "mkdocs-material"]

setup(
    name="retro-jax",
    version="0.1.0",
    description="Retrieval-enhanced transformers (RETRO) in JAX and Flax, trained on TPU and GPU meshes",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["retro_jax*", "data_pipelines*", "launch*"],
    ),
    install_requires=[
        "absl-py",
        "flax",
        "fsspec",
        "gin-config",
        "grain",
        "jax",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "safetensors",
        "sentencepiece",
        "tensorboardX",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "data": DATA,
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "cluster": CLUSTER,
        "parquet": PARQUET,
        "fit": FIT,
        "gcs": ["gcsfs"],
        "s3": ["s3fs"],
        "test": DATA + TEST,
        "dev": DATA + TEST + DEV,
    },
)
