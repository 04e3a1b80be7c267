"""Triton's metadata, configurations and statistics, as its REST writes them."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

# Extensions of Triton that this server does not offer.
_CLOSED = ("model_repository", "system_shared_memory", "cuda_shared_memory", "trace", "logging")
_WHOLE = (
    FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64, FieldDescriptor.TYPE_SINT64,
)  # fmt: skip


def read_server_metadata(answer: Any) -> dict[str, Any]:
    extensions = [name for name in answer.extensions if not name.startswith(_CLOSED)]
    return {"name": answer.name, "version": answer.version, "extensions": extensions}


def read_model_metadata(answer: Any) -> dict[str, Any]:
    return {
        "name": answer.name,
        "versions": list(answer.versions),
        "platform": answer.platform,
        "inputs": [_read_tensor(one) for one in answer.inputs],
        "outputs": [_read_tensor(one) for one in answer.outputs],
    }


def to_dict(message: Message) -> dict[str, Any]:
    """Every field of a message, in its order.

    Protobuf's own JSON puts empty fields last, and writes whole numbers of 64 bits as texts. Triton does not.
    """
    content = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _order_fields(content, message.DESCRIPTOR)


def _read_tensor(one: Any) -> dict[str, Any]:
    return {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}


def _order_fields(content: dict[str, Any], kind: Any) -> dict[str, Any]:
    return {field.name: _convert_value(content[field.name], field) for field in kind.fields if field.name in content}


def _convert_value(value: Any, field: Any) -> Any:
    inner = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        of_map = inner.fields_by_name["value"]
        return {key: _convert_value(item, of_map) for key, item in value.items()}
    if isinstance(value, list):
        return [_convert_value(item, field) for item in value]
    if inner is not None:
        return _order_fields(value, inner) if isinstance(value, dict) else value
    return int(value) if field.type in _WHOLE else value
