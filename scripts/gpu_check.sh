#!/usr/bin/env bash
# Run two iterations of `axolotl train` for each of 27 ways to train and to generate responses, as many as this machine's
# GPUs allow. Most use a tiny model, one a random 1B model. Then compare our generation with vLLM's own.
# Prints one table and what was left out; scripts/gpu/check.py explains the columns.
#
#   scripts/gpu_check.sh [DIRECTORY] [--only WAY ...]   # for configurations, logs and runs; default: outputs/gpu-check
#
# Needs the environment of scripts/setup.sh. About two minutes per way; a rerun skips finished ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
if [ "$gpus" -lt 1 ]; then
    echo "gpu_check: nvidia-smi shows no GPU; run this on a machine with an NVIDIA GPU (all checks need two)" >&2
    exit 1
fi
exec python scripts/gpu/check.py --gpus "$gpus" "$@"
