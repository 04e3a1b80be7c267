"""The configuration of a server, made by `oarlock serve`; the front gets it as JSON. Imports no paddle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from oarlock.errors import ConfigError

# Where the spelling of a special token in a client's text is that token: in raw prompts, which are a template's output
# by nature (as in vLLM), in messages too, or nowhere.
Parsing = Literal["prompts", "all", "none"]
PARSINGS: tuple[str, ...] = get_args(Parsing)
# Environment variable of Triton: a JSON object with settings that replace those of config.pbtxt.
SETTINGS_VARIABLE = "OARLOCK_SERVE"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine and of requests, and how texts are read.

    An exported repository has them as parameters in config.pbtxt.

    Attributes:
        max_batch: requests that are answered at a time; the others wait.
        max_queue: requests that may wait.
        max_tokens: tokens of an answer.
        max_length: tokens of a prompt and its answer together; 0 for the model's context.
        timeout: seconds for a request, from submit() to the last token.
        max_body: bytes of a request.
        parse_special_tokens: where a client's text is read as special tokens.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_tokens: int = 4096
    max_length: int = 0
    timeout: float = 600.0
    max_body: int = 1 << 20
    parse_special_tokens: Parsing = "prompts"

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], overrides: Mapping[str, Any]) -> EngineConfig:
        """The configuration that a repository's parameters give.

        Args:
            overrides: values that replace those of the repository.

        Raises:
            ConfigError: when one is not a number, or out of range.
        """
        given: dict[str, Any] = {**parameters, **overrides}
        kinds: dict[str, Callable[[Any], Any]] = {"timeout": float, "parse_special_tokens": str}
        try:
            values = {name: kinds.get(name, int)(given[name]) for name in ENGINE_SETTINGS if name in given}
        except ValueError as error:
            raise ConfigError(f"config.pbtxt: a parameter is not a number: {error}") from error
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Refuse values that a server can't have.

        Raises:
            ConfigError: naming the flag.
        """
        if self.parse_special_tokens not in PARSINGS:
            raise ConfigError(
                f"--parse-special-tokens {self.parse_special_tokens}: it must be one of {', '.join(PARSINGS)}"
            )
        for name, value in asdict(self).items():
            if isinstance(value, str):
                continue
            least = 0 if name == "max_length" else 1
            if not least <= value < 1 << 40:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: it must be at least {least}")


ENGINE_SETTINGS: tuple[str, ...] = tuple(item.name for item in fields(EngineConfig))


@dataclass(frozen=True)
class TritonConfig:
    """The models that Triton serves, and its sockets.

    Triton has no port: clients come to the front, which asks Triton through Unix sockets in a folder that only this
    user can open.

    Attributes:
        repository: model repository of `oarlock export --target triton`.
        model: name of the streaming model, which has the engine.
        models: names of all models that clients may ask, `model` among them.
        settings: fields of EngineConfig that replace those of the repository's config.pbtxt.
        run: the folder of this server (mode 0700): sockets, Triton's backend, notes of the models.
        memory_prefix: of Triton's regions of shared memory.
        start_seconds: time to load the model.
    """

    repository: str = ""
    model: str = "oarlock"
    models: tuple[str, ...] = ("oarlock", "oarlock_infer", "oarlock_json")
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    memory_prefix: str = ""
    start_seconds: float = 600.0
    verbose: bool = False

    @property
    def shown_repository(self) -> Path:
        """The repository that Triton reads: see served_repository.py."""
        return Path(self.run, "models")

    @property
    def grpc_socket(self) -> Path:
        """Socket for requests. (Triton appends a colon and the port to any address it is given.)"""
        return Path(self.run, "grpc:1")

    @property
    def metrics_socket(self) -> Path:
        """Socket for Triton's metrics, over HTTP."""
        return Path(self.run, "metrics")


@dataclass(frozen=True)
class FrontConfig:
    """The ports of the front, and the requests that it lets through.

    Attributes:
        host: address of all four ports.
        temperature: of OpenAI requests that set none.
        body_seconds: time from the first to the last byte of a request.
        max_open: requests that may be open; further ones get 429. 0 for twice what the model takes.
        max_open_per_client: the same for one client. 0 for what the model takes.
        max_connections: open connections of one HTTP port.
        allowed_hosts: names that requests may be addressed to, besides the server's own.
        cors_origins: web pages (scheme://host:port) that may send requests; none by default.
        tls_certificate, tls_key: files in PEM; "" for no encryption.
    """

    host: str = "127.0.0.1"
    openai_port: int = 8080
    rest_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    temperature: float = 1.0
    body_seconds: float = 30.0
    max_open: int = 0
    max_open_per_client: int = 0
    max_connections: int = 2000
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    tls_certificate: str = ""
    tls_key: str = ""

    @property
    def has_tls(self) -> bool:
        """All ports are encrypted."""
        return bool(self.tls_certificate)

    @property
    def is_local(self) -> bool:
        """Only this machine reaches the ports."""
        return self.host in LOOPBACK


@dataclass(frozen=True)
class ServeConfig:
    """The whole configuration.

    Attributes:
        drain_seconds: time for open requests when the server is stopped.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    triton: TritonConfig = field(default_factory=TritonConfig)
    front: FrontConfig = field(default_factory=FrontConfig)
    drain_seconds: float = 30.0

    @property
    def max_open(self) -> int:
        """Requests that may be open on all ports."""
        return self.front.max_open or 2 * self._places + 32

    @property
    def max_open_per_client(self) -> int:
        """Requests of one client that may be open.

        One client may fill the model's queue, which then refuses its requests; others still get their own answer.
        """
        return self.front.max_open_per_client or min(self._places + 16, self.front.max_open or self._places + 16)

    @property
    def _places(self) -> int:
        return self.engine.max_batch + self.engine.max_queue

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ServeConfig:
        """The configuration that to_dict() gave."""
        sections = {"engine": EngineConfig, "triton": TritonConfig, "front": FrontConfig}
        made: dict[str, Any] = {}
        for section, kind in sections.items():
            items = values[section].items()
            made[section] = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in items})
        return cls(**made, drain_seconds=values["drain_seconds"])
