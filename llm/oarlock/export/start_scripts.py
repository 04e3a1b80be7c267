"""Write the start script of an exported model, with its ports and settings as variables at the top.

Its values come from a config.json, so from the author of the model: they are checked, and quoted for the shell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.errors import ModelError
from oarlock.export.checks.findings import format_value, read_object
from oarlock.export.servers import SERVED_NAME, SERVERS, find_server_note
from oarlock.files import PEFT_FILE
from oarlock.formats.quoting import quote_shell_word

START_FILE = "start.sh"
ADAPTERS = "adapters"  # folder of the adapters that are exported next to a model
LENGTHS = ("max_position_embeddings", "n_positions", "seq_length")
_DEFAULT_LENGTH = 2048  # Bloom has no largest position
MOST_LENGTH, _MOST_RANK = 1 << 31, 1 << 16
_DTYPES = ("auto", "float32", "float16", "bfloat16")

_HEAD = """\
#!/usr/bin/env bash
# Start {title} on this directory (written by `oarlock export --target {target}`).{note}
# Every variable can be set outside: PORT=9000 bash start.sh; words after the script's name go to the server.
set -euo pipefail
MODEL=${{BASH_SOURCE[0]%"${{BASH_SOURCE[0]##*/}}"}}
[[ $MODEL = /* ]] || MODEL=$PWD/$MODEL
MODEL=${{MODEL%/}}
"""
_VLLM = """\
HOST=${{HOST:-127.0.0.1}}  # 0.0.0.0 opens it to other machines
PORT=${{PORT:-8000}}
NAME=${{NAME:-{name}}}  # what clients call the model
DTYPE=${{DTYPE:-{dtype}}}
MAX_LENGTH=${{MAX_LENGTH:-{length}}}  # tokens of a question and its answer together
{lora}
exec vllm serve "$MODEL" --served-model-name "$NAME" --dtype "$DTYPE" --max-model-len "$MAX_LENGTH" \\
  --host "$HOST" --port "$PORT"{lora_flags} "$@"
"""
_FASTDEPLOY = """\
HOST=${{HOST:-127.0.0.1}}  # 0.0.0.0 opens it to other machines
PORT=${{PORT:-8180}}
METRICS_PORT=${{METRICS_PORT:-8181}}
QUEUE_PORT=${{QUEUE_PORT:-8182}}  # between FastDeploy's own processes
NAME=${{NAME:-{name}}}  # what clients call the model
MAX_LENGTH=${{MAX_LENGTH:-{length}}}  # tokens of a question and its answer together
PYTHON=${{PYTHON:-python}}

exec "$PYTHON" -m fastdeploy.entrypoints.openai.api_server --model "$MODEL" --served-model-name "$NAME" \\
  --host "$HOST" --port "$PORT" --metrics-port "$METRICS_PORT" --engine-worker-queue-port "$QUEUE_PORT" \\
  --max-model-len "$MAX_LENGTH" --load-choices default_v1 "$@"
"""
_LORA = """\
MAX_RANK=${{MAX_RANK:-{rank}}}  # of the adapters
ADAPTERS=({modules})
"""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def format_start_script(
    target: str, config: Mapping[str, Any], name: str, adapters: Mapping[str, int] | None = None
) -> str:
    """Format start.sh for vLLM or FastDeploy. Every value in it is checked and quoted.

    Args:
        target: "vllm" or "fastdeploy".
        config: content of the exported config.json.
        name: name of the model for clients.
        adapters: name of each adapter in the folder ADAPTERS -> its rank.

    Raises:
        ModelError: when a field of config.json, a name or a rank is malformed.
    """
    server, adapters = SERVERS[target], adapters or {}
    for word in (name, *adapters):
        if not SERVED_NAME.fullmatch(word):
            raise ModelError(f"{word!r} can't be the name of a served model or adapter; use letters, digits, . _ -")
    named = config.get("architectures")
    note = find_server_note(target, named[0]) if isinstance(named, list) and named and isinstance(named[0], str) else ""
    lora = flags = ""
    if adapters:
        modules = " ".join(
            f'{quote_shell_word(word)}="$MODEL"/{quote_shell_word(f"{ADAPTERS}/{word}")}' for word in adapters
        )
        rank = max(_check_whole_number(f"{PEFT_FILE}, r", rank, _MOST_RANK) for rank in adapters.values())
        rank = next((size for size in _VLLM_RANKS if size >= rank), rank)
        lora = _LORA.format(rank=quote_shell_word(rank), modules=modules)
        flags = ' \\\n  --enable-lora --max-lora-rank "$MAX_RANK" --lora-modules "${ADAPTERS[@]}"'
    dtype = str(config.get("torch_dtype", "auto"))
    if dtype not in _DTYPES:
        raise ModelError(f"config.json, torch_dtype: {format_value(dtype)} is not one of {', '.join(_DTYPES)}")
    field = next((key for key in LENGTHS if config.get(key) is not None), None)
    length = _DEFAULT_LENGTH
    if field is not None:
        length = _check_whole_number(f"config.json, {field}", config[field], MOST_LENGTH)
    body = (_VLLM if target == "vllm" else _FASTDEPLOY).format(
        name=quote_shell_word(name),
        dtype=quote_shell_word(dtype),
        length=quote_shell_word(length),
        lora=lora,
        lora_flags=flags,
    )
    return _HEAD.format(title=server.title, target=target, note=f"\n# {note}." if note else "") + body


def read_adapter_ranks(folder: Path) -> dict[str, int]:
    """Read the rank of each adapter that is exported next to a model from its adapter_config.json.

    Raises:
        ModelError: when a rank is malformed.
    """
    found = {}
    for path in sorted((folder / ADAPTERS).glob("*")):
        config, place = read_object(path / PEFT_FILE), f"{ADAPTERS}/{path.name}/{PEFT_FILE}"
        if isinstance(config, str):
            raise ModelError(f"{place}: the file {config}")
        found[path.name] = _check_whole_number(f"{place}, r", config.get("r"), _MOST_RANK)
    return found


def write_start_script(
    target: str, config: Mapping[str, Any], name: str, folder: Path, adapters: Mapping[str, int] | None = None
) -> None:
    """Write start.sh into a folder; the other arguments are those of format_start_script()."""
    path = folder / START_FILE
    path.write_text(format_start_script(target, config, name, adapters), encoding="utf-8")
    path.chmod(0o755)


def _check_whole_number(place: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ModelError(f"{place}: must be a whole number from 1 to {most:,}; it is {format_value(value)}")
    return value
