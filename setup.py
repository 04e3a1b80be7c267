"""Build of Oarlock: the package in llm/oarlock, and its dependencies."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

DEPENDENCIES = [
    # A beta whose internals we extend by subclass; every release is checked before the pin moves.
    "paddlenlp==3.0.0b4",
    "aistudio-sdk==0.2.6",  # 0.3 breaks the import of paddlenlp (its issues 10781, 11133)
    "numpy>=1.24,<2",  # paddlenlp uses what numpy 2 removed
    "protobuf>=3.20,<6",  # VisualDL's records; 6 refuses what it writes
    "pyarrow>=14,<22",  # datasets below 4.5 breaks with 22
    "pandas>=2,<3",
    "datasets>=2.14,<4.5",
    "setuptools<80",  # paddle.utils imports what 80 removed
    "visualdl>=2.5.3,<2.6",
    "Flask-Babel>=3.1,<5",  # VisualDL's page: below 3 it does not start
    "tokenizers>=0.20.1,<0.22",  # encode_batch_fast; paddlenlp reads the files of this range
    "safetensors>=0.4.5,<1",
    "fast_dataindex>=0.1.2,<0.2",
    "ml_dtypes>=0.4,<1",
    "jinja2>=3.1,<4",
    "matplotlib>=3.7,<4",  # the picture of `oarlock data check`; visualdl brings it too
    "pyyaml>=6,<7",
    "tqdm>=4.65,<5",
    "zstandard>=0.22,<1",
    "sacrebleu>=2.4,<3",  # BLEU, with tokenizers for English and Chinese
    "rouge-score>=0.1.2,<0.2",  # ROUGE as Google computes it, with a tokenizer of one's own
]


def dependencies():
    """The list above, and paddlepaddle on machines without an NVIDIA driver.

    paddlepaddle and paddlepaddle-gpu hold the same files, so where there is a GPU the choice is left to
    scripts/setup.sh (or to you): installing the CPU build over the GPU one breaks both.
    """
    has_gpu = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if os.environ.get("OARLOCK_PADDLE", "none" if has_gpu else "cpu") == "cpu":
        return ["paddlepaddle>=3.3.1,<3.4", *DEPENDENCIES]
    return DEPENDENCIES


def version():
    text = (ROOT / "llm" / "oarlock" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text).group(1)


setup(
    version=version(),
    install_requires=dependencies(),
    package_dir={"": "llm"},
    packages=find_packages("llm", include=["oarlock", "oarlock.*"]),
)
