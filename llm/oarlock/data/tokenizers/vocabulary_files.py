"""Vocabularies without a tokenizer.json -> tokenizers of the `tokenizers` library, as transformers 5 converts them.

transformers 5 goes by the class that tokenizer_config.json names where it knows it, else by what the file itself says;
so does this. Checked against it in tests/parity/test_tokenizer_matrix.py.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from oarlock.data.tokenizers.library_errors import library_errors
from oarlock.data.tokenizers.schema import Tekken, check_lengths, read_vocabulary
from oarlock.data.tokenizers.sentencepiece_file import ModelType, PieceType, read_sentencepiece
from oarlock.errors import ModelError
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import TOKENIZER_BYTES, read_json

_SPACE = "▁"
# Qwen2's way to cut text into words, and that of tiktoken's cl100k, which Llama 3 uses.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TIKTOKEN_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Special tokens of a tekken.json that lists none (before version 7 of the format), in the order of their ids.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
BYTE_LEVEL_CLASSES = ("Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer")


def byte_level_tokenizer(vocabulary: Path, merges: Path, kind: str, add_prefix_space: bool) -> Tokenizer:
    """Of vocab.json and merges.txt.

    Args:
        kind: one of BYTE_LEVEL_CLASSES, which cut text into words in different ways.

    Raises:
        ModelError: when the files do not fit each other.
    """
    check_lengths(read_vocabulary(vocabulary), str(vocabulary))
    read_bytes(merges, limit=TOKENIZER_BYTES, what="list of merges")  # a regular file, and not too large
    with library_errors(f"{vocabulary} and {merges.name}: not the vocabulary of a byte-level BPE"):
        pieces, pairs = BPE.read_file(str(vocabulary), str(merges))
        found = Tokenizer(BPE(pieces, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    if kind == "Qwen2Tokenizer":
        found.normalizer = normalizers.NFC()
        found.pre_tokenizer = _words(_QWEN2_WORDS, add_prefix_space)
    else:
        found.normalizer = normalizers.NFC() if kind == "GPTNeoXTokenizer" else None
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    found.decoder = decoders.ByteLevel()
    return found


def _words(pattern: str, add_prefix_space: bool = False) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)])


# ---------------------------------------------------------------------------------------------------------------------
# sentencepiece


def sentencepiece_tokenizer(
    path: Path, kind: str, legacy: bool | None, add_prefix_space: bool | None, renamed: Mapping[int, str]
) -> tuple[Tokenizer, list[AddedToken], dict[str, str]]:
    """Of a sentencepiece model.

    Args:
        kind: LlamaTokenizer and GemmaTokenizer have ways of their own; with any other name the file is followed, so
            that texts become what sentencepiece itself makes of them.
        legacy, add_prefix_space: as tokenizer_config.json says, None where it does not.
        renamed: id -> content, for pieces that the added tokens of tokenizer_config.json stand in for.

    Returns:
        the tokenizer, the tokens to add to it (control pieces are special), and the begin, end and unknown tokens.

    Raises:
        ModelError: when the file is not a sentencepiece model, or of a kind that no tokenizer.json expresses.
    """
    model = read_sentencepiece(path)
    spec = model.trainer_spec
    if spec.model_type not in (ModelType.UNIGRAM, ModelType.BPE) or spec.treat_whitespace_as_suffix:
        what = "that puts spaces behind words" if spec.treat_whitespace_as_suffix else ModelType(spec.model_type).name
        raise ModelError(
            f"{path}: a sentencepiece model {what}; only BPE and UNIGRAM, with spaces before words, are read"
        )
    named = {"unk_token": (spec.unk_id, spec.unk_piece), "bos_token": (spec.bos_id, spec.bos_piece)}
    named["eos_token"] = (spec.eos_id, spec.eos_piece)
    special = {name: piece for name, (id_, piece) in named.items() if id_ >= 0}
    added = [
        AddedToken(piece.piece, normalized=False, special=piece.type == PieceType.CONTROL)
        for piece in model.pieces
        if piece.type in (PieceType.CONTROL, PieceType.USER_DEFINED)
    ]
    if kind in ("LlamaTokenizer", "GemmaTokenizer") and spec.model_type == ModelType.BPE:
        vocabulary = {piece.piece: id_ for id_, piece in enumerate(model.pieces)}
        merges = _merges_in_order_of_ids(vocabulary)
        if kind == "LlamaTokenizer":
            return _llama(vocabulary, merges, bool(legacy), add_prefix_space is not False), added, {}
        return _gemma(vocabulary, merges), added, {}
    own = [token for token in added if token.special]
    return _as_the_file_says(model, legacy is not False, renamed), own, special


def _merges_in_order_of_ids(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order of what they make: scores fall with the ids of a BPE."""
    found = []
    for piece, id_ in vocabulary.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(id_, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda item: item[:3])
    return [(left, right) for *_, left, right in found]


