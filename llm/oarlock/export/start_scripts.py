"""The start script beside an exported model: ports and flags as variables at its top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.export.servers import SERVERS

START_FILE = "start.sh"
ADAPTERS = "adapters"  # folder of the adapters kept beside a model
_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length")
_DEFAULT_LENGTH = 2048  # Bloom's positions have no end

_HEAD = """\
#!/usr/bin/env bash
# Start {title} on this directory (written by `oarlock export --target {target}`).{note}
# Every variable can be set outside: PORT=9000 bash start.sh; words after the script's name go to the server.
set -euo pipefail
MODEL=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
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


def write_start_script(
    target: str, config: Mapping[str, Any], name: str, folder: Path, adapters: Mapping[str, int] | None = None
) -> None:
    """Write start.sh for vLLM or FastDeploy.

    Args:
        config: content of the exported config.json.
        name: under which clients ask for the model.
        adapters: name of each adapter kept in folder/adapters -> its rank.
    """
    server = SERVERS[target]
    note = server.notes.get(config["architectures"][0], "")
    length = next((config[key] for key in _LENGTHS if config.get(key)), _DEFAULT_LENGTH)
    lora = flags = ""
    if adapters:
        modules = " ".join(f'{adapter}="$MODEL/{ADAPTERS}/{adapter}"' for adapter in adapters)
        rank = next((size for size in _VLLM_RANKS if size >= max(adapters.values())), max(adapters.values()))
        lora = _LORA.format(rank=rank, modules=modules)
        flags = ' \\\n  --enable-lora --max-lora-rank "$MAX_RANK" --lora-modules "${ADAPTERS[@]}"'
    body = (_VLLM if target == "vllm" else _FASTDEPLOY).format(
        name=name, dtype=config.get("torch_dtype", "auto"), length=length, lora=lora, lora_flags=flags
    )
    text = _HEAD.format(title=server.title, target=target, note=f"\n# {note}." if note else "") + body
    path = folder / START_FILE
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
