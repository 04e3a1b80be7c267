#!/usr/bin/env bash
# Set up a virtual environment with Oarlock, the Paddle wheel that fits this machine, and the fused operators.
# Safe to run again at any time; does nothing when everything is installed.
#
#   bash scripts/setup.sh [EXTRAS]        EXTRAS: e.g. "test"
#
#   VENV=DIR            location of the environment (default: .venv in the repository)
#   PYTHON=python3.12   Python to use (default: the newest of 3.12, 3.11 and 3.10 found; an existing environment keeps
#                       its own)
#   PADDLE=cpu          Paddle build: cpu, cu118, cu126, cu129 or cu130 (default: chosen by the NVIDIA driver)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
EXTRAS=${1:-}
PYTHONS="3.12 3.11 3.10" # newest first; paddlenlp needs numpy below 2, which does not exist for 3.13
PADDLE_VERSION=3.3.1
PADDLE_INDEX=https://www.paddlepaddle.org.cn/packages/stable # PyPI has GPU wheels only up to 2.6.2

say() { echo "setup: $*"; }
fail() {
  echo "setup: error: $*" >&2
  exit 1
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# Whether $VENV is a working environment.
venv_works() { [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

# Print $PYTHON if it is set and supported. Otherwise print the first supported Python of: the existing environment (it
# is not rebuilt for a newer Python), the candidates given (default: the newest first), python3, python.
find_python() {
  local candidate version others="" candidates=("$@")
  [ $# -gt 0 ] || candidates=($(printf 'python%s ' $PYTHONS))
  candidates+=(python3 python)
  if venv_works; then candidates=("$VENV/bin/python" "${candidates[@]}"); fi
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version=$(version_of "$candidate") || continue
    case " $PYTHONS " in *" $version "*)
      command -v "$candidate"
      return
      ;;
    esac
    others="$candidate is $version"
  done
  fail "no Python of ${PYTHONS// /, } found${others:+ ($others)}. Install one (Debian 12, Ubuntu: apt-get install python3" \
    "python3-venv; elsewhere: uv python install ${PYTHONS%% *}) and name it: PYTHON=... bash scripts/setup.sh"
}

# Print cpu, or the newest CUDA series of Paddle's wheels that the driver can run.
choose_paddle() {
  local cuda
  if [ -n "${PADDLE:-}" ]; then
    echo "$PADDLE"
    return
  fi
  cuda=$({ nvidia-smi 2>/dev/null || true; } | sed -n 's/.*CUDA Version: *\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' | head -n 1)
  [ -n "$cuda" ] || {
    echo cpu
    return
  }
  set -- $cuda
  local number=$(($1 * 100 + $2))
  if [ $number -ge 1300 ]; then
    echo cu130
  elif [ $number -ge 1209 ]; then
    echo cu129
  elif [ $number -ge 1206 ]; then
    echo cu126
  elif [ $number -ge 1108 ]; then
    echo cu118
  else
    fail "this driver supports CUDA $1.$2 only; Paddle $PADDLE_VERSION needs 11.8 or newer. Update the driver, or PADDLE=cpu."
  fi
}

make_venv() {
  local python=$1
  if venv_works; then
    [ "$(version_of "$VENV/bin/python")" != "$(version_of "$python")" ] || return 0
    say "$VENV has Python $(version_of "$VENV/bin/python"), so it is rebuilt"
  fi
  say "making $VENV with $("$python" --version)"
  rm -rf "$VENV"
  if ! "$python" -m venv "$VENV" >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      say "this Python has no venv module: apt-get install python3-venv"
      { apt-get update && apt-get install -y python3-venv "$(basename "$python")-venv"; } >/dev/null 2>&1 ||
        apt-get install -y python3-venv >/dev/null 2>&1 || true
    fi
    rm -rf "$VENV"
    "$python" -m venv "$VENV" || fail "$python can't make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)"
  fi
}

install() {
  local log=$VENV/setup.log
  if ! "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$ROOT/constraints.txt" "$@" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "pip failed (full output: $log). Check the network and run this again; finished downloads are kept."
  fi
}

# Build the fused operators of custom_ops/ into llm/oarlock/ops. Only changed sources are compiled again.
build_ops() {
  if ! command -v g++ >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "g++ is missing; it builds the fused operators: apt-get install g++"
    { apt-get install -y g++ || { apt-get update && apt-get install -y g++; }; } >/dev/null 2>&1 || true
  fi
  local code=0
  "$VENV/bin/python" "$ROOT/custom_ops/build.py" || code=$?
  # 3: this machine can't build them. The reason is printed, and training works without. Any other code is an error.
  [ $code = 0 ] || [ $code = 3 ] || fail "the fused operators of custom_ops/ do not compile here, see above"
}

main() {
  local python wheel stamp wanted
  python=$(find_python)
  wheel=$(choose_paddle)
  wanted=$(cat "$ROOT"/{constraints.txt,pyproject.toml,setup.py,scripts/setup.sh} | sha256sum | cut -c1-16)-$wheel-$("$python" -V | tr -d ' ')
  for stamp in "$VENV/.set-up-$EXTRAS" "$VENV/.set-up-test"; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/oarlock" --version >/dev/null 2>&1; then
      build_ops
      say "$VENV is up to date (Paddle for $wheel)"
      return
    fi
  done
  make_venv "$python"
  rm -f "$VENV"/.set-up-*
  if [ "$wheel" = cpu ]; then
    say "installing paddlepaddle $PADDLE_VERSION (CPU: no NVIDIA driver here)"
    install "paddlepaddle==$PADDLE_VERSION"
  else
    say "installing paddlepaddle-gpu $PADDLE_VERSION for $wheel (driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1))"
    "$VENV/bin/python" -m pip uninstall -y paddlepaddle >/dev/null 2>&1 || true
    install "paddlepaddle-gpu==$PADDLE_VERSION" --index-url "$PADDLE_INDEX/$wheel/" --extra-index-url "${PIP_INDEX_URL:-https://pypi.org/simple}"
  fi
  build_ops
  say "installing Oarlock and its dependencies${EXTRAS:+ (with $EXTRAS)}"
  OARLOCK_PADDLE=none install -e "$ROOT${EXTRAS:+[$EXTRAS]}"
  echo "$wanted" >"$VENV/.set-up-$EXTRAS"
  say "done: $VENV"
}

# A test sources this file and calls single functions.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then main; fi