def _llama(vocabulary: dict[str, int], merges: list[tuple[str, str]], legacy: bool, prefix: bool) -> Tokenizer:
    found = Tokenizer(BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True))
    scheme = ("always" if legacy else "first") if prefix else "never"
    found.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    found.decoder = _decoder(byte_fallback=True, strip=prefix)
    return found


def _gemma(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    found = Tokenizer(BPE(vocabulary, merges, fuse_unk=True, unk_token="<unk>", byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", _SPACE)
    found.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
    found.decoder = _decoder(byte_fallback=True, strip=False)
    return found


def _decoder(byte_fallback: bool, strip: bool) -> Any:
    parts: list[Any] = [decoders.Replace(_SPACE, " ")]
    parts += [decoders.ByteFallback()] if byte_fallback else []
    parts += [decoders.Fuse()] if byte_fallback or strip else []
    parts += [decoders.Strip(content=" ", left=1)] if strip else []
    return decoders.Sequence(parts)


def _as_the_file_says(model: Any, legacy: bool, renamed: Mapping[int, str]) -> Tokenizer:
    """What sentencepiece's own encoder gives: its normaliser, its order of merges, its user-defined pieces kept whole.

    Args:
        legacy: put the dummy prefix before every stretch between added tokens, not the first alone.
    """
    spec, normal = model.trainer_spec, model.normalizer_spec
    kept = {piece.piece for id_, piece in enumerate(model.pieces) if id_ not in renamed}
    names = [
        renamed[id_]
        if id_ in renamed and renamed[id_] not in kept and spec.model_type == ModelType.BPE
        else piece.piece
        for id_, piece in enumerate(model.pieces)
    ]
    own = [name for name, piece in zip(names, model.pieces, strict=True) if piece.type == PieceType.USER_DEFINED]
    if spec.model_type == ModelType.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        found = Tokenizer(Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback))
    else:
        found = Tokenizer(
            BPE(
                {name: id_ for id_, name in enumerate(names)},
                _merges_by_score(model, names),
                unk_token=spec.unk_piece,
                fuse_unk=True,
                byte_fallback=spec.byte_fallback,
                ignore_merges=bool(own),
            )
        )
    steps: list[Any] = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Replace(" ", _SPACE)] if normal.escape_whitespaces else []
    if normal.add_dummy_prefix and legacy:  # Metaspace puts none before a text that begins with one, sentencepiece does
        steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), 2 * _SPACE))
    found.normalizer = normalizers.Sequence(steps)
    words: list[Any] = []
    if normal.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        words.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False))
    if own:
        pattern = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
        words.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    if words:
        found.pre_tokenizer = pre_tokenizers.Sequence(words)
    found.decoder = _decoder(spec.byte_fallback, normal.add_dummy_prefix)
    return found


