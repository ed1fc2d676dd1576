#!/usr/bin/env bash
# Set up the environments, then run all checks and tests.
#
#   scripts/test.sh                       # all tests, with two workers
#   scripts/test.sh -m 'not slow'         # arguments go to pytest: only the fast tests
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh --ray
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
mypy
# the tests of a file share expensive fixtures, so they run on one worker; slow tests first (tests/conftest.py)
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
