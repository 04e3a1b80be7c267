"""The tensors of the Triton models: those of a prompt, and one for each sampling parameter.

The models in an exported repository that pass requests on carry a copy of this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oarlock.sampling.params import OPTIONS

OUTPUTS = ("text_output", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class InputTensor:
    """An input of the streaming model; all of them are optional.

    Attributes:
        kind: str, int, float or bool, of each element.
        is_list: whether its shape is [n], and not [1].
        datatype: as in config.pbtxt, without "TYPE_".
    """

    kind: type
    is_list: bool
    datatype: str


INPUTS: Mapping[str, InputTensor] = {
    "text_input": InputTensor(str, False, "STRING"),
    "messages": InputTensor(str, False, "STRING"),
    "tools": InputTensor(str, False, "STRING"),
    "input_ids": InputTensor(int, True, "INT32"),
    "chat": InputTensor(bool, False, "BOOL"),
    "stream": InputTensor(bool, False, "BOOL"),
    "adapter": InputTensor(str, False, "STRING"),
} | {option.name: InputTensor(option.kind, option.is_list, option.datatype) for option in OPTIONS.values()}
