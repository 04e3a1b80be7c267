#!/usr/bin/env bash
# Set up and run every check: style, types, tests, and a smoke test on the other Pythons found. Arguments go to pytest,
# and leave the smoke test out (bash scripts/test.sh tests/unit -k config).
#
#   SMOKE=0   leave the smoke test out (scripts/smoke.sh: its first run makes an environment for each Python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-$PWD/.venv}

# The VisualDL test looks at the page in a browser.
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
# The smoke test mostly waits for pip, so it goes beside the other tests.
smoke='' smoke_log=$VENV/smoke.log
if [ $# = 0 ] && [ "${SMOKE:-1}" != 0 ]; then
  set -m # in a process group of its own, so that nothing of it is left when the tests fail
  VENV=$VENV bash scripts/smoke.sh >"$smoke_log" 2>&1 </dev/null &
  smoke=$!
  set +m
  trap 'kill -- "-$smoke" 2>/dev/null || true' EXIT
fi
echo "test: pytest"
"$python" -m pytest "$@"
if [ -n "$smoke" ]; then
  echo "test: smoke test on other Pythons"
  code=0
  wait "$smoke" || code=$?
  trap - EXIT
  cat "$smoke_log"
  exit "$code"
fi
