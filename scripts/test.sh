#!/usr/bin/env bash
# Set up and run every check: style, types, tests, and a smoke test on the other Pythons found. With arguments, only
# pytest runs, and gets them (bash scripts/test.sh tests/unit -k config).
#
#   SMOKE=0   skip the smoke test (scripts/smoke.sh: its first run builds an environment for each Python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-$PWD/.venv}

# The VisualDL test opens the page in a browser.
if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || ! command -v chromedriver >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "test: installing Chromium and its driver (apt-get)"
    { apt-get update && apt-get install -y chromium chromium-driver; } >/dev/null 2>&1 ||
      echo "test: apt-get could not install chromium and chromium-driver; the VisualDL test will fail"
  else
    echo "test: Chromium and chromedriver are missing (apt-get install chromium chromium-driver); the VisualDL test will fail"
  fi
fi

VENV=$VENV bash scripts/setup.sh test
bash scripts/parity_env.sh
python=$VENV/bin/python

# The tests of the CUDA kernels compile them.
if ! command -v nvcc >/dev/null && ! ls "$VENV"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc >/dev/null 2>&1; then
  echo "test: installing NVIDIA's nvcc from the package index"
  OARLOCK_PADDLE=none "$python" -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[nvcc]" ||
    echo "test: nvcc could not be installed; the tests of the CUDA kernels will fail"
fi

echo "test: ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "test: types (mypy)"
"$python" -m mypy
if [ $# != 0 ]; then
  echo "test: pytest"
  exec "$python" -m pytest "$@"
fi

# Tests spend half of their time waiting for processes. So two groups of tests run at once, with the smoke test, which
# mostly waits for pip. The first group prints to the console, the others write logs.
logs=$VENV/test-logs
mkdir -p "$logs"
background=()
trap 'for each in "${background[@]}"; do kill -- "-$each" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM
start() { # LOG COMMAND...: run it in a process group of its own, which is killed when this script ends
  set -m
  "${@:2}" >"$logs/$1" 2>&1 </dev/null &
  background+=($!)
  set +m
}
finish() { # NUMBER LOG TITLE: wait for a command of start() and print its log
  local result=0
  wait "${background[$1]}" || result=$?
  echo "test: $3"
  cat "$logs/$2"
  if [ "$code" = 0 ]; then code=$result; fi
}
code=0
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 3 ? cores / 2 : 1))}
start ranks "$python" -m pytest -p no:cacheprovider tests/rehearsal tests/fuzz
if [ "${SMOKE:-1}" != 0 ]; then start smoke env -u OMP_NUM_THREADS VENV="$VENV" bash scripts/smoke.sh; fi
echo "test: pytest, without tests/rehearsal and tests/fuzz, which run at the same time (log: $logs/ranks)"
"$python" -m pytest --ignore=tests/rehearsal --ignore=tests/fuzz || code=$?
finish 0 ranks "pytest tests/rehearsal tests/fuzz"
if [ "${SMOKE:-1}" != 0 ]; then finish 1 smoke "smoke test on other Pythons"; fi
if [ "$code" = 0 ]; then echo "test: all passed"; else echo "test: FAILED (code $code)"; fi
exit "$code"
