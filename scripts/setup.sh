#!/usr/bin/env bash
# Set up the environments beside this checkout: .venv (Axolotl and spin-plugin) and, without a GPU, .venv-vllm (vLLM).
#
#   scripts/setup.sh
#   scripts/setup.sh --ray    # with Ray, for `generation: {backend: ray}`
#
# Uses the first of Python 3.12, 3.13 and 3.11 that runs, and the newest Axolotl for it: 0.19 on Python 3.11, else 0.21.
# PYTHON selects another interpreter, VENV another directory than .venv; an existing environment keeps its Python. With
# an NVIDIA GPU and Python 3.12 or newer, one environment contains everything; otherwise vLLM needs its own because its
# pins conflict with Axolotl's. Complete environments are kept, incomplete ones are rebuilt from scratch.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

fail() {
    echo "setup.sh: $1" >&2
    exit 1
}

runs() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

# pyenv puts a shim on PATH for every installed version, but it runs only if that version is selected.
from_pyenv() {
    [ -n "${PYENV_VERSION:-}" ] || find "$(pyenv root 2>/dev/null)/versions" -path "*/bin/$1" 2>/dev/null | sort -V | tail -n 1
}

# Sets `python`. Reports a Python that exists but does not run, so that its replacement is no surprise.
find_python() {
    local name
    if [ -n "${PYTHON:-}" ]; then
        runs "$PYTHON" || fail "PYTHON=$PYTHON does not run or is not Python 3.11 to 3.13; name another one"
        python=$PYTHON
        return
    fi
    if runs "$venv/bin/python"; then # an existing environment keeps its Python
        python=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)')
        return
    fi
    for name in python3.12 python3.13 python3.11 python3 python; do  # 3.12 first: all dependencies have wheels for it
        command -v "$name" >/dev/null || continue
        for python in "$name" "$(from_pyenv "$name")"; do
            if runs "$python"; then return; fi
        done
        echo "setup: $name does not run or is not Python 3.11 to 3.13; trying the next one" >&2
    done
    fail "no Python 3.11 to 3.13 found; set PYTHON to one"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# Runs pip where nothing can show its progress yet; the packages are small.
pip_first() {
    "$venv/bin/python" -m pip install --quiet "$@" >"$venv/setup.log" 2>&1 || {
        tail -n 30 "$venv/setup.log" >&2
        fail "pip failed; the end of $venv/setup.log is above"
    }
}

find_python
beside= # process that creates vLLM's environment
extras=deepspeed,test
one_environment() { has_gpu && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; }
if one_environment; then extras=vllm,$extras; fi
if one_environment && [ "${1:-}" = --ray ]; then extras=ray,$extras; fi
# The environment's inputs; it is rebuilt when they change.
wanted="$("$python" --version) [$extras] $(sed -n '/^dependencies/,/^\[project.entry/p' pyproject.toml | sha256sum | cut -d ' ' -f 1)"
if [ "$(cat "$venv/made-from" 2>/dev/null)" != "$wanted" ]; then
    if [ -e "$venv" ] && [ ! -e "$venv/made-by-spin-plugin" ]; then
        fail "$venv exists and was not created by this script; move it or set VENV"
    fi
    echo "setup: $venv: Axolotl and spin-plugin on $("$python" --version); a few minutes and 4 GB (7 GB if pip finds"
    echo "setup: only torch's CUDA build for this Python); pip's output is in $venv/setup.log"
    rm -rf "$venv"
    mkdir -p "$venv"
    touch "$venv/made-by-spin-plugin" # first, so that a rerun recognizes an incomplete one
    "$python" -m venv "$venv"
    # what the next steps need; they show pip's progress
    pip_first click filelock packaging psutil pydantic pyyaml rich
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
        # Axolotl 0.21 pins zstandard, which has no wheel for 3.13 and whose build requires a cffi without 3.13 support.
        pip_first 'cffi>=1.17,<2.1' setuptools wheel
        pip_first --no-build-isolation zstandard==0.22.0
    fi
    if ! one_environment; then
        # in parallel, because pip keeps only one core busy; without its progress, which would disturb the other's
        "$venv/bin/python" -m spin_plugin.cli setup --path .venv-vllm "$@" > >(grep --line-buffered '^spin: ') &
        beside=$!
        trap 'kill "$beside" 2>/dev/null || true' EXIT
    fi
    "$venv/bin/python" -m scripts.logged "$venv/setup.log" \
        "$venv/bin/python" -m pip install --editable ".[$extras]"
    # pip does not compile if PYTHONDONTWRITEBYTECODE is set; every start would then recompile everything
    "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
    echo "$wanted" >"$venv/made-from"
fi
if [ -n "$beside" ]; then
    wait "$beside"
elif ! one_environment; then
    "$venv/bin/python" -m spin_plugin.cli setup --path .venv-vllm "$@"
fi
echo "setup: $venv is ready: $("$venv/bin/python" -c '
from importlib.metadata import version
from platform import python_version
print(f"Python {python_version()},", ", ".join(f"{name} {version(name)}" for name in ("axolotl", "torch")))')"
