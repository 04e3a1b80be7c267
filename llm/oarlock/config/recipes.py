"""The recipes that come with Oarlock, by name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from oarlock.errors import ConfigError
from oarlock.formats.files import is_missing, read_text
from oarlock.package_files import find_configs

_FOLDER = "recipes"
_FIRST_LINE = re.compile(r"# (?P<method>.+?) of a \d+B model(?P<how>.*?), (?P<gpus>\d+) GPUs?[:.]")
_MOST_BYTES = 1 << 16
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Recipe:
    """A recipe, as its first line describes it.

    Attributes:
        name: by which `oarlock pretrain` and `oarlock finetune` find it.
        command: "pretrain" or "finetune".
        method: what is trained and how, such as "LoRA".
        num_gpus: GPUs that it is made for.
    """

    name: str
    path: Path
    command: str
    method: str
    num_gpus: int


def list_recipes() -> list[Recipe]:
    """All recipes that come with this version, by name."""
    found = []
    for path in sorted((find_configs() / _FOLDER).glob("*.yaml")):
        line = read_text(path, limit=_MOST_BYTES, what="recipe").partition("\n")[0]
        words = _FIRST_LINE.match(line)
        assert words, f"{path}: the first line names the method, the model and the number of GPUs"
        command = "pretrain" if path.name.startswith("pretrain") else "finetune"
        found.append(Recipe(path.stem, path, command, words["method"] + words["how"], int(words["gpus"])))
    return found


def find_recipe(word: str | Path) -> Path:
    """The file of a recipe.

    Args:
        word: path of a YAML file, or the name of a recipe. A file of that name is taken first. Names of parts work
            too: "quickstart/finetune".

    Raises:
        ConfigError: when there is neither; it names similar recipes.
    """
    path = Path(word)
    if not is_missing(path) and not path.is_dir():
        return path
    if re.fullmatch(r"[A-Za-z0-9_]+(/[A-Za-z0-9_]+)?", str(word)):
        for name in (f"{_FOLDER}/{word}.yaml", f"{word}.yaml"):
            if (find_configs() / name).is_file():
                return find_configs() / name
    if path.is_dir():
        return path  # what reads it says what is wrong
    names = [recipe.stem for recipe in (find_configs() / _FOLDER).glob("*.yaml")]
    near = difflib.get_close_matches(str(word)[:_LONGEST_NAME], names, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}? " if near else ". "
    raise ConfigError(
        f"{word}: No such file or recipe{hint}The first argument must be a YAML file, the name of a recipe "
        "(`oarlock recipes` lists them) or a flag"
    )
