"""All harnesses: the module in this folder that defines HARNESS, and the packages whose branches atheris instruments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A harness; `instrument` names further Python packages."""

    module: str
    instrument: tuple[str, ...] = ()


TABLE = {
    "admin": Row("fuzz_admin"),
    "json": Row("fuzz_json"),
    "yaml": Row("fuzz_yaml", ("yaml",)),
    "grpc": Row("fuzz_grpc"),
    "grpc_request": Row("fuzz_grpc_request"),
    "corpus": Row("fuzz_corpus"),
    "records": Row("fuzz_records"),
    "templates": Row("fuzz_templates"),
    "http": Row("fuzz_http", ("h11", "uvicorn")),
    "http-socket": Row("fuzz_http_socket", ("h11", "uvicorn")),
    "safetensors": Row("fuzz_safetensors"),
    "export": Row("fuzz_export"),
    "index": Row("fuzz_index"),
    "model_folder": Row("fuzz_model_folder"),
    "checkpoint": Row("fuzz_checkpoint"),
    "ranks": Row("fuzz_ranks"),
}
