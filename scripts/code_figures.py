"""Measure the source tree: python scripts/code_figures.py [--package train] [--list used_once] [--json].

The figures and their limits are explained in CONTRIBUTING.md; tests/structure asserts the limits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from structure.figures import measure


def main() -> None:
    """Print a table, or one list in full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1], help="repository")
    parser.add_argument("--package", metavar="NAME", help="print what one package of oarlock holds of each figure")
    parser.add_argument("--list", metavar="FIGURE", nargs="*", help="print the items of these figures")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    figures = measure(options.root)
    if options.package:
        figures = [figure.of_package(options.package) for figure in figures]
    if options.list:
        figures = [figure for figure in figures if figure.name in options.list]
    if options.json:
        print(json.dumps({f.name: {"value": f.value, "limit": f.limit, "items": f.items} for f in figures}, indent=2))
        return
    for figure in figures:
        if options.package and not figure.items:
            continue
        mark = "  above the limit" if figure.is_above_limit and not options.package else ""
        limit = "" if figure.limit is None or options.package else f" (at most {figure.limit})"
        print(f"{figure.name:22} {figure.shown:>8}{limit:16} {figure.title}{mark}")
        if options.package or options.list:
            print("".join(f"    {item}\n" for item in figure.items), end="")


if __name__ == "__main__":
    main()
