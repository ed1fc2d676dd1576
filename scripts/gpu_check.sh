#!/usr/bin/env bash
# One tiny game of two iterations through `axolotl train` for each of 21 ways to train and to draw responses, on a machine
# with two or more GPUs. Prints one table: the way, its exit code and processes, the first and last loss of the last
# iteration, and what is wrong: the command failed, or the first loss is not ln 2 (within the rounding of 16 bits).
#
#   scripts/gpu_check.sh [FOLDER]      # FOLDER keeps configurations, logs and runs; default: outputs/gpu-check
#
# Needs what scripts/setup.sh makes. About two minutes a way; what is finished is left alone by a second run.
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
printf '%-14s %-5s %-9s %-10s %-10s %s\n' way exit processes first last wrong
failed=0
while read -r way processes; do
    code=0
    scripts/iterate.sh "$folder/$way.yml" 2 -- --num_processes "$processes" </dev/null >"$folder/$way.log" 2>&1 || code=$?
    losses=$(grep -o '"spin/loss": [0-9.e-]*' "$folder/$way/iteration-1/metrics.jsonl" 2>/dev/null | cut -d' ' -f2 || true)
    first=$(head -n 1 <<<"$losses")
    wrong=
    if [ "$code" -ne 0 ]; then
        wrong=$(grep -a '^spin: error' "$folder/$way.log" | tail -n 1 || true)
        wrong=${wrong:-see $folder/$way.log}
    elif ! awk -v loss="${first:-0}" 'BEGIN { exit !(loss > 0.67 && loss < 0.72) }'; then
        wrong="the first loss is not ln 2"
    fi
    printf '%-14s %-5s %-9s %-10.6s %-10.6s %s\n' "$way" "$code" "$processes" "$first" "$(tail -n 1 <<<"$losses")" "$wrong"
    [ -z "$wrong" ] || failed=1
done <"$folder/ways"
exit "$failed"
