#!/usr/bin/env bash
# Set everything up, then run all checks and tests.
#
#   scripts/test.sh                       # everything on two cores
#   scripts/test.sh -m 'not slow'         # arguments go to pytest: only what takes seconds
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh --ray
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
mypy
# a file's tests share costly fixtures, so one worker has them; files with slow tests come first (tests/conftest.py)
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
