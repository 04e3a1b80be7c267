"""A stand-in for Paddle's launcher as the supervisor sees it: ranks in their own sessions, and one exit code.

    python small_launcher.py FOLDER NUM_RANKS [CODE...]     CODE: exit codes of this start, the next one, ...

It writes down every start, and the launcher's and the ranks' ids. Without codes its ranks wait for SIGTERM, write
`saved-RANK` and exit. NUM_RANKS 0 is a launcher that is still waiting for other nodes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType


def run_rank(folder: Path, rank: str) -> None:
    """Wait for SIGTERM, then save."""

    def save(number: int, _: FrameType | None) -> None:
        (folder / f"saved-{rank}").write_text(signal.Signals(number).name)
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    (folder / f"ready-{rank}").touch()
    time.sleep(300)


def main() -> None:
    """Start the ranks and wait for them."""
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    codes = [word for word in sys.argv[3:] if word.isdigit()]
    with (folder / "starts").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    if codes:
        starts = len((folder / "starts").read_text().splitlines())
        sys.exit(int(codes[min(starts, len(codes)) - 1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15 if ranks else 1))
    if not ranks:
        (folder / "ready-launcher").touch()
        time.sleep(300)
    words = [sys.executable, __file__, "rank", str(folder)]
    children = [subprocess.Popen([*words, str(i)], start_new_session=True) for i in range(ranks)]
    first, *_ = [child.wait() for child in children]
    sys.exit(first)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        run_rank(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
