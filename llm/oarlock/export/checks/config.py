"""Check config.json, tokenizer and chat template of a model in Hugging Face's layout. Imports no Paddle."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.data.templates.template_files import DEFAULT, TEMPLATE_FILE, parse_named_templates
from oarlock.data.tokenizers.schema import read_special_tokens, read_tokenizer_config
from oarlock.errors import ConfigError, ModelError
from oarlock.export.checks.findings import Finding, read_object, shown
from oarlock.export.checks.generation import check_generation, read_vocab_size
from oarlock.export.manifest import read_manifest
from oarlock.export.servers import SERVERS, list_architectures
from oarlock.export.start_scripts import LENGTHS, MOST_LENGTH
from oarlock.families.registry import FAMILIES, HF_CONFIGS
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import CONFIG_BYTES, TOKENIZER_BYTES

# Only PaddleNLP reads these; the first two change what the weights mean.
_PADDLE_KEYS = (
    "fuse_attention_qkv", "fuse_attention_ffn", "paddlenlp_version", "rope_scaling_type", "rope_scaling_factor",
    "tensor_parallel_degree", "tensor_parallel_output", "sequence_parallel", "use_flash_attention", "recompute",
)  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Which layers are of another kind: null, 0 and no value have a meaning.
_LAYER_PATTERNS = frozenset(
    {
        *("sliding_window", "max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"),
        *("decoder_sparse_step", "first_k_dense_replace", "q_lora_rank"),
    }
)
_EXPORT = "Export the model again with `oarlock export`"
_VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def check_config(config: dict[str, Any] | str, server: str) -> list[Finding]:
    """Check config.json.

    Args:
        config: the result of read_object().
        server: whose rules apply, a key of SERVERS.
    """
    place = "config.json"
    if isinstance(config, str):
        return [Finding("config", place, f"the file {config}, so nothing can load the model", _EXPORT)]
    findings = [*_check_family(config, server), *_check_dtype_keys(config, server), *_check_rope(config)]
    if config.get("auto_map"):
        problem = "it names code, which servers that trust remote code run"
        findings.append(Finding("code", f"{place}, auto_map", problem, "Remove it"))
    foreign = [key for key in _PADDLE_KEYS if key in config]
    if foreign:
        findings.append(
            Finding("paddle-keys", f"{place}, {shown(foreign)}", "only PaddleNLP knows these", "Remove them")
        )
    return findings


def _check_family(config: dict[str, Any], server: str) -> list[Finding]:
    about, place = SERVERS[server], "config.json, architectures"
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        return [Finding("architecture", place, f"it names no model class, and {about.title} needs one", "Add it")]
    if named[0] not in list_architectures(server):
        return [
            Finding(
                "architecture",
                place,
                f"{about.title} does not run {named[0]}",
                f"It runs {', '.join(list_architectures(server))}",
            )
        ]
    family = str(config.get("model_type"))
    if family not in HF_CONFIGS or FAMILIES[family].architecture != named[0]:
        problem = f"{family!r} is not the model_type of {named[0]}"
        return [Finding("architecture", "config.json, model_type", problem, _EXPORT)]
    words = HF_CONFIGS[family]
    given = {words.aliases.get(key, key) for key, value in config.items() if value is not None}
    sizes = {key: words.fields.get(words.aliases.get(key, key)) for key in config if key not in _LAYER_PATTERNS}
    wrong = [key for key, default in sizes.items() if _is_size(default) and not _is_size_value(config[key], default)]
    wrong += [key for key in LENGTHS if key not in wrong and not _is_size_value(config.get(key), 1)]
    if wrong:
        problem = "must be a number above 0"
        return [Finding("config", f"config.json, {shown(sorted(wrong))}", problem, _EXPORT)]
    gone = [key for key, default in words.fields.items() if _is_size(default) and key not in {*given, *_LAYER_PATTERNS}]
    if gone:
        problem = "missing, and the default is wrong for this model"
        return [Finding("config", f"config.json, {shown(gone)}", problem, _EXPORT)]
    return []


def _is_size(default: Any) -> bool:
    """Return whether a field is a size of the model (or the epsilon of its norms), for which no default is right."""
    return (isinstance(default, int) and not isinstance(default, bool)) or default in (1e-5, 1e-6)


def _is_size_value(value: Any, default: Any) -> bool:
    """Return whether a value has the type of the default and is in range; null is."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(default, float) else int):
        return False
    return 0 < value <= MOST_LENGTH


def _check_dtype_keys(config: dict[str, Any], server: str) -> list[Finding]:
    about = SERVERS[server]
    given = {key: config[key] for key in ("torch_dtype", "dtype") if config.get(key) is not None}
    place = "config.json, " + (" and ".join(given) or "torch_dtype")
    unknown = [f"{key} {value!r}" for key, value in given.items() if str(value) not in DTYPES]
    problem = ""
    if unknown:
        problem = f"{shown(unknown)} is not one of {', '.join(DTYPES)}"
    elif about.only_torch_dtype and list(given) != ["torch_dtype"]:
        problem = (
            f"{about.title} needs `torch_dtype` alone. With `dtype` alone it reads Paddle's layout ([in, out], so "
            "every matrix would be transposed), and with both or neither it stops"
        )
    elif not given:
        problem = f"neither torch_dtype nor dtype is set, so {about.title} chooses a type itself"
    elif len(set(given.values())) > 1:
        problem = "they name different types"
    return [Finding("dtype-keys", place, problem, "Keep only torch_dtype, with the type of the weights")] * bool(
        problem
    )


