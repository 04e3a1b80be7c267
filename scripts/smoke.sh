#!/usr/bin/env bash
# A smoke test on every supported Python that is found and is not that of .venv: train some steps, save, resume, ask,
# serve a request (tests/smoke.py). An environment for each is made once and kept.
#
#   bash scripts/smoke.sh [PYTHON...]     PYTHON: which instead, .venv's too (a program, or a version such as 3.12)
#
#   SMOKE_VENVS=DIR     where the environments go (default: build/environments in the repository)
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/setup.sh" # its functions, and PYTHONS
VENVS=${SMOKE_VENVS:-$ROOT/build/environments}
say() { echo "smoke: $*"; }

# The Python of a version: in PATH, or one that pyenv or uv has installed.
python_of() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/"python$1" \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*/bin/"python$1"; do
    if [ "$(version_of "$candidate")" = "$1" ]; then
      command -v "$candidate"
      return
    fi
  done
}

main_smoke() {
  local wanted=("$@") name python version environment started
  if [ $# = 0 ]; then
    for version in $PYTHONS; do
      [ "$version" = "$(version_of "$VENV/bin/python")" ] || wanted+=("$version")
    done
  fi
  for name in ${wanted[@]+"${wanted[@]}"}; do
    python=$name
    case $name in 3.*) python=$(python_of "$name") ;; esac
    if [ -z "$python" ]; then
      [ $# = 0 ] || fail "there is no Python $name here"
      say "no Python $name here"
      continue
    fi
    version=$(version_of "$python") || fail "$python is not a Python that starts"
    environment=$VENVS/python$version started=$SECONDS
    VENV=$environment PYTHON=$python bash "$HERE/setup.sh" serve
    say "Python $version: set up in $((SECONDS - started)) s"
    started=$SECONDS
    "$environment/bin/python" "$ROOT/tests/smoke.py"
    say "Python $version: passed in $((SECONDS - started)) s"
  done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main_smoke "$@"; fi
