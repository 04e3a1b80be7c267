"""`oarlock chat`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.cli.flags import Command, flag, positional
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EXIT_FAILED, ConfigError, OarlockError, RequestRefused, report
from oarlock.files import holds_adapter
from oarlock.sampling.markdown import describe_options
from oarlock.sampling.params import OPTIONS, SamplingOption, SamplingParams

if TYPE_CHECKING:
    from oarlock.serve.chat import Chat

_HELP = "/reset starts a new conversation, /quit leaves; Ctrl-C stops an answer"


def _make_sampling_flag(option: SamplingOption) -> tuple[str, Any, Any]:
    """A flag for a sampling parameter, without a value unless it is given."""
    help = describe_options()[option.name]
    if option.in_generation_config:
        help += f" Default: the model's generation_config.json, else {option.default:g}."
    if option.is_list:
        return option.name, tuple[option.kind, ...], flag((), metavar="TEXT", help=f"{help} Can be repeated.")  # type: ignore[name-defined]
    return option.name, option.kind | None, flag(None, help=help)


CHAT_OPTIONS = {name: option for name, option in OPTIONS.items() if option.in_chat}
_SamplingFlags: Any = make_dataclass("_SamplingFlags", map(_make_sampling_flag, CHAT_OPTIONS.values()), frozen=True)


@dataclass(frozen=True, kw_only=True)
class ChatOptions(_SamplingFlags):
    """Options of `oarlock chat`."""

    model: str = positional(metavar="DIR")
    """Model folder or adapter folder."""
    adapter: str | None = flag(None, metavar="DIR")
    """LoRA adapter of the model."""
    system: str = flag("", metavar="TEXT")
    """System message at the start of the conversation."""
    parse_special_tokens: bool = flag(False)
    """Special tokens that you spell out become special tokens. By default they are plain text."""


def _run(options: ChatOptions) -> int:
    from oarlock.serve.config import EngineConfig

    given = {name: value for name in CHAT_OPTIONS if (value := getattr(options, name)) not in (None, ())}
    sampling = SamplingParams(**given, given=frozenset(given))
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
            EngineConfig(
                max_tokens=2**31,
                timeout=float("inf"),
                parse_special_tokens="all" if options.parse_special_tokens else "prompts",
            ),
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
