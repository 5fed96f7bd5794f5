"""Packaging. convert/, eval/ and configs/ lie at the top of the checkout but install inside
llava_jax, so that nothing named `eval` or `convert` lands in site-packages."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
BESIDE = ("convert", "eval", "configs")

TRANSFORMERS = ["transformers>=5.3"]  # before 5.3 a nested config could switch on remote code
TORCH = ["torch>=2.6", *TRANSFORMERS]  # before 2.6 weights_only=True could be bypassed
TFDS = [
    "tensorflow-datasets>=4.9.9",
    "array_record>=0.8.1",
    "importlib_resources",  # tensorflow-datasets needs it on 3.11 and does not say so
]
FAST = ["numba>=0.61", "simplejpeg>=1.7"]  # pixels in a third of the time, to the bit the same
GGUF = ["gguf>=0.17"]
PARQUET = ["pyarrow>=17"]
EVAL = ["openpyxl>=3.1", "pooch>=1.9", "openai>=1.60", "jinja2>=3.1", *PARQUET]
EVAL += ["scipy>=1.15"]  # before 1.15 its bootstrap took another argument for the seed
JSON = ["llguidance>=1.3"]  # answers of a fixed form
SERVE = [
    *JSON,
    "fastapi>=0.115",
    "starlette>=0.46",
    "pydantic>=2.10",
    "uvicorn>=0.34",
    "prometheus_client>=0.21",
]
TEST = ["pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "setuptools>=77"]
TEST += ["jsonschema>=4.23", "httpx>=0.28", *TRANSFORMERS, *GGUF, *EVAL, *FAST, *TFDS, *SERVE]
DEV = ["ruff==0.17.6", "pyright==1.1.414", "pre-commit>=4.0"]


def version() -> str:
    """The version, read without importing the package (its needs are not installed yet)."""
    text = (HERE / "llava_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', text, re.M).group(1)  # type: ignore[union-attr]


def packages() -> list[str]:
    """llava_jax with its sub-packages, and BESIDE under their installed names."""
    found = find_packages(str(HERE), include=["llava_jax", "llava_jax.*"])
    for d in BESIDE:
        inner = find_packages(str(HERE / d))
        found += [f"llava_jax.{p}" for p in (d, *(f"{d}.{s}" for s in inner))]
    return found


setup(
    name="llava_jax",
    version=version(),
    description="LLaVA-1.5 in JAX/Flax: train, evaluate, serve, and move weights to and from PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={f"llava_jax.{d}": d for d in BESIDE},
    package_data={
        "llava_jax": ["py.typed", "assets/**/*", "datasets/recipes/*.toml"],
        "llava_jax.eval": ["**/*.html", "**/*.json", "**/*.toml", "**/*.txt"],
    },
    install_requires=[
        "jax>=0.10.1",
        "flax>=0.12.6",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.0",
        "grain>=0.2.16",
        "ml-collections>=1.1.0",
        "sentencepiece>=0.2.1",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "fsspec>=2024.6",
        "huggingface_hub>=1.0",
        "pillow>=12.3",  # security fixes below that
        "numpy>=2.0",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "tensorboardX>=2.6.5",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.1"],
        "cuda13": ["jax[cuda13]>=0.10.1"],
        "tpu": ["jax[tpu]>=0.10.1"],
        "torch": TORCH,
        "tfds": TFDS,
        # With --beam; its caps on pillow and protobuf are below what the core needs: an environment of its own.
        "beam": [*TFDS, "apache-beam>=2.77"],
        "fast": FAST,
        "gguf": GGUF,
        "parquet": PARQUET,
        "eval": EVAL,
        "video": ["av>=14"],  # SEED-Bench's frames
        "chair": ["textblob>=0.19", "nltk>=3.9"],
        "lmms": ["lmms-eval>=0.7.2", *TORCH],
        "ray": ["ray[train]>=2.60"],
        "wandb": ["wandb>=0.21"],
        "mlflow": ["mlflow-skinny>=3.4"],
        "json": JSON,
        "serve": SERVE,
        "browser": ["playwright>=1.50"],  # tests of the web chat, with a Chromium that is installed
        "test": TEST,
        "dev": [*TEST, *DEV],
    },
    entry_points={
        "console_scripts": ["llava-jax=llava_jax.cli:main"],
        "lmms_eval.models": ["llava_jax=llava_jax.eval.lmms:manifest"],
    },
)
