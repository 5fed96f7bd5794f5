"""Packaging. convert/, eval/ and configs/ lie at the top of the checkout but install inside
llava_jax, so that nothing named `eval` or `convert` lands in site-packages."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
BESIDE = ("convert", "eval", "configs")

SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "sse-starlette>=2.1", "httpx>=0.27"]
TORCH = ["torch>=2.6"]
TEST = ["pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100"]
DEV = ["ruff==0.15.10", "pyright==1.1.414", "pre-commit"]


def version() -> str:
    text = (HERE / "llava_jax" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.M).group(1)  # type: ignore[union-attr]


def packages() -> list[str]:
    found = find_packages(str(HERE), include=["llava_jax", "llava_jax.*"])
    for d in BESIDE:
        found += [
            f"llava_jax.{p}" for p in (d, *(f"{d}.{s}" for s in find_packages(str(HERE / d))))
        ]
    return found


setup(
    name="llava_jax",
    version=version(),
    description="LLaVA-1.5 in JAX/Flax: train, evaluate, serve, and move weights to and from PyTorch",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages(),
    package_dir={f"llava_jax.{d}": d for d in BESIDE},
    package_data={"llava_jax": ["py.typed", "assets/**/*"]},
    install_requires=[
        "jax>=0.10.1",
        "flax>=0.12.6",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.0",
        "grain>=0.2.16",
        "array_record>=0.8.1",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets needs it on 3.11 and does not say so
        "ml-collections>=1.1.0",
        "transformers>=5.3",
        "sentencepiece>=0.2.1",
        "safetensors>=0.6",
        "huggingface_hub>=1.0",
        "pillow>=12.3",  # security fixes below that
        "numpy>=2.0",
        "absl-py>=2.1",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "tensorboardX>=2.6.5",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.1"],
        "cuda13": ["jax[cuda13]>=0.10.1"],
        "tpu": ["jax[tpu]>=0.10.1"],
        "torch": TORCH,
        "serve": SERVE,
        "demo": ["gradio>=6.31"],
        "test": TEST,
        "dev": TEST + DEV,
    },
    entry_points={"console_scripts": ["llava-jax=llava_jax.cli:main"]},
)
