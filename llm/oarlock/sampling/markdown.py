"""The table of sampling parameters in docs/serving.md: `python -m oarlock.sampling.markdown` prints it."""

from __future__ import annotations

from oarlock.config.options import list_section_specs
from oarlock.sampling.params import MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_STOPS, OPTIONS, SamplingParams

_LISTS = {
    "stop": f"{MAX_STOPS} texts of {MAX_STOP_LENGTH} characters",
    "stop_token_ids": f"{MAX_STOP_TOKENS} tokens",
}


def describe_options() -> dict[str, str]:
    """The help of each sampling parameter: the text under it in its declaration."""
    return {name: spec.help for name, spec in list_section_specs(SamplingParams).items() if name in OPTIONS}


def format_sampling_table() -> str:
    """The table of all sampling parameters, in Markdown."""
    help = describe_options()
    rows = [
        ("parameter", "Triton type", "FastDeploy", "range", "default", "meaning"),
        ("---",) * 6,
    ]
    for name, option in OPTIONS.items():
        allowed = option.range.words if option.range else _LISTS.get(name, "")
        if option.openai and option.openai != option.range:
            allowed += f" (OpenAI-compatible API: {option.openai.words})"
        default = f"{option.default:g}" if option.range and option.default is not None else ""
        datatype = f"{option.datatype}{' [n]' if option.is_list else ''}"
        fastdeploy = option.fastdeploy and f"`{option.fastdeploy}`"
        rows.append((f"`{name}`", datatype, fastdeploy, allowed, default, help[name]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(format_sampling_table())
