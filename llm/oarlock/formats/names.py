"""Untrusted file names (from an index, a manifest, a hub): each must name a file in one folder, not a path.

A name that one system refuses is refused on all, so that folders can be copied between systems.
"""

from __future__ import annotations

import re
import unicodedata

_MAX_BYTES = 200  # file systems allow 255, and temporary names are longer (.NAME.incomplete)
_NOT_IN_NAMES = re.compile(r'[<>"|?*:]')  # reserved on Windows; a colon also starts drives and URLs
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)


def find_name_problem(name: object) -> str:
    """Return why `name` is not a plain file name, or "" if it is one."""
    if not isinstance(name, str):
        return "not a string"
    if not name:
        return "empty"
    if any(unicodedata.category(character)[0] == "C" or character in "\u2028\u2029" for character in name):
        return "it contains an invisible character"
    if "/" in name or "\\" in name:
        return "it leads to another folder"
    if name.startswith((".", "-", " ", "~")) or name.endswith((".", " ")):
        return f"a file name may not begin or end like this ({name[0]!r} ... {name[-1]!r})"
    if match := _NOT_IN_NAMES.search(name):
        return f"it contains {match[0]!r}"
    if _DEVICES.fullmatch(name.partition(".")[0].rstrip()):
        return "it is a device name on Windows"
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_BYTES:
        return f"it is longer than {_MAX_BYTES} bytes"
    return ""


def is_plain_path(name: str) -> bool:
    """Whether a path with slashes consists of plain names only, so that it stays below its folder."""
    return len(name) < 4096 and not any(map(find_name_problem, name.split("/")))
