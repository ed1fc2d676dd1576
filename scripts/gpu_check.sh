#!/usr/bin/env bash
# One game of two iterations through `axolotl train` for each of 27 ways to train and to draw responses, most with a tiny
# model, one with a random 1B model, as many as the GPUs of this machine allow; then our generation against vLLM's own.
# Prints one table and what was left out: see scripts/gpu/play.py for its columns.
#
#   scripts/gpu_check.sh [FOLDER] [--only WAY ...]   # FOLDER keeps configurations, logs and runs; default: outputs/gpu-check
#
# Needs what scripts/setup.sh makes. About two minutes a way; what is finished is left alone by a second run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
if [ "$gpus" -lt 1 ]; then
    echo "gpu_check: this needs a machine with an NVIDIA GPU (two or more for all of it), and nvidia-smi shows none" >&2
    exit 1
fi
exec python scripts/gpu/play.py --gpus "$gpus" "$@"
