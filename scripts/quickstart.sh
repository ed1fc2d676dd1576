#!/usr/bin/env bash
# SPIN end to end on any machine: setup, tiny model and data, SFT, four iterations of self-play, results table.
#
#   scripts/quickstart.sh
#
# Runs real Axolotl and real vLLM without a GPU or a model hub. About 10 minutes on two cores after the downloads.
# Finished steps are skipped: rerun it to continue after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
source "${VENV:-.venv}/bin/activate"
export HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1

python scripts/tiny/make.py --out outputs/tiny
if [ ! -f outputs/tiny/sft/finished ]; then
    echo "quickstart: SFT, about two minutes; log in outputs/tiny/sft.log"
    if ! axolotl train yaml_examples/sft-tiny.yml >outputs/tiny/sft.log 2>&1; then
        tail -n 30 outputs/tiny/sft.log >&2
        exit 1
    fi
    touch outputs/tiny/sft/finished
fi
scripts/iterate.sh yaml_examples/spin-tiny.yml
python scripts/tiny/evaluate.py --run outputs/spin-tiny --sft outputs/tiny/sft --data outputs/tiny/data/heldout.jsonl