def _check_rope(config: dict[str, Any]) -> list[Finding]:
    rope = config.get("rope_scaling")
    if rope is None:
        return []
    if not isinstance(rope, dict):
        problem = "must be an object or null"
    else:
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in _ROPE_NEEDS:
            problem = f"rope_type {kind!r} is not one of {', '.join(_ROPE_NEEDS)}"
        else:
            gone = []
            for key in _ROPE_NEEDS[kind]:
                value = rope.get(key)
                factors = value if isinstance(value, list) and value else [value]
                if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0 for n in factors):
                    gone.append(key)
            problem = f"rope_type {kind!r} needs a number for {', '.join(gone)}" if gone else ""
    return [Finding("rope", "config.json, rope_scaling", problem, _EXPORT)] * bool(problem)


# tokenizer


def check_tokenizer(folder: Path, config: dict[str, Any] | str) -> list[Finding]:
    """Check the vocabulary, tokenizer_config.json, the chat template and generation_config.json."""
    findings = []
    if not any(all((folder / file).is_file() for file in files) for files in _VOCABULARIES):
        needed = ", or ".join(" and ".join(files) for files in _VOCABULARIES)
        findings.append(Finding("tokenizer", "tokenizer.json", f"no vocabulary (looked for {needed})", _EXPORT))
    else:
        findings += _check_vocabulary(folder, config)
    about = read_object(folder / "tokenizer_config.json")
    if isinstance(about, str):
        findings.append(Finding("tokenizer", "tokenizer_config.json", f"the file {about}", _EXPORT))
    else:
        if str(about.get("tokenizer_class", "")).startswith("Pretrained"):
            place, found = "tokenizer_config.json, tokenizer_class", about["tokenizer_class"]
            problem = f"{found} is PaddleNLP's name of the class; transformers refuses it"
            findings.append(Finding("tokenizer", place, problem, "Write PreTrainedTokenizerFast"))
        if about.get("auto_map"):
            problem = "it names code, which servers that trust remote code run"
            findings.append(Finding("code", "tokenizer_config.json, auto_map", problem, "Remove it"))
        findings += _check_template(folder, about) + _check_fields(folder)
    return findings + check_generation(folder, config)


def _check_fields(folder: Path) -> list[Finding]:
    """Check the types and names in tokenizer_config.json and special_tokens_map.json."""
    for name, read in (
        ("tokenizer_config.json", read_tokenizer_config),
        ("special_tokens_map.json", read_special_tokens),
    ):
        try:
            read(folder / name)
        except ModelError as error:
            return [Finding("tokenizer", name, str(error).removeprefix(str(folder / name)).lstrip(": "), _EXPORT)]
    return []


def _check_vocabulary(folder: Path, config: dict[str, Any] | str) -> list[Finding]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return []
    content = read_object(path, TOKENIZER_BYTES)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(model, dict) or "vocab" not in model:
        problem = content if isinstance(content, str) else "is not a tokenizer of the tokenizers library"
        return [Finding("tokenizer", path.name, f"the file {problem}", _EXPORT)]
    ids = _read_ids(model["vocab"], content.get("added_tokens"))
    if ids is None:
        problem = "its vocabulary or added_tokens are not tokens with ids"
        return [Finding("tokenizer", path.name, problem, _EXPORT)]
    rows = read_vocab_size(config)
    if rows is not None and ids and max(ids) >= rows:
        problem = f"token {max(ids):,} is beyond the {rows:,} rows of the embedding (vocab_size)"
        return [Finding("tokenizer", path.name, problem, "Tokenizer and model don't belong together")]
    return []


def _read_ids(vocabulary: Any, added: Any) -> list[int] | None:
    """Read the ids of a vocabulary and its added tokens; None if it is malformed.

    Args:
        vocabulary: token -> id (BPE, WordPiece), or a list of [token, score] (Unigram).
    """
    added = [] if added is None else added
    if not isinstance(vocabulary, (dict, list)) or not isinstance(added, list):
        return None
    own = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    found = [*own, *(token.get("id", 0) if isinstance(token, dict) else None for token in added)]
    ids = [id_ for id_ in found if isinstance(id_, int) and not isinstance(id_, bool)]
    return ids if len(ids) == len(found) else None


def _check_template(folder: Path, about: dict[str, Any]) -> list[Finding]:
    file = folder / TEMPLATE_FILE
    try:
        in_file = None
        if file.is_file():
            in_file = read_bytes(file, limit=CONFIG_BYTES, what="chat template").decode("utf-8", "replace")
        in_config = parse_named_templates(about.get("chat_template"), "tokenizer_config.json").get(DEFAULT)
    except (ConfigError, ModelError) as error:
        return [Finding("template", "tokenizer_config.json", str(error), "Correct the template")]
    source, place = in_file or in_config, TEMPLATE_FILE if in_file else "tokenizer_config.json, chat_template"
    if source is None:
        with contextlib.suppress(ModelError):
            if read_manifest(folder).get("template", "") is None:  # the source had none either
                return []
        problem = "no chat template, so prompts would differ from those in training (or chat is refused)"
        return [Finding("template", TEMPLATE_FILE, problem, "Export from a folder that has the template")]
    if in_file and in_config and in_file.strip() != in_config.strip():
        problem = "differs from the template in tokenizer_config.json; the version of the server decides which is used"
        return [Finding("template", TEMPLATE_FILE, problem, "Keep the same template in both places")]
    tokens = {}
    for key, value in about.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    try:
        ChatTemplate(place, source, tokens).check()
    except ConfigError as error:
        return [Finding("template", place, f"it fails: {error}", "Correct the template")]
    return []
