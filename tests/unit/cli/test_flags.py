"""Command flags are dataclass fields: spellings, defaults, checks and help follow from the declaration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from oarlock.cli.commands import recipes
from oarlock.cli.flags import Command, CommandGroup, ConfigCommand, config_flag, flag, positional
from oarlock.cli.main import make_parser
from oarlock.cli.parser import CommandParser, add_commands, run_parsed
from oarlock.config.finetune import FinetuneDataSection
from oarlock.config.options import at_least, option
from oarlock.config.recipes import list_recipes


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every kind."""

    folder: Path = positional(metavar="DIR")
    """Where it is."""
    num_rows: int = flag(3, at_least(1), unit="rows", aliases=("rows",))
    """How many."""
    weight: tuple[float, ...] = flag(())
    """Repeated."""
    input: tuple[str, ...] = flag(("x",), several=True)
    """Several words."""
    proof: bool = flag(True)
    """Skip the proof."""
    skip_bad: bool = flag(False, group="records")
    """Go on."""
    keep: Path | None = flag(None)
    """Optional."""
    form: str = flag("auto", choices=("auto", "text"))
    """One of two."""
    src_length: int = config_flag(FinetuneDataSection, "src_length")
    plain: str = option("p")
    """Declared as in a configuration."""


@dataclass
class Runs:
    seen: list[object] = field(default_factory=list)

    def __call__(self, options: object) -> int:
        self.seen.append(options)
        return 7


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def parser(runs) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("p")
    add_commands(
        made,
        (
            Command("one", "Does one thing.", Options, runs, {"old_flag": "use --form"}),
            CommandGroup("two", "A group.", (Command("inner", "Inside.", Options, runs),)),
            ConfigCommand("three", "Reads its own words.", runs),
        ),
    )
    return made


def test_arguments_become_options(parser, runs):
    assert run_parsed(parser.parse_args(["one", "d"])) == 7
    assert runs.seen == [Options(folder=Path("d"))]
    words = "two inner d --num-rows 4 --weight 1 --weight 2.5 --input a b --no_proof --skip_bad --keep k --form text"
    run_parsed(parser.parse_args([*words.split(), "--src-length=9", "--plain", "none"]))
    wanted = Options(
        folder=Path("d"), num_rows=4, weight=(1.0, 2.5), input=("a", "b"), proof=False, skip_bad=True, keep=Path("k"),
        form="text", src_length=9, plain="none",
    )  # fmt: skip
    assert runs.seen[-1] == wanted
    run_parsed(parser.parse_args(["one", "d", "--rows", "5", "--keep", ""]))
    assert runs.seen[-1] == Options(folder=Path("d"), num_rows=5, keep=None)


@pytest.mark.parametrize("words", [["--lora", "--help"], ["recipe", "--x", "1", "--", "y"], []])
def test_a_command_with_its_own_parser_gets_all_arguments(parser, runs, words):
    run_parsed(parser.parse_args(["three", *words]))
    assert runs.seen == [words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("one", "the following arguments are required: DIR"),
        ("one d --num-rows 0", "argument --num-rows/--num_rows/--rows: must be at least 1; got '0'"),
        ("one d --num-rows many", "must be a whole number; got 'many'"),
        ("one d --form tex", "invalid choice: 'tex'"),
        ("one d --for text", "unrecognized arguments: --for"),
        ("one d --old-flag 3", "--old-flag: use --form"),
        ("one d --proof", "unrecognized arguments: --proof"),
        ("two", "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_arguments_are_refused(parser, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_has_each_flag_once_with_its_default(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["one", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--num-rows N, --rows N How many. Default: 3." in text and "num_rows" not in text
    assert "records: --skip-bad Go on." in text and "old" not in text
    assert "--src-length N" in text and "Default: 128." in text


def all_parsers(parser: argparse.ArgumentParser) -> list[CommandParser]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found += [inner, *all_parsers(inner)]
    return found


def test_every_flag_of_oarlock_is_explained_and_has_both_spellings():
    for parser in all_parsers(make_parser()):
        parser.add_flags()
        for action in parser._actions:
            names = [name.removeprefix("--") for name in action.option_strings if name.startswith("--")]
            assert {name.replace("-", "_") for name in names} | {name.replace("_", "-") for name in names} == set(names)
            assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)


def test_recipes_are_listed_with_model_gpus_and_method(capsys):
    assert recipes.COMMAND.run(recipes.COMMAND.options()) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["RECIPE", "GPUS", "MODEL", "METHOD", "COMMAND"]
    assert len(lines) == len(list_recipes())
    assert any(
        line.split() == ["lora_13b", "12", "facebook/llama-13b", "LoRA", "oarlock", "finetune"] for line in lines
    )
