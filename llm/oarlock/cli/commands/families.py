"""`oarlock families`."""

from __future__ import annotations

from oarlock.cli.flags import Command, NoOptions


def _run(_: NoOptions) -> int:
    from oarlock.families.registry import make_families_table

    print(make_families_table())
    return 0


COMMAND = Command("families", "Print what each model family supports, as a Markdown table.", NoOptions, _run)
