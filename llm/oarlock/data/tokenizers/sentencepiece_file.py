"""Reading a sentencepiece model file (protobuf) without the module that sentencepiece generates for it.

That module does not work with the protobuf of this environment (VisualDL needs a version below 6). The fields used here
are declared with the numbers and defaults of sentencepiece_model.proto (https://github.com/google/sentencepiece, 0.2).
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from oarlock.data.tokenizers.schema import check_lengths
from oarlock.errors import ModelError
from oarlock.formats.files import read_bytes
from oarlock.formats.json_file import TOKENIZER_BYTES

_PACKAGE = "oarlock.sentencepiece"
# message -> (field, number, type, default). A capitalized type is another message.
_MESSAGES: dict[str, list[tuple[str, int, str, str]]] = {
    "Piece": [("piece", 1, "string", ""), ("score", 2, "float", "0"), ("type", 3, "int32", "1")],
    "TrainerSpec": [
        ("model_type", 3, "int32", "1"),
        ("byte_fallback", 35, "bool", "false"),
        ("treat_whitespace_as_suffix", 24, "bool", "false"),
        ("unk_id", 40, "int32", "0"),
        ("bos_id", 41, "int32", "1"),
        ("eos_id", 42, "int32", "2"),
        ("pad_id", 43, "int32", "-1"),
        ("unk_piece", 45, "string", "<unk>"),
        ("bos_piece", 46, "string", "<s>"),
        ("eos_piece", 47, "string", "</s>"),
        ("pad_piece", 48, "string", "<pad>"),
    ],
    "NormalizerSpec": [
        ("precompiled_charsmap", 2, "bytes", ""),
        ("add_dummy_prefix", 3, "bool", "true"),
        ("remove_extra_whitespaces", 4, "bool", "true"),
        ("escape_whitespaces", 5, "bool", "true"),
    ],
    "Model": [
        ("pieces", 1, "Piece*", ""),
        ("trainer_spec", 2, "TrainerSpec", ""),
        ("normalizer_spec", 3, "NormalizerSpec", ""),
    ],
}


class ModelType(IntEnum):
    """The algorithm of a model."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class PieceType(IntEnum):
    """The type of a vocabulary entry."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@cache
def _make_message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            label = kinds.LABEL_REPEATED if kind.endswith("*") else kinds.LABEL_OPTIONAL
            if kind[0].isupper():
                message.field.add(
                    name=field,
                    number=number,
                    label=label,
                    type=kinds.TYPE_MESSAGE,
                    type_name=f".{_PACKAGE}.{kind.rstrip('*')}",
                )
            else:
                message.field.add(
                    name=field,
                    number=number,
                    label=label,
                    type=getattr(kinds, f"TYPE_{kind.upper()}"),
                    default_value=default,
                )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def read_sentencepiece(path: Path) -> Any:
    """Read a model: `pieces` (piece, score, type), `trainer_spec` and `normalizer_spec`, as sentencepiece names them.

    Raises:
        ModelError: if the file is not a sentencepiece model.
    """
    model = _make_message_class()()
    try:
        model.ParseFromString(read_bytes(path, limit=TOKENIZER_BYTES, what="sentencepiece model"))
        valid = bool(model.pieces)
    except (DecodeError, UnicodeDecodeError):
        valid = False
    if not valid:
        raise ModelError(f"{path}: not a sentencepiece model")
    check_lengths((piece.piece for piece in model.pieces), str(path))
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise ModelError(f"{path}: the score of a piece is not a finite number")
    return model
