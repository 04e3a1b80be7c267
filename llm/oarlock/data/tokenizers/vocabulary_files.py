"""Making tokenizers from vocabularies without a tokenizer.json, by the conversion rules of transformers 5.

Like transformers 5, this uses the class that tokenizer_config.json names if it is known, else the content of the file.
tests/parity/test_tokenizer_matrix.py compares the two.
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

from oarlock.data.tokenizers.library_errors import convert_errors
from oarlock.data.tokenizers.schema import Tekken, check_lengths, read_vocabulary
from oarlock.data.tokenizers.sentencepiece_file import ModelType, PieceType, read_sentencepiece
from oarlock.errors import ModelError
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import TOKENIZER_BYTES, read_json

_SPACE = "▁"
# The word patterns of Qwen2 and of tiktoken's cl100k, which Llama 3 uses.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TIKTOKEN_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Special tokens for a tekken.json that lists none (before version 7 of the format), in order of their ids.
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
BYTE_LEVEL_CLASSES = ("Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer")


def make_byte_level_tokenizer(vocabulary: Path, merges: Path, kind: str, add_prefix_space: bool) -> Tokenizer:
    """Make a byte-level BPE from vocab.json and merges.txt.

    Args:
        kind: one of BYTE_LEVEL_CLASSES, which split text differently.

    Raises:
        ModelError: if the files do not match.
    """
    check_lengths(read_vocabulary(vocabulary), str(vocabulary))
    read_bytes(merges, limit=TOKENIZER_BYTES, what="list of merges")  # checks its type and size
    with convert_errors(f"{vocabulary} and {merges.name}: not the vocabulary of a byte-level BPE"):
        pieces, pairs = BPE.read_file(str(vocabulary), str(merges))
        found = Tokenizer(BPE(pieces, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    if kind == "Qwen2Tokenizer":
        found.normalizer = normalizers.NFC()
        found.pre_tokenizer = make_word_splitter(QWEN2_WORDS, add_prefix_space)
    else:
        found.normalizer = normalizers.NFC() if kind == "GPTNeoXTokenizer" else None
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    found.decoder = decoders.ByteLevel()
    return found


def make_word_splitter(pattern: str, add_prefix_space: bool = False) -> Any:
    """Make the pre-tokenizer that splits text into the matches of a pattern, and these into bytes."""
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)])


# ---------------------------------------------------------------------------------------------------------------------
# sentencepiece


def make_sentencepiece_tokenizer(
    path: Path, kind: str, legacy: bool | None, add_prefix_space: bool | None, renamed: Mapping[int, str]
) -> tuple[Tokenizer, list[AddedToken], dict[str, str]]:
    """Convert a sentencepiece model.

    Args:
        kind: LlamaTokenizer and GemmaTokenizer have their own conversions. For other names the result equals
            sentencepiece's own encoder.
        legacy, add_prefix_space: from tokenizer_config.json, None if not set.
        renamed: id -> content of added tokens that replace pieces.

    Returns:
        the tokenizer, the tokens to add to it (control pieces are special), and the BOS, EOS and unknown tokens.

    Raises:
        ModelError: if the file is not a sentencepiece model, or can't be expressed as a tokenizer.json.
    """
    model = read_sentencepiece(path)
    spec = model.trainer_spec
    if spec.model_type not in (ModelType.UNIGRAM, ModelType.BPE) or spec.treat_whitespace_as_suffix:
        what = "that puts spaces after words" if spec.treat_whitespace_as_suffix else ModelType(spec.model_type).name
        raise ModelError(
            f"{path}: a sentencepiece model {what}; only BPE and UNIGRAM with spaces before words are supported"
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
        merges = _list_merges_by_id(vocabulary)
        if kind == "LlamaTokenizer":
            prefix = add_prefix_space is not False
            found = Tokenizer(BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True))
            scheme = ("always" if legacy else "first") if prefix else "never"
            found.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
            found.decoder = _make_decoder(byte_fallback=True, strip=prefix)
            return found, added, {}
        found = Tokenizer(BPE(vocabulary, merges, fuse_unk=True, unk_token="<unk>", byte_fallback=True))
        found.normalizer = normalizers.Replace(" ", _SPACE)
        found.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
        found.decoder = _make_decoder(byte_fallback=True, strip=False)
        return found, added, {}
    own = [token for token in added if token.special]
    return _make_plain(model, legacy is not False, renamed), own, special


def _list_merges_by_id(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, ordered by its id. In a BPE model, scores fall with the ids."""
    found = []
    for piece, id_ in vocabulary.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(id_, len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda item: item[:3])
    return [(left, right) for *_, left, right in found]


