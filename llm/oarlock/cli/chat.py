"""`oarlock chat`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EXIT_FAILED, ConfigError, OarlockError, report
from oarlock.files import holds_adapter

if TYPE_CHECKING:
    from oarlock.serve.chat import Chat

Adder = Callable[..., argparse.ArgumentParser]
_HELP = "/reset begins anew, /quit leaves; Ctrl-C stops an answer"


def add_chat(commands: Any, command: Adder) -> None:
    """The chat subcommand."""
    chat = command(commands, "chat", "Talk with a model in the terminal; answers appear as they are made.", _chat)
    chat.add_argument("model", metavar="DIR", help="model folder, or adapter folder")
    chat.add_argument("--adapter", metavar="DIR", help="LoRA adapter beside the model")
    chat.add_argument("--system", default="", metavar="TEXT", help="stands before the conversation")
    own = "default: the model's generation_config.json, else"
    chat.add_argument("--temperature", type=float, help=f"0 for the likeliest tokens ({own} 0)")
    chat.add_argument("--top-p", type=float, help=f"probability mass of the tokens to choose from ({own} 1)")
    chat.add_argument("--top-k", type=int, help=f"number of the likeliest tokens, 0 for all ({own} 0)")
    chat.add_argument("--repetition-penalty", type=float, help=f"above 1 against repetitions ({own} 1)")
    chat.add_argument("--seed", type=int, help="of the choice of tokens")
    chat.add_argument("--max-tokens", type=int, help="longest answer (default: what the model's context leaves)")
    chat.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="the spelling of a special token in what you write is that token (default: it is text)",
    )
    chat.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer (repeatable)")


def _chat(arguments: argparse.Namespace) -> int:
    from oarlock.serve.engine.sampling_params import Limits, RequestRefused, Sampling

    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sampling = Sampling(
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        given=frozenset(given),
        **given,
    )
    try:
        sampling.check()
    except RequestRefused as error:  # of flags, here
        raise ConfigError(str(error)) from error
    import_paddle()
    from oarlock.serve.chat import Chat
    from oarlock.serve.engine.engine import Engine

    with (
        tempfile.TemporaryDirectory(prefix="oarlock-chat-") as place,
        contextlib.redirect_stdout(sys.stderr),  # what is said in loading is no answer
    ):
        model, adapter = _folders(arguments.model, arguments.adapter, Path(place))
        engine = Engine.load(
            model,
            {"chat": adapter} if adapter else {},
            Limits(max_tokens=2**31, seconds=float("inf")),
            "all" if arguments.parse_special_tokens else "prompts",
        )
    try:
        return talk(Chat(engine, sampling, arguments.system, "chat" if adapter else None))
    finally:
        engine.close(drain=False)


def _folders(model: str, adapter: str | None, place: Path) -> tuple[str, Path | None]:
    """Model and adapter; of an adapter folder alone, the base it was trained on with the adapter's own template."""
    from oarlock.peft.adapter_base import find_base, with_texts_of
    from oarlock.peft.open_adapter import open_lora

    if adapter is None and holds_adapter(model):
        found = open_lora(model, "talked with")
        base = find_base(found, f"Name it: oarlock chat BASE --adapter {model}")
        return str(with_texts_of(found.folder, base, place)), found.folder
    return model, Path(adapter) if adapter else None


def talk(chat: Chat) -> int:
    """Answer the lines of standard input until it ends; whether one of them could not be answered is the exit code."""
    failed = False
    for line in _lines():
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
        print(f"(the context is full: the first {chat.dropped} question(s) are forgotten)", file=sys.stderr)
    return True


def _lines() -> Iterator[str]:
    """Of a person with a prompt, or of a pipe."""
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
