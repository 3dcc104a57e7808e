#!/usr/bin/env bash
# The tests, in a virtual environment of their own (check.sh shares it). Arguments go to pytest: scripts/test.sh -k merge, scripts/test.sh -m slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
make_venv .venv-dev "[dev]"
# one thread a worker: the tests' matrices are small, and two workers share the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv-dev/bin/python -m pytest -n "${TEST_WORKERS:-2}" "$@"