def _make_decoder(byte_fallback: bool, strip: bool) -> Any:
    parts: list[Any] = [decoders.Replace(_SPACE, " ")]
    parts += [decoders.ByteFallback()] if byte_fallback else []
    parts += [decoders.Fuse()] if byte_fallback or strip else []
    parts += [decoders.Strip(content=" ", left=1)] if strip else []
    return decoders.Sequence(parts)


def _make_plain(model: Any, legacy: bool, renamed: Mapping[int, str]) -> Tokenizer:
    """Make a tokenizer that equals sentencepiece's own encoder: its normalizer, merge order and user-defined pieces.

    Args:
        legacy: add the dummy prefix before each segment between added tokens, not only before the first.
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
                _list_merges_by_score(model, names),
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
    if normal.add_dummy_prefix and legacy:  # sentencepiece adds a prefix even before a space, Metaspace does not
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
    found.decoder = _make_decoder(spec.byte_fallback, normal.add_dummy_prefix)
    return found


def _list_merges_by_score(model: Any, names: list[str]) -> list[tuple[str, str]]:
    """Return the merges of normal pieces, best score first, then by id."""
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
# byte ranks: Mistral's tekken.json, and the tokenizer.model of Llama 3 as published by Meta


def make_tekken_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Convert Mistral's tekken.json. Also returns its BOS, EOS, unknown and padding tokens.

    Raises:
        ModelError: if the file is damaged or of an unknown version.
    """
    try:
        content = read_json(path, Tekken, limit=TOKENIZER_BYTES)
        config = content["config"]
        special = list(_TEKKEN_SPECIAL)
        if (listed := content.get("special_tokens")) is not None:
            listed = sorted(listed, key=lambda item: item["rank"])
            if [item["rank"] for item in listed] != list(range(len(listed))):
                raise ValueError("its special tokens do not have consecutive ranks from 0")
            special = [item["token_str"] for item in listed]
        num_special = config.get("default_num_special_tokens") or len(special)
        special += [f"<SPECIAL_{i}>" for i in range(len(special), num_special)]
        ranks = [base64.b64decode(item["token_bytes"], validate=True) for item in content["vocab"]]
        if (size := config.get("default_vocab_size")) is not None:  # entries after it are padding
            ranks = ranks[: max(0, size - len(special))]
        pattern = config["pattern"]
    except (ValueError, binascii.Error) as error:
        raise ModelError(
            f"{path}: not a supported tekken.json ({type(error).__name__}: {error}); save the tokenizer with "
            "transformers (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a tokenizer.json)"
        ) from error
    found = _make_from_ranks(ranks, special, pattern, str(path))
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return found, {name: token for name, token in names.items() if token in special}


def make_tiktoken_tokenizer(path: Path, special: list[str]) -> Tokenizer:
    """Convert a tiktoken file (lines "base64 rank"), with Llama 3's word pattern.

    Args:
        special: tokens after the vocabulary, in order of their ids.

    Raises:
        ModelError: if the file is neither this nor a sentencepiece model.
    """
    try:
        content = read_bytes(path, limit=TOKENIZER_BYTES, what="vocabulary of tiktoken")
        pairs = [line.split() for line in content.splitlines() if line.strip()]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in pairs}
        if sorted(ranks) != list(range(len(ranks))):
            raise ValueError("its ranks have gaps")
    except (ValueError, binascii.Error) as error:
        raise ModelError(f"{path}: neither a sentencepiece model nor a tiktoken file ({error})") from error
    found = _make_from_ranks([ranks[i] for i in range(len(ranks))], [], _TIKTOKEN_WORDS, str(path))
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


def _make_from_ranks(ranks: list[bytes], before: list[str], pattern: str, place: str) -> Tokenizer:
    """Make a byte-level BPE from byte strings in merge order.

    Args:
        before: tokens with the ids before the others.
        place: the file, for messages.
    """
    check_lengths(ranks, place)
    # GPT-2's table: printable bytes are written as themselves, others as letters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    tokens = ["".join(letters[byte] for byte in token) for token in ranks]
    order = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in order and pair[1] in order]
        merges += sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]]))
    vocabulary = {token: rank + len(before) for token, rank in order.items()}
    vocabulary |= {token: id_ for id_, token in enumerate(before)}
    found = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    found.pre_tokenizer = make_word_splitter(pattern)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    return found
