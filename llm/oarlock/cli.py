"""The `oarlock` command: one small function per subcommand, which calls the rooms that do the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from oarlock.cli_parallel import add_checkpoint, add_rehearse
from oarlock.environment import available_cores, exit_on_sigterm, import_paddle, say
from oarlock.errors import exit_with
from oarlock.versions import version_text


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = _parser().parse_args(argv)
    if arguments.version:
        print(version_text())
        return
    if not hasattr(arguments, "run"):
        _parser().print_help()
        sys.exit(2)
    exit_on_sigterm()
    exit_with(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oarlock", description="Train and serve large language models on PaddlePaddle.", allow_abbrev=False
    )
    parser.add_argument("--version", action="store_true", help="versions of everything that matters")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_data(commands)
    _add_ask(commands)
    add_rehearse(commands, _command)
    add_checkpoint(commands, _command)
    _add_doctor(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


# data


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="make and look at training data")
    kinds = data.add_subparsers(title="data commands", metavar="COMMAND", required=True)

    pretrain = _command(kinds, "pretrain", "Tokenise text into a .bin/.idx corpus for pretraining.", _data_pretrain)
    pretrain.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="txt, jsonl, parquet files (also .gz, .zst), or folders",
    )
    pretrain.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder or hub name")
    pretrain.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    pretrain.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: %(default)s, the cores)"
    )
    pretrain.add_argument("--text-key", default="text", help="JSON field or parquet column (default: text)")
    pretrain.add_argument(
        "--txt-document",
        choices=("file", "line"),
        default="file",
        help="what one document of a .txt file is (default: file)",
    )
    pretrain.add_argument("--skip-bad", action="store_true", help="count bad lines and go on, in place of stopping")

    show = _command(kinds, "show", "Decode examples and show which tokens are trained on.", _data_show)
    show.add_argument("path", nargs="?", help="corpus prefix or folder, or fine-tuning file or folder; none: embedded")
    show.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder or hub name")
    show.add_argument("--num", type=int, default=3, help="examples (default: 3)")
    show.add_argument("--max-seq-length", type=int, default=128, help="tokens of a pretraining sample (default: 128)")
    show.add_argument("--src-length", type=int, default=128, help="as in finetune_generation.py (default: 128)")
    show.add_argument("--tgt-length", type=int, default=160, help="as in finetune_generation.py (default: 160)")
    show.add_argument("--chat-template", default="auto", help="as in finetune_generation.py (default: auto)")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")

    embedded = _command(
        kinds, "embedded", "Make the embedded tokenizer, corpus and instructions (no download).", _data_embedded
    )
    embedded.add_argument("--output", required=True, metavar="DIR")
    embedded.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer (default: 4096)")


def _data_pretrain(arguments: argparse.Namespace) -> int:
    from oarlock.data.build_corpus import BuildOptions, build_corpus

    options = BuildOptions(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        workers=max(1, arguments.workers),
        text_key=arguments.text_key,
        txt_document=arguments.txt_document,
        skip_bad=arguments.skip_bad,
    )
    report = build_corpus(options)
    rate = report.bytes / 1e6 / max(1e-9, report.seconds)
    say(
        f"{report.documents:,} documents, {report.tokens:,} tokens from {report.bytes / 1e6:,.1f} MB in "
        f"{report.seconds:.1f} s ({rate:.2f} MB/s): {arguments.output_prefix}.bin"
    )
    if report.bad_lines:
        shown = "".join(f"\n  {line}" for line in report.first_bad)
        say(f"{report.bad_lines:,} bad line(s) left out:{shown}")
    if report.empty:
        say(f"{report.empty:,} empty text(s) left out")
    return 0


def _data_show(arguments: argparse.Namespace) -> int:
    import_paddle()
    from oarlock.data.preview import show_data

    show_data(
        arguments.path,
        arguments.tokenizer,
        num=arguments.num,
        max_seq_length=arguments.max_seq_length,
        src_length=arguments.src_length,
        tgt_length=arguments.tgt_length,
        chat_template=arguments.chat_template,
        color=arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty()),
    )
    return 0


def _data_embedded(arguments: argparse.Namespace) -> int:
    from oarlock.data.embedded.prepare import prepare_embedded

    prepare_embedded(arguments.output, arguments.vocab_size)
    return 0


# ask


def _add_ask(commands: argparse._SubParsersAction) -> None:
    ask = _command(commands, "ask", "Ask a trained model; the chat template saved with it is used.", _ask)
    ask.add_argument("model", metavar="DIR", help="model folder, or adapter folder")
    ask.add_argument("--base", metavar="DIR", help="where the base of an adapter is, if not where it was")
    ask.add_argument("question", nargs="+", help="one answer for each")
    ask.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: 64)")


def _ask(arguments: argparse.Namespace) -> int:
    import_paddle()
    from oarlock.models.ask import ask_model

    for question, answer in ask_model(arguments.model, arguments.question, arguments.max_new_tokens, arguments.base):
        print(f"Q: {question.replace(chr(10), ' / ')}\nA: {answer}")
    return 0


# doctor


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = _command(commands, "doctor", "Check this environment and say what to fix.", _doctor)
    doctor.add_argument("--no-launch", action="store_true", help="leave out the two-process launch (10 to 20 seconds)")


def _doctor(arguments: argparse.Namespace) -> int:
    from oarlock.doctor import run_doctor

    return run_doctor(launch=not arguments.no_launch)
