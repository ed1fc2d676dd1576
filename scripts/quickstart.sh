#!/usr/bin/env bash
# The whole of SPIN on any machine: set up, make a tiny model and data, SFT, four iterations of self-play, table.
#
#   scripts/quickstart.sh
#
# Real Axolotl, real vLLM, no GPU and no model hub needed. About 10 minutes on two cores after the downloads; what is
# finished is left alone, so a second run takes seconds and an interrupted one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
source "${VENV:-.venv}/bin/activate"
export HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1

python scripts/tiny/make.py --out outputs/tiny
if [ ! -f outputs/tiny/sft/finished ]; then
    axolotl train yaml_examples/sft-tiny.yml
    touch outputs/tiny/sft/finished
fi
scripts/iterate.sh yaml_examples/spin-tiny.yml
python scripts/tiny/evaluate.py --run outputs/spin-tiny --sft outputs/tiny/sft --data outputs/tiny/data/heldout.jsonl
