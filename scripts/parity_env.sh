#!/usr/bin/env bash
# A second environment for the tests that compare with Hugging Face: torch (CPU), transformers and peft, the extra
# [parity] of pyproject.toml. Apart from .venv, whose PaddleNLP wants older tokenizers and whose OpenMP is another one.
# Safe to run again at any time; does nothing when all is there.
#
#   bash scripts/parity_env.sh
#
#   PARITY_VENV=DIR     where it goes (default: .venv-parity in the repository)
#   PYTHON=python3.11   which Python makes it (default: the first 3.11 or 3.10 found)
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/setup.sh" # its functions: find_python, make_venv, fail
VENV=${PARITY_VENV:-$ROOT/.venv-parity}
CPU_INDEX=https://download.pytorch.org/whl/cpu # the builds without CUDA, a tenth of the size
say() { echo "parity: $*"; }

# The lines of the extra, one a row.
requirements() {
  sed -n '/^parity = \[/,/^\]/p' "$ROOT/pyproject.toml" | sed -n 's/^  "\([^"]*\)".*/\1/p'
}

main_parity() {
  local python wanted log=$VENV/parity.log index=()
  python=$(find_python)
  wanted=$({ requirements && "$python" -V; } | sha256sum | cut -c1-16)
  if [ "$(cat "$VENV/.set-up" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1; then
    say "$VENV is up to date"
    return
  fi
  make_venv "$python"
  rm -f "$VENV/.set-up"
  if "$python" -c "import urllib.request as u; u.urlopen('$CPU_INDEX/torch/', timeout=8)" >/dev/null 2>&1; then
    index=(--extra-index-url "$CPU_INDEX")
  fi
  say "installing $(requirements | tr '\n' ' ')into $VENV"
  mapfile -t wheels < <(requirements)
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "${index[@]}" "${wheels[@]}" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "pip failed (whole output in $log). Check the network and run this again; what is there is not fetched twice."
  fi
  echo "$wanted" >"$VENV/.set-up"
  say "done: $VENV"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main_parity; fi
