"""Print the table of docs/families.md: the largest differences of every family of our decoder.

    python tests/parity/decoder_table.py

Runs the tests that compare them (ten minutes on 2 cores), and reads the figures that they record.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
sys.path.insert(0, str(TESTS.parent / "benchmarks"))

from common import machine  # noqa: E402

from support.tiny_configs import TINY_CONFIGS  # noqa: E402

FILES = (
    "parity/test_decoder_families.py", "parity/test_training_parity.py", "rehearsal/test_decoder_plans.py",
    "rehearsal/test_expert_plans.py", "rehearsal/test_family_plans.py",
)  # fmt: skip
FIGURES = ("logits", "gradients", "training", "plans", "LoRA", "export")
# Tests that compare tokens or bits.
EXACT = {
    "answers": "test_answers_equal_transformers",
    "conversion": "test_conversion_both_ways_is_bit_identical",
    "serving": "test_engine_answers_equal_transformers",
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = [str(TESTS / file) for file in FILES]
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    largest: dict[tuple[str, str], float] = defaultdict(float)
    passed: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for case in cases:
        test, _, parameters = case.get("name", "").partition("[")
        recorded = {found.get("name", ""): found.get("value", "") for found in case.iter("property")}
        model = recorded.pop("model", re.split(r"[-/\]]", parameters)[0])
        passed[model, test].append(case.find("failure") is None and case.find("error") is None)
        for name, value in recorded.items():
            # A run that failed has no difference.
            largest[model, name] = max(largest[model, name], float("inf" if value == "None" else value))
    heads = ["model", *FIGURES, *EXACT]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for model in TINY_CONFIGS:
        cells = [
            f"{largest[model, column]:.0e}".replace("0e+00", "0") if (model, column) in largest else ""
            for column in FIGURES
        ]
        for test in EXACT.values():
            outcomes = passed[model, test]
            cells.append(("same" if all(outcomes) else "DIFFERENT") if outcomes else "")
        print("| " + " | ".join([model, *cells]) + " |")
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"\n{about['cpu']}, {about['cores']} cores; {versions}")
    return code


if __name__ == "__main__":
    sys.exit(main())
