"""What Triton tells of itself and its models, as its REST writes it."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

# What this server does not do, whatever Triton could.
_CLOSED = ("model_repository", "system_shared_memory", "cuda_shared_memory", "trace", "logging")
_WHOLE = (
    FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64, FieldDescriptor.TYPE_SINT64,
)  # fmt: skip


def server_metadata(answer: Any) -> dict[str, Any]:
    """Of ServerMetadataResponse."""
    extensions = [name for name in answer.extensions if not name.startswith(_CLOSED)]
    return {"name": answer.name, "version": answer.version, "extensions": extensions}


def model_metadata(answer: Any) -> dict[str, Any]:
    """Of ModelMetadataResponse."""
    return {
        "name": answer.name,
        "versions": list(answer.versions),
        "platform": answer.platform,
        "inputs": [_tensor(one) for one in answer.inputs],
        "outputs": [_tensor(one) for one in answer.outputs],
    }


def as_dict(message: Message) -> dict[str, Any]:
    """Every field of a message; protobuf's JSON writes whole numbers of 64 bits as texts, Triton as numbers."""
    content = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _make_whole(content, message.DESCRIPTOR)
    return content


def _tensor(one: Any) -> dict[str, Any]:
    return {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}


def _make_whole(content: dict[str, Any], kind: Any) -> None:
    for field in kind.fields:
        value = content.get(field.name)
        if value is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"]
            if inner.message_type is not None:
                for item in value.values():
                    _make_whole(item, inner.message_type)
            elif inner.type in _WHOLE:
                content[field.name] = {key: int(item) for key, item in value.items()}
        elif field.message_type is not None:
            for item in value if isinstance(value, list) else [value]:
                _make_whole(item, field.message_type)
        elif field.type in _WHOLE:
            content[field.name] = [int(item) for item in value] if isinstance(value, list) else int(value)
