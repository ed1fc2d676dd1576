#!/usr/bin/env bash
# Play iterations of a SPIN run, one `axolotl train` each, and stop at the first failure.
#
#   scripts/iterate.sh yaml_examples/spin-tiny.yml            # all that spin.iterations has left
#   scripts/iterate.sh yaml_examples/spin-tiny.yml 1          # the next one
#   scripts/iterate.sh CONFIG -- --num_processes 8            # arguments after -- go to `axolotl train`
#   scripts/iterate.sh CONFIG 2 -- --launcher torchrun -- --nproc_per_node=8
#
# Needs the environment with Axolotl and spin-plugin to be active. Killed? Run the same line again.
set -euo pipefail

usage() {
    echo "usage: scripts/iterate.sh CONFIG [N] [-- arguments of axolotl train]" >&2
    exit 2
}

[ $# -ge 1 ] && [ "$1" != "--" ] || usage
config=$1
shift
wanted=
if [ $# -gt 0 ] && [ "$1" != "--" ]; then
    [[ $1 =~ ^[1-9][0-9]*$ ]] || usage
    wanted=$1
    shift
fi
if [ $# -gt 0 ]; then
    [ "$1" = "--" ] || usage
    shift
fi
command -v axolotl >/dev/null || { echo "iterate.sh: axolotl is not on PATH; activate its environment (source .venv/bin/activate)" >&2; exit 1; }

# Prints how many iterations are finished and how many there are; where CONFIG is no SPIN configuration, its error.
count='import json, sys
states = [iteration["state"] for iteration in json.load(sys.stdin)["iterations"]]
print(states.count("finished"), len(states))'
progress() {
    local status
    status=$(python -m spin_plugin.cli status "$config" --json) || { echo "$status" >&2; return 1; }
    python -c "$count" <<<"$status"
}

# Without it, `accelerate launch` adds a stack trace of its own to the one-line error of the command below it.
[ $# -gt 0 ] || set -- -- --quiet

counted=$(progress)
read -r finished total <<<"$counted"
goal=$total
if [ -n "$wanted" ] && [ $((finished + wanted)) -lt "$total" ]; then goal=$((finished + wanted)); fi
if [ "$finished" -ge "$goal" ]; then
    echo "spin: all $total iterations of $config are finished"
    exit 0
fi
while [ "$finished" -lt "$goal" ]; do
    axolotl train "$config" "$@"
    before=$finished
    counted=$(progress)
    read -r finished total <<<"$counted"
    # Axolotl exits with 0 when it is interrupted: only a finished iteration counts.
    [ "$finished" -gt "$before" ] || { echo "spin: error: iteration $before was not finished; run the same command again to continue it" >&2; exit 1; }
done