def _merges_by_score(model: Any, names: list[str]) -> list[tuple[str, str]]:
    """The best score first, then the earlier piece; normal pieces alone are merged."""
    ranks = {
        name: (-piece.score, id_)
        for id_, (name, piece) in enumerate(zip(names, model.pieces, strict=True))
        if piece.type == PieceType.NORMAL
    }
    found = []
    for piece, rank in ranks.items():
        for i in range(1, len(piece)):
            if piece[:i] in ranks and piece[i:] in ranks:
                found.append((*rank, piece[:i], piece[i:]))
    return [(left, right) for *_, left, right in sorted(found)]


# ---------------------------------------------------------------------------------------------------------------------
# ranks of bytes: tekken.json of Mistral, the tokenizer.model of Llama 3 as Meta gives it out


def tekken_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Of Mistral's tekken.json; and its begin, end, unknown and padding tokens.

    Raises:
        ModelError: when the file is damaged or of a form that is not known.
    """
    try:
        content = read_json(path, Tekken, limit=TOKENIZER_BYTES)
        config = content["config"]
        special = _tekken_special(content)
        ranks = [base64.b64decode(item["token_bytes"], validate=True) for item in content["vocab"]]
        if (size := config.get("default_vocab_size")) is not None:  # what is behind it is padding
            ranks = ranks[: max(0, size - len(special))]
        pattern = config["pattern"]
    except (ValueError, binascii.Error) as error:
        raise ModelError(
            f"{path}: not a tekken.json that is known here ({type(error).__name__}: {error}); save the tokenizer with "
            "transformers (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a tokenizer.json)"
        ) from error
    found = _byte_ranks(ranks, special, pattern, str(path))
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return found, {name: token for name, token in names.items() if token in special}


def _tekken_special(content: Tekken) -> list[str]:
    """The special tokens in the order of their ids, which begin at 0."""
    listed = content.get("special_tokens")
    if listed is None:
        names = list(_TEKKEN_SPECIAL)
    else:
        ordered = sorted(listed, key=lambda item: item["rank"])
        if [item["rank"] for item in ordered] != list(range(len(ordered))):
            raise ValueError("its special tokens have no consecutive ranks from 0 on")
        names = [item["token_str"] for item in ordered]
    size = content["config"].get("default_num_special_tokens") or len(names)
    return names + [f"<SPECIAL_{i}>" for i in range(len(names), size)]


def tiktoken_tokenizer(path: Path, special: list[str]) -> Tokenizer:
    """Of lines "base64 rank", tiktoken's form, with Llama 3's way to cut text into words.

    Args:
        special: tokens behind the vocabulary, in the order of their ids.

    Raises:
        ModelError: when the file is neither this nor a sentencepiece model.
    """
    try:
        content = read_bytes(path, limit=TOKENIZER_BYTES, what="vocabulary of tiktoken")
        pairs = [line.split() for line in content.splitlines() if line.strip()]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in pairs}
        if sorted(ranks) != list(range(len(ranks))):
            raise ValueError("its ranks have gaps")
    except (ValueError, binascii.Error) as error:
        raise ModelError(f"{path}: neither a sentencepiece model nor a file of tiktoken ({error})") from error
    found = _byte_ranks([ranks[i] for i in range(len(ranks))], [], _TIKTOKEN_WORDS, str(path))
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


def _byte_ranks(ranks: list[bytes], before: list[str], pattern: str, place: str) -> Tokenizer:
    """A byte-level BPE of byte strings in the order of their merging.

    Args:
        before: tokens with the ids before them.
        place: the file, for messages.
    """
    check_lengths(ranks, place)
    letters = _byte_letters()
    spelled = ["".join(letters[byte] for byte in token) for token in ranks]
    order = {token: rank for rank, token in enumerate(spelled)}
    merges = []
    for token in spelled:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in order and pair[1] in order]
        merges += sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]]))
    vocabulary = {token: rank + len(before) for token, rank in order.items()}
    vocabulary |= {token: id_ for id_, token in enumerate(before)}
    found = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    found.pre_tokenizer = _words(pattern)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    return found


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
