"""A tokenizer.json of a sentencepiece model, for readers that take nothing else as it stands.

PaddleNLP's own converter needs an older protobuf than the rest of this environment; that of transformers would do, but
makes another tokenizer in its version 5 (no space before a text that begins with one).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

_SPACE = "▁"


def llama_tokenizer_json(tokenizer: Any) -> str | None:
    """tokenizer.json of PaddleNLP's LlamaTokenizer; None where its model is no byte-pair encoding.

    A sentencepiece BPE gives its pieces the scores 0, -1, -2, ... in the order in which they were merged.
    """
    model = tokenizer.sp_model
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    plain = [i for i in range(len(pieces)) if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    if any(model.get_score(i) != round(model.get_score(i)) for i in plain):
        return None
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [pair for i in sorted(plain, key=lambda i: -model.get_score(i)) for pair in _splits(pieces[i], vocabulary)]
    fallback = any(model.is_byte(i) for i in range(len(pieces)))
    unknown = pieces[model.unk_id()]
    found = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    found.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    found.decoder = decoders.Sequence(spaces)
    special = [str(token) for token in (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) if token]
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    begin = [str(tokenizer.bos_token)] if getattr(tokenizer, "add_bos_token", False) else []
    end = [str(tokenizer.eos_token)] if getattr(tokenizer, "add_eos_token", False) else []
    if begin or end:
        ids = [(token, found.token_to_id(token)) for token in (*begin, *end)]
        pair = [*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)]
        found.post_processor = processors.TemplateProcessing(
            single=" ".join([*begin, "$A", *end]), pair=" ".join(pair), special_tokens=ids
        )
    return found.to_str(pretty=True)


def _splits(piece: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that may be merged into this one, those of the earliest pieces first."""
    pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
