#!/usr/bin/env bash
# One tiny game of two iterations through `axolotl train` for each way to train, on a machine with two or more GPUs.
# Prints one table: the way, its exit code, and the first and last loss of the last iteration (the first is ln 2).
#
#   scripts/gpu_check.sh [FOLDER]      # FOLDER keeps configurations, logs and runs; default: outputs/gpu-check
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
if [ "$gpus" -lt 2 ]; then
    echo "gpu_check: this needs a machine with two or more NVIDIA GPUs, and nvidia-smi shows $gpus" >&2
    exit 1
fi
folder=${1:-outputs/gpu-check}
python scripts/gpu_configs.py "$folder"
printf '%-12s %-5s %-9s %-10s %-10s\n' way exit processes first last
failed=0
while read -r way processes; do
    code=0
    scripts/iterate.sh "$folder/$way.yml" 2 -- --num_processes "$processes" >"$folder/$way.log" 2>&1 || code=$?
    metrics="$folder/$way/iteration-1/metrics.jsonl"
    losses=$(grep -o '"spin/loss": [0-9.e-]*' "$metrics" 2>/dev/null | cut -d' ' -f2 || true)
    printf '%-12s %-5s %-9s %-10.6s %-10.6s\n' "$way" "$code" "$processes" \
        "$(head -n 1 <<<"$losses")" "$(tail -n 1 <<<"$losses")"
    [ "$code" -eq 0 ] || failed=1
done <"$folder/ways"
exit "$failed"
