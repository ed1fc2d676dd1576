#!/usr/bin/env bash
# Set everything up, then run all checks and tests.
#
#   scripts/test.sh                       # everything, about an hour on two cores
#   scripts/test.sh -m 'not slow'         # arguments go to pytest: only what takes seconds
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh --ray
source "${VENV:-.venv}/bin/activate"
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
