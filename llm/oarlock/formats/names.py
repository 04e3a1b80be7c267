"""File names from outside (an index, a manifest, a hub): each has to name a file in one folder, and no path.

What is refused on one system is refused on all, so that a folder can be copied to any of them.
"""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 200  # bytes; file systems take 255, and names grow (.NAME.incomplete)
_NOT_IN_NAMES = re.compile(r'[<>"|?*:]')  # of Windows; a colon also makes drives and addresses
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)


def name_problem(name: object) -> str:
    """Why something is not the plain name of a file, "" where it is one."""
    if not isinstance(name, str):
        return "not a text"
    if not name:
        return "empty"
    if any(unicodedata.category(character)[0] == "C" or character in "\u2028\u2029" for character in name):
        return "it holds a character that can't be seen"
    if "/" in name or "\\" in name:
        return "it leads to another folder"
    if name.startswith((".", "-", " ", "~")) or name.endswith((".", " ")):
        return f"it begins or ends like no name of a file ({name[0]!r} ... {name[-1]!r})"
    if match := _NOT_IN_NAMES.search(name):
        return f"it holds {match[0]!r}"
    if _DEVICES.fullmatch(name.partition(".")[0].rstrip()):
        return "it is a device's on Windows"
    if len(name.encode("utf-8", "surrogatepass")) > _LONGEST:
        return f"it has more than {_LONGEST} bytes"
    return ""


def is_plain_path(name: str) -> bool:
    """Whether a name with slashes leads to a file below a folder, through plain names alone."""
    return len(name) < 4096 and not any(map(name_problem, name.split("/")))
