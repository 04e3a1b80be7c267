#!/usr/bin/env bash
# Set up a second environment for the tests that compare with Hugging Face: torch (CPU), transformers and peft, the extra
# [parity] of pyproject.toml. It is separate from .venv, where PaddleNLP needs older tokenizers and another OpenMP is
# loaded. Safe to run again at any time; does nothing when everything is installed.
#
#   bash scripts/parity_env.sh
#
#   PARITY_VENV=DIR            location of the environment (default: .venv-parity in the repository)
#   PARITY_PYTHON=python3.11   Python to use (default: the first of 3.11, 3.12 and 3.10 found; it may differ from the
#                              one of .venv)
#   PARITY_TORCH=any           if there is no CPU build of torch, install the one with CUDA, which takes several GB
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/setup.sh" # its functions: find_python, make_venv, fail
VENV=${PARITY_VENV:-$ROOT/.venv-parity}
CPU_INDEX=https://download.pytorch.org/whl/cpu # the builds without CUDA, a tenth of the size
say() { echo "parity: $*"; }

# The requirements of the extra, one per line.
requirements() {
  sed -n '/^parity = \[/,/^\]/p' "$ROOT/pyproject.toml" | sed -n 's/^  "\([^"]*\)".*/\1/p'
}

# Whether pip finds the CPU build of torch. It prefers that one to the build with CUDA of the same version.
has_cpu_torch() {
  local torch
  torch=$(requirements | grep '^torch==')
  "$VENV/bin/python" -m pip install --disable-pip-version-check --dry-run --no-deps --ignore-installed "$@" "$torch+cpu" \
    >/dev/null 2>&1
}

main_parity() {
  local python wanted log=$VENV/parity.log index=()
  python=$(PYTHON=${PARITY_PYTHON:-} find_python python3.11 python3.12 python3.10 ${PYTHON:-})
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
  if [ "${PARITY_TORCH:-}" != any ] && [ "$(uname -m)" = x86_64 ] && ! has_cpu_torch "${index[@]}"; then
    fail "$CPU_INDEX can't be reached, and your package index has no CPU build of torch for $("$python" -V). Try another" \
      "Python (PARITY_PYTHON=...), or PARITY_TORCH=any for the build with CUDA, which takes several GB"
  fi
  say "installing $(requirements | tr '\n' ' ')into $VENV"
  mapfile -t wheels < <(requirements)
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check "${index[@]}" "${wheels[@]}" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "pip failed (full output: $log). Check the network and run this again; finished downloads are kept."
  fi
  echo "$wanted" >"$VENV/.set-up"
  say "done: $VENV"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main_parity; fi
