"""The command line of run_pretrain.py and finetune_generation.py: --help, --print_config, or a configuration."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

import yaml

from oarlock.config.load import ConfigT, LoadedConfig, flatten, load_config
from oarlock.config.options import list_option_specs, list_section_classes
from oarlock.config.problems import WrongOptions
from oarlock.config.run_config import RunConfig


def read_command_line(config_class: type[ConfigT], argv: Sequence[str], program: str) -> LoadedConfig[ConfigT] | None:
    """The checked configuration, or None if --help or --print_config was printed instead.

    Raises:
        WrongOptions: lists every problem with the options.
        ConfigError: the file is not a recipe.
    """
    words = list(argv)
    if "--help" in words or "-h" in words:
        print(format_help(config_class, program))
        return None
    printing = [word for word in words if word in ("--print_config", "--print-config")]
    words = [word for word in words if word not in printing]
    try:
        loaded = load_config(config_class, words)
    except WrongOptions as error:
        raise WrongOptions(f"{error}\nAll options: {program} --help") from error
    if printing:
        print(to_yaml(loaded.config, loaded.origins), end="")
        return None
    return loaded


def to_yaml(config: RunConfig, origins: dict[str, str] | None = None) -> str:
    """The configuration as YAML that the entrypoints can read. With origins, each line says where its value is from."""
    flat, lines, section = flatten(config), [], ""
    for name, spec in list_option_specs(type(config)).items():
        if spec.section != section:
            section = spec.section
            lines.append(f"{section}:")
        line = yaml.safe_dump({name: flat[name]}, allow_unicode=True, width=10_000).strip()
        origin = (origins or {}).get(name, "default")
        lines.append(f"  {line}" + (f"  # {origin}" if origin != "default" else ""))
    return "\n".join(lines) + "\n"


def format_help(config_class: type, program: str, width: int | None = None) -> str:
    """The text of --help: options by section, with type, unit, default and other spellings."""
    width = width or min(120, shutil.get_terminal_size((100, 24)).columns)
    lines = [
        f"usage: {program} [RECIPE] [--option value ...]",
        "",
        *textwrap.wrap(
            "RECIPE is a YAML file or the name of a recipe (`oarlock recipes` lists them). Its options are flat or in "
            "sections, and `include: [files]` composes files. Flags win over the recipe. Yes/no options: --recompute, "
            "--recompute 1, --recompute true, --no_recompute.",
            width,
        ),
        "  --print_config  print the resolved configuration and exit",
        "  --help          print this text and exit",
    ]
    sections = list_section_classes(config_class)
    section = ""
    for name, spec in list_option_specs(config_class).items():
        if spec.section != section:
            section = spec.section
            lines += ["", f"{(sections[section].__doc__ or section).strip()} ({section}:)"]
        default = spec.default
        if isinstance(default, bool):
            default = "yes" if default else "no"
        elif default is None or default == "":
            default = "not set"
        spellings = ", ".join(f"--{spelling}" for spelling in (name, *spec.aliases))
        flag = f"  {spellings}  [{spec.kind}; default {default}]"
        lines += textwrap.wrap(flag, 199, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
        lines += textwrap.wrap(spec.help, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
