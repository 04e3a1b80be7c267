"""`oarlock chat`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oarlock.cli.flags import Command, flag, positional
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EXIT_FAILED, ConfigError, OarlockError, report
from oarlock.files import holds_adapter

if TYPE_CHECKING:
    from oarlock.serve.chat import Chat

_HELP = "/reset starts a new conversation, /quit leaves; Ctrl-C stops an answer"
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of `oarlock chat`."""

    model: str = positional(metavar="DIR")
    """Model folder or adapter folder."""
    adapter: str | None = flag(None, metavar="DIR")
    """LoRA adapter of the model."""
    system: str = flag("", metavar="TEXT")
    """System message at the start of the conversation."""
    temperature: float | None = flag(None)
    """0 always takes the most likely token. Default: the model's generation_config.json, else 0."""
    top_p: float | None = flag(None)
    """Sample from the most likely tokens with this total probability. Default: generation_config.json, else 1."""
    top_k: int | None = flag(None)
    """Sample from this many most likely tokens; 0 for all. Default: generation_config.json, else 0."""
    repetition_penalty: float | None = flag(None)
    """Penalise repeated tokens (> 1); 1 disables. Default: generation_config.json, else 1."""
    seed: int | None = flag(None)
    """Random seed for sampling."""
    max_tokens: int | None = flag(None)
    """Longest answer in tokens. Default: as many as fit in the context."""
    parse_special_tokens: bool = flag(False)
    """Special tokens that you spell out become special tokens. By default they are plain text."""
    stop: tuple[str, ...] = flag((), metavar="TEXT")
    """Text that ends an answer. Can be repeated."""


def _run(options: ChatOptions) -> int:
    from oarlock.serve.engine.sampling_params import Limits, RequestRefused, Sampling

    given = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
    sampling = Sampling(
        max_tokens=options.max_tokens,
        seed=options.seed,
        stop=options.stop,
        given=frozenset(given),
        **given,
    )
    try:
        sampling.check()
    except RequestRefused as error:  # here it is about flags
        raise ConfigError(str(error)) from error
    import_paddle()
    from oarlock.serve.chat import Chat
    from oarlock.serve.engine.engine import Engine

    with (
        tempfile.TemporaryDirectory(prefix="oarlock-chat-") as place,
        contextlib.redirect_stdout(sys.stderr),  # log lines of loading are not answers
    ):
        model, adapter = _find_folders(options.model, options.adapter, Path(place))
        engine = Engine.load(
            model,
            {"chat": adapter} if adapter else {},
            Limits(max_tokens=2**31, seconds=float("inf")),
            "all" if options.parse_special_tokens else "prompts",
        )
    try:
        return talk(Chat(engine, sampling, options.system, "chat" if adapter else None))
    finally:
        engine.close(drain=False)


def _find_folders(model: str, adapter: str | None, place: Path) -> tuple[str, Path | None]:
    """Find the folders of model and adapter. For an adapter alone, that is its base with the adapter's own template."""
    from oarlock.peft.adapter_base import add_texts_of, find_base
    from oarlock.peft.open_adapter import open_lora

    if adapter is None and holds_adapter(model):
        found = open_lora(model, "talked with")
        base = find_base(found, f"Name it: oarlock chat BASE --adapter {model}")
        return str(add_texts_of(found.folder, base, place)), found.folder
    return model, Path(adapter) if adapter else None


def talk(chat: Chat) -> int:
    """Answer the lines of standard input until it ends. The exit code says whether an answer failed."""
    failed = False
    for line in _read_lines():
        if line == "/quit":
            break
        if line == "/reset":
            chat.reset()
            chat.dropped = 0
            print("(a new conversation)", file=sys.stderr)
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line.strip():
            failed = not _answer(chat, line) or failed
    return EXIT_FAILED if failed else 0


def _answer(chat: Chat, line: str) -> bool:
    dropped = chat.dropped
    try:
        for text in chat.ask(line):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except OarlockError as error:
        report(error)
        return False
    print(flush=True)
    if chat.dropped > dropped:
        print(f"(the context is full: the first {chat.dropped} question(s) were dropped)", file=sys.stderr)
    return True


def _read_lines() -> Iterator[str]:
    """Read lines from a terminal, with a prompt, or from a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing and history
    print(_HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n({_HELP})", file=sys.stderr)


COMMAND = Command("chat", "Talk with a model in the terminal; answers are printed as they arrive.", ChatOptions, _run)
