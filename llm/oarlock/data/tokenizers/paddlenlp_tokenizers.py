"""Loading tokenizers that only a class of PaddleNLP can read, from checked values.

PaddleNLP's from_pretrained trusts the files of a folder. It uses any class of its namespace that tokenizer_config.json
names, follows paths (vocab_file, sp_model_kwargs, a chat_template that is a file name), and sets each entry of
special_tokens_map.json as an attribute. Here the class is one of a table, its vocabulary is the file of the usual name
in the folder, and only the settings below are passed on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le
from typing_extensions import TypedDict

from oarlock.data.tokenizers.folder import PADDLENLP_ALONE
from oarlock.data.tokenizers.schema import SpecialTokens, read_added_tokens, read_special_tokens
from oarlock.environment.console import log_once
from oarlock.errors import ModelError, first_line
from oarlock.families.registry import FAMILIES
from oarlock.files import write_json
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import TOKENIZER_BYTES, check_content, read_json_if_there

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

# PADDLENLP_ALONE and classes that are often used to train from scratch.
_CLASSES = (*PADDLENLP_ALONE, "BertTokenizer", "ErnieTokenizer", "GPTChineseTokenizer")
_SPECIAL = frozenset(SpecialTokens.__annotations__) - {"extra_special_tokens"} | {"end_token", "gmask_token"}


class _Settings(TypedDict, total=False):
    """Settings of the classes besides tokens."""

    added_tokens_decoder: dict[str, dict[str, Any]] | None
    padding_side: str | None
    model_max_length: int | float | None
    model_input_names: list[str] | None
    do_lower_case: bool | None
    remove_space: bool | None
    encode_special_tokens: bool | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    num_image_tokens: Annotated[int, Ge(0), Le(1 << 20)] | None
    max_blank_length: Annotated[int, Ge(2), Le(1000)] | None


# Notes of the program that wrote a file. They do not affect the tokenizer.
_NOTES = frozenset(
    {
        "tokenizer_class", "init_class", "auto_map", "name_or_path", "chat_template", "clean_up_tokenization_spaces",
        "vocab_file", "merges_file", "tokenizer_file", "model_file", "special_tokens_map_file", "added_tokens_file",
        "_from_auto", "from_slow", "use_fast", "processor_class", "truncation_side",
    }
)  # fmt: skip


def load_paddlenlp_tokenizer(folder: Path, config: Mapping[str, Any]) -> PretrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Args:
        config: checked content of tokenizer_config.json.

    Raises:
        ModelError: for an unsupported class, or files that can't be read.
    """
    import paddlenlp.transformers

    name = _choose_class(folder, config)
    found = getattr(paddlenlp.transformers, name)
    known = {**_Settings.__annotations__, **dict.fromkeys(_SPECIAL)}
    place = str(folder / "tokenizer_config.json")
    settings: dict[str, Any] = {key: value for key, value in config.items() if key in known and value is not None}
    check_content({key: value for key, value in settings.items() if key not in _SPECIAL}, place, _Settings)
    if left := sorted(set(config) - known.keys() - _NOTES):
        log_once(f"{place}: ignored for a {name}: {', '.join(left)[:200]}")
    special = read_special_tokens(folder / "special_tokens_map.json")
    if odd := next((key for key in special if key not in _SPECIAL), None):
        raise ModelError(f"{folder / 'special_tokens_map.json'}: {odd[:100]!r} is not a special token of a {name}")
    files = {}
    for argument, file in found.resource_files_names.items():
        if (folder / file).exists():
            read_bytes(folder / file, limit=TOKENIZER_BYTES, what="vocabulary")  # checks its type and size
            files[argument] = str(folder / file)
    try:
        with tempfile.TemporaryDirectory(prefix="oarlock-tokenizer-") as checked:
            write_json(Path(checked, "tokenizer_config.json"), settings)
            write_json(Path(checked, "special_tokens_map.json"), special)
            if added := read_added_tokens(folder / "added_tokens.json"):
                write_json(Path(checked, "added_tokens.json"), added)
            tokenizer = found.from_pretrained(checked, name_or_path=str(folder), **files)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"tokenizer {folder}: can't be loaded from this folder: {first_line(error)}") from error
    if max(tokenizer.get_vocab().values(), default=-1) >= len(tokenizer):
        names = ", ".join(found.resource_files_names.values())
        raise ModelError(f"tokenizer {folder}: a token appears twice in {names}")
    tokenizer.init_kwargs = {
        **{key: value for key, value in tokenizer.init_kwargs.items() if not str(value).startswith(checked)},
        "chat_template": config.get("chat_template"),
    }
    return tokenizer


def _choose_class(folder: Path, config: Mapping[str, Any]) -> str:
    model = read_json_if_there(folder / "config.json", dict[str, Any]) or {}
    named = config.get("tokenizer_class") or config.get("init_class")
    family = FAMILIES.get(str(model.get("model_type")))
    name = named or (family.paddlenlp_tokenizer if family is not None else "")
    if name in _CLASSES:
        return str(name)
    what = f"its class {name!r} is not supported" if name else "no class is given"
    raise ModelError(
        f"tokenizer {folder}: can't be loaded from this folder: no tokenizer.json, and {what} "
        f"({', '.join(_CLASSES)}). save_pretrained of transformers writes a tokenizer.json"
    )
