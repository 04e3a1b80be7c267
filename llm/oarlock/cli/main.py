"""The `oarlock` command: one small function per subcommand, which calls the rooms that do the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oarlock.cli.admin import add_admin
from oarlock.cli.chat import add_chat
from oarlock.cli.convert import add_convert
from oarlock.cli.export import add_export
from oarlock.cli.parallel import add_checkpoint, add_rehearse
from oarlock.cli.resize import add_resize
from oarlock.cli.serve import add_serve
from oarlock.cli.weights import add_weight_flags, positive
from oarlock.config import FinetuneConfig
from oarlock.config.finetune import FinetuneDataSection
from oarlock.config.options import option_specs
from oarlock.environment.console import get_logger
from oarlock.environment.cpu import available_cores
from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level
from oarlock.environment.signals import exit_on_sigterm
from oarlock.errors import exit_with
from oarlock.versions import version_text

logger = get_logger(__name__)


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
    add_chat(commands, _command)
    _add_merge(commands)
    add_convert(commands, _command)
    add_resize(commands, _command)
    add_export(commands, _command)
    add_rehearse(commands, _command)
    add_checkpoint(commands, _command)
    add_serve(commands, _command)
    add_admin(commands, _command)
    _command(commands, "families", "Say what each model family can do, as a Markdown table.", _families)
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
        help="txt, jsonl, json, csv, tsv, parquet files (also .gz, .zst), or folders",
    )
    pretrain.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder or hub name")
    pretrain.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    pretrain.add_argument(
        "--workers", type=int, default=available_cores(), help="processes (default: %(default)s, the cores)"
    )
    pretrain.add_argument("--text-key", default="text", help="JSON field or column (default: text)")
    pretrain.add_argument(
        "--txt-document",
        choices=("file", "line"),
        default="file",
        help="what one document of a .txt file is (default: file)",
    )
    pretrain.add_argument("--skip-bad", action="store_true", help="count bad lines and go on, in place of stopping")
    pretrain.add_argument("--overwrite", action="store_true", help="replace a corpus that is there already")
    pretrain.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="a special token that a text spells becomes that token (default: it is text)",
    )

    show = _command(kinds, "show", "Decode examples and show which tokens are trained on.", _data_show)
    show.add_argument("path", nargs="?", help="corpus prefix or folder, or fine-tuning file or folder; none: embedded")
    show.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder or hub name")
    show.add_argument("--num", type=positive, default=3, help="examples (default: 3)")
    show.add_argument(
        "--max-seq-length", type=positive, default=128, help="tokens of a pretraining sample (default: 128)"
    )
    _add_record_options(show)
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")

    check = _command(
        kinds, "check", "Count fine-tuning data: lengths, what is cut, duplicates, wrong records.", _data_check
    )
    check.add_argument("path", nargs="?", help="fine-tuning file, folder or hub name; none: embedded")
    check.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder or hub name")
    _add_record_options(check)
    check.add_argument("--histogram", metavar="FILE", help="draw the lengths into FILE (.svg, .png or .pdf)")
    check.add_argument("--data-cache-dir", metavar="DIR", help="as in finetune_generation.py")

    embedded = _command(
        kinds, "embedded", "Make the embedded tokenizer, corpus and instructions (no download).", _data_embedded
    )
    embedded.add_argument("--output", required=True, metavar="DIR")
    embedded.add_argument("--vocab-size", type=positive, default=4096, help="tokens of the tokenizer (default: 4096)")


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    forms = option_specs(FinetuneConfig)["data_format"].choices
    parser.add_argument("--src-length", type=positive, default=128, help="as in finetune_generation.py (default: 128)")
    parser.add_argument("--tgt-length", type=positive, default=160, help="as in finetune_generation.py (default: 160)")
    parser.add_argument("--chat-template", default="auto", help="as in finetune_generation.py (default: auto)")
    parser.add_argument("--chat-template-name", metavar="NAME", help="as in finetune_generation.py")
    parser.add_argument("--parse-special-tokens", action="store_true", help="as in finetune_generation.py")
    parser.add_argument("--data-format", default="auto", choices=forms, help="form of the records (default: auto)")
    parser.add_argument(
        "--columns", metavar="F=C,...", help="as in finetune_generation.py: prompt=question,response=answer"
    )
    parser.add_argument("--instruction-generation", action="store_true", help="as in finetune_generation.py")


def _record_section(arguments: argparse.Namespace, **more: Any) -> FinetuneDataSection:
    return FinetuneDataSection(
        dataset_name_or_path=arguments.path,
        src_length=arguments.src_length,
        tgt_length=arguments.tgt_length,
        chat_template=arguments.chat_template,
        chat_template_name=arguments.chat_template_name,
        parse_special_tokens=arguments.parse_special_tokens,
        data_format=arguments.data_format,
        columns=arguments.columns,
        instruction_generation=arguments.instruction_generation,
        **more,
    )


def _data_pretrain(arguments: argparse.Namespace) -> int:
    from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus

    options = BuildOptions(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        workers=max(1, arguments.workers),
        text_key=arguments.text_key,
        txt_document=arguments.txt_document,
        skip_bad=arguments.skip_bad,
        overwrite=arguments.overwrite,
        parse_special_tokens=arguments.parse_special_tokens,
    )
    for line in build_corpus(options).lines(arguments.output_prefix):
        logger.info(line)
    return 0


def _data_show(arguments: argparse.Namespace) -> int:
    import_paddle()
    from oarlock.data.examples.preview import show_data

    show_data(
        _record_section(arguments, skip_bad=True),
        arguments.tokenizer,
        num=arguments.num,
        max_seq_length=arguments.max_seq_length,
        color=arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty()),
    )
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    import_paddle()
    from oarlock.data.examples.inspect import check_data

    section = _record_section(arguments, data_cache_dir=arguments.data_cache_dir, skip_bad=True)
    return check_data(section, arguments.tokenizer, arguments.histogram)


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
    ask.add_argument("--max-new-tokens", type=positive, help="longest answer (default: 64, or what the context leaves)")


def _ask(arguments: argparse.Namespace) -> int:
    import_paddle()
    from oarlock.models.ask import ask_model

    for question, answer in ask_model(arguments.model, arguments.question, arguments.max_new_tokens, arguments.base):
        print(f"Q: {question.replace(chr(10), ' / ')}\nA: {answer}")
    return 0


# families


def _families(arguments: argparse.Namespace) -> int:
    from oarlock.parallel.family_rules import families_table

    print(families_table())
    return 0


# merge


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = _command(
        commands, "merge", "Add LoRA adapters to their base model: one model folder, proven equal to both.", _merge
    )
    merge.add_argument("--model", metavar="BASE", help="the base; default: where it was in training")
    merge.add_argument("--adapter", metavar="DIR", action="append", required=True, help="adapter folder (repeatable)")
    merge.add_argument("--weight", type=float, action="append", default=[], help="of each adapter (default: 1)")
    merge.add_argument("--output", metavar="DIR", required=True, help="folder that does not exist yet")
    add_weight_flags(merge, "the base")


def _merge(arguments: argparse.Namespace) -> int:
    from oarlock.merge.inputs import AdapterMix, check_output

    mix, output = AdapterMix.open(arguments.adapter, arguments.weight), Path(arguments.output)
    check_output(output)
    import_paddle()
    set_paddlenlp_log_level("error")
    from oarlock.hub.model_names import local_folder
    from oarlock.merge.merge import MergeOptions, merge
    from oarlock.peft.adapter_base import find_base

    allow_pickle = arguments.allow_pickle_weights
    if arguments.model:
        base = local_folder(arguments.model, with_weights=True, allow_pickle=allow_pickle)
    else:
        base = find_base(mix.parts[0].adapter, "Name it: --model BASE", allow_pickle=allow_pickle)
    size = arguments.shard_bytes
    merge(base, mix, output, MergeOptions(arguments.dtype, size, not arguments.no_proof, allow_pickle))
    return 0


# doctor


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    doctor = _command(commands, "doctor", "Check this environment and say what to fix.", _doctor)
    doctor.add_argument("--no-launch", action="store_true", help="leave out the two-process launch (10 to 20 seconds)")


def _doctor(arguments: argparse.Namespace) -> int:
    from oarlock.cli.doctor import run_doctor

    return run_doctor(launch=not arguments.no_launch)
