#!/usr/bin/env bash
# A second environment for the tests that compare with Hugging Face: torch (CPU), transformers and peft, the extra
# [parity] of pyproject.toml. Apart from .venv, whose PaddleNLP wants older tokenizers and whose OpenMP is another one.
# Safe to run again at any time; does nothing when all is there.
#
#   bash scripts/parity_env.sh
#
#   PARITY_VENV=DIR            where it goes (default: .venv-parity in the repository)
#   PARITY_PYTHON=python3.11   which Python makes it (default: the first of 3.11, 3.12 and 3.10 found; it need not be
#                              the suite's)
#   PARITY_TORCH=any           take the build of torch that the package index has, several GB with CUDA, where no build
#                              for CPUs is to be had
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

# Whether pip finds torch's build for CPUs, which it prefers to the one with CUDA of the same version.
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
    fail "$CPU_INDEX can't be reached, and your package index has no torch for CPUs and $("$python" -V). Try another" \
      "Python (PARITY_PYTHON=...), or PARITY_TORCH=any for the build with CUDA, which takes several GB"
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
