#!/usr/bin/env bash
# Run a smoke test (tests/smoke.py) on every supported Python found, except the one of .venv: train a few steps, save,
# resume, ask a question, serve a request. Each Python gets an environment of its own, which is kept.
#
#   bash scripts/smoke.sh [PYTHON...]     PYTHON: run these only (a program, or a version such as 3.12)
#
#   SMOKE_VENVS=DIR     location of the environments (default: build/environments in the repository)
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/setup.sh" # for its functions and PYTHONS
VENVS=${SMOKE_VENVS:-$ROOT/build/environments}
say() { echo "smoke: $*"; }

# Print the Python of a version: from PATH, pyenv or uv.
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
    version=$(version_of "$python") || fail "$python does not start as a Python"
    environment=$VENVS/python$version started=$SECONDS
    VENV=$environment PYTHON=$python bash "$HERE/setup.sh" serve
    say "Python $version: set up in $((SECONDS - started)) s"
    started=$SECONDS
    "$environment/bin/python" "$ROOT/tests/smoke.py"
    say "Python $version: passed in $((SECONDS - started)) s"
  done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main_smoke "$@"; fi
