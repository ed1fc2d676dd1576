#!/usr/bin/env bash
# SPIN end to end on any machine: setup, tiny model and data, SFT, four iterations of self-play, results table.
#
#   scripts/quickstart.sh
#
# Runs real Axolotl and real vLLM without a GPU or a model hub. About 10 minutes on two cores after the downloads.
# Finished steps are skipped: rerun it to continue after an interruption. At most 60 lines; all output is in outputs/.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
source "${VENV:-.venv}/bin/activate"
export HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1
logs=outputs/logs
mkdir -p "$logs"

# Runs a Python program that prints progress and results; other packages' messages go to a log. The programs use the CPU,
# which DeepSpeed, if it is not told so, warns about on stdout.
program() {
    local log=$logs/$1.log
    if ! DS_ACCELERATOR=cpu python "scripts/tiny/$1.py" "${@:2}" 2>"$log"; then
        tail -n 30 "$log" >&2
        echo "quickstart: $1.py failed; the end of $log is above" >&2
        exit 1
    fi
}

echo "quickstart: base model and data, one to two minutes; other output of all steps is in $logs"
program make --out outputs/tiny
if [ ! -f outputs/tiny/sft/finished ]; then
    echo "quickstart: SFT, about a minute"
    python -m scripts.logged "$logs/sft.log" axolotl train yaml_examples/sft-tiny.yml
    touch outputs/tiny/sft/finished
    echo "quickstart: SFT finished: outputs/tiny/sft"
fi
echo "quickstart: four iterations of self-play, one to three minutes each"
python -m spin_plugin.cli train yaml_examples/spin-tiny.yml # as `axolotl spin train`, but without Axolotl's logo
program evaluate --run outputs/spin-tiny --sft outputs/tiny/sft --data outputs/tiny/data/heldout.jsonl
