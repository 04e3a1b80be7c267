"""The table of patches as text, for `oarlock doctor --patches`."""

from __future__ import annotations

from oarlock.compat.patch import Machine
from oarlock.compat.patches import PATCHES

_SCOPES = {
    "process": "For the whole process, once applied",
    "while_building": "While a model, a wrapper or a static graph is built",
    "object": "On single objects, not on their classes",
}


def patch_report(machine: Machine) -> str:
    """Every patch: why, until when, applied by what, and whether a run on this machine can need it."""
    lines = []
    for scope, title in _SCOPES.items():
        lines += [f"{title}:", ""]
        for patch in PATCHES:
            if patch.scope != scope:
                continue
            mark = "applies" if patch.applies(machine) else "not here"
            names = " and ".join((patch.target, *(f"{owner}:{patch.name}" for owner in patch.also)))
            lines += [
                f"{mark:<8}  {names}",
                f"{'':<8}  why: {patch.why}",
                f"{'':<8}  until: {patch.until}",
                f"{'':<8}  by: {patch.replacement}",
                "",
            ]
    needed = sum(patch.applies(machine) for patch in PATCHES)
    lines.append(f"{needed} of {len(PATCHES)} patches apply to runs on this machine's {machine.device.upper()}")
    return "\n".join(lines)
