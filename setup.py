"""Dependencies and entry point. `constraints.txt` pins the exact set that the tests ran with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "mlalign" / "__init__.py").read_text()).group(1)

setup(
    name="mlalign",
    version=version,
    description="Fine-tune LLMs on a task and align their middle layers across languages, in one run",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["mlalign", "mlalign.*"]), "mlalign.ds_configs"],
    package_dir={"mlalign.ds_configs": "ds_configs"},
    package_data={"mlalign": ["recipes/*.yaml"], "mlalign.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<5.24",
        "peft>=0.21,<0.22",
        "datasets>=5.2,<6",
        "mpi4py>=4.1,<5",
        "tensorboard>=2.21,<3",
        "pydantic>=2.14,<3",
        "omegaconf>=2.4,<2.5",
        "pyyaml>=6.0.2,<7",
        "typer>=0.29,<0.30",
        "rich>=15,<16",
        "matplotlib>=3.11,<4",
        "numpy>=2.4,<3",
        "scipy>=1.17,<2",
        "langcodes>=3.5.1,<4",
        "language_data>=1.4,<2",  # names of languages, for langcodes
        "py3langid>=0.4,<0.5",
        "sacrebleu>=2.6,<2.7",  # its statistics of sentences are private, see tasks/translation.py
        "seqeval>=1.2.2,<2",
        "packaging>=24",
        "ninja>=1.13,<2",  # builds DeepSpeed's CPU ops on first use
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "benchmarks": ["trl>=1.16,<1.17", "sentence-transformers>=6.2,<6.3"],  # what benchmarks/peers.py compares with
        "dev": [
            "hypothesis>=6.170,<7",
            "openmpi>=5.0.11,<6",
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
        ],
    },
    entry_points={"console_scripts": ["mlalign=mlalign.__main__:main"]},
)
