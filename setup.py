"""Build of Oarlock: the package in llm/oarlock, its dependencies, and the fused ops of custom_ops/."""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

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
    "jinja2>=3.1.6,<4",
    "matplotlib>=3.7,<4",  # the picture of `oarlock data check`; visualdl brings it too
    "pyyaml>=6,<7",
    "pydantic>=2.14,<3",  # the schemas of files that others wrote; older ones collect every wrong element of a mapping
    "annotated-types>=0.6,<1",  # their limits, without importing it
    "typing_extensions>=4.12",  # TypedDict as pydantic reads it below Python 3.12
    "requests>=2.32,<3",  # downloads of models; datasets brings it too
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


def ops_builder():
    """The module custom_ops/build.py."""
    spec = importlib.util.spec_from_file_location("build_custom_ops", ROOT / "custom_ops" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


ops = ops_builder()


class BuildOps(build_ext):
    """custom_ops/build.py in the place of setuptools' own compiling. OARLOCK_OPS=0 leaves the ops out."""

    def run(self):
        if os.environ.get("OARLOCK_OPS", "1") != "0":
            ops.build_or_say(self._folder())

    def _folder(self):
        return ops.PLACE if self.inplace else Path(self.build_lib) / "oarlock" / "ops"

    def get_outputs(self):
        return [
            str(path) for name in (ops.LIBRARY, ops.PRODUCTS, ops.STAMP) if (path := self._folder() / name).exists()
        ]

    def get_output_mapping(self):
        return {}


class BuildPackage(build_py):
    """Puts the recipes and the training scripts into the package: oarlock/configs, oarlock/entrypoints.

    In a checkout, and so in an editable install, they stay where people look for them (see oarlock/package_files.py).
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._copied():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def _copied(self):
        package = Path(self.build_lib) / "oarlock"
        for source in sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".json")):
            yield source, package / source.relative_to(ROOT)
        for name in ("run_pretrain.py", "finetune_generation.py"):
            yield ROOT / "llm" / name, package / "entrypoints" / name

    def get_outputs(self, include_bytecode=True):
        copied = [] if self.editable_mode else [str(target) for _, target in self._copied()]
        return super().get_outputs(include_bytecode) + copied


def build_requirements():
    """A Paddle to build the ops against, where this environment has none yet but will get the CPU build.

    pip runs builds apart from the environment; ops.Paddle.find sees its Paddle all the same.
    """
    paddle = [name for name in dependencies() if name.startswith("paddlepaddle")]
    try:
        ops.Paddle.find()
    except ops.CannotBuild:
        return paddle if shutil.which("g++") and os.environ.get("OARLOCK_OPS", "1") != "0" else []
    return []


def version():
    text = (ROOT / "llm" / "oarlock" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text).group(1)


setup(
    version=version(),
    install_requires=dependencies(),
    package_dir={"": "llm"},
    packages=find_packages("llm", include=["oarlock", "oarlock.*"]),
    py_modules=["fused_ln"],
    ext_modules=[Extension("oarlock.ops.oarlock_ops", [])],
    cmdclass={"build_ext": BuildOps, "build_py": BuildPackage},
    setup_requires=build_requirements(),
    zip_safe=False,
)
