"""Is SPIN better than more SFT at equal compute? And than DFT, DPO and SDFT?

    python scripts/bench/evidence.py --task tiny --seeds 5 [--methods start spin sft ...]

Runs the real commands (`axolotl train`, `axolotl spin train`, vLLM). A unit is a task, a method and a seed. Each writes
one JSON file into `--results` when it has finished, and finished ones are skipped: interrupt and continue at any time.
`--out` holds the models and may be deleted. `scripts/make_evidence.py` turns the files into docs/evidence.md.

Written down before the first run:

- Start. An SFT model for each seed. On `tiny`, base model, data and SFT have the seed. On `sql` it is the best
  checkpoint of an SFT sweep by the dev split, one for all seeds. Every method starts from it, with the same SFT data.
- Compute. 3 for each token trained on (forward and backward), 1 for each token scored, prefilled or generated, counted
  from the data on disk. Padding, evaluation, start-up and the sweep's other runs do not count.
- SPIN. Fixed settings, no sweep; the last iteration counts.
- SFT. A sweep over learning rate and number of epochs. All checkpoints whose compute does not exceed that of all
  iterations of SPIN are candidates; the dev split chooses, for each compared score anew. So SFT may stop early, and is
  chosen for the very score on which it is compared. DFT, DPO and SDFT are chosen in the same way.
- Score, tiny. The probability in percent of the complete right answer at temperature 1 (there is only one, so it is
  computed, not sampled), on 500 test prompts of the two operations in the SFT data (in-domain) and 500 of the other
  three (out-of-domain). Dev: as many other prompts.
- Score, sql. Execution accuracy on 279 test questions, the mean of eight samples at temperature 1; greedy beside it.
  Dev: 49 questions.
- Statistic. The mean difference SPIN - SFT of the seeds, paired by question, with a 95% bootstrap interval: 10,000
  times seeds are drawn with replacement, then questions within each.
- Targets. tiny: out-of-domain +3 points; sql: sampled +2 points; the interval above 0.
- Seeds. tiny: 1 to 5. Settings were explored on 101 to 103 only.

Added later:

- After start, SPIN and the first sweep had run on tiny. The start is a candidate of every sweep, so that SFT need not
  be continued at all. The bootstrap draws 2,000 times; questions once for all seeds where all have the same ones, sql
  and scan. DFT, DPO and SDFT have smaller sweeps. Score, scan: as on tiny; commands without "jump" (in-domain), and
  with it (out-of-domain), 1,000 each; dev: 200 each.
- `sft-high` and `sft-higher`, three and nine times the sweep's highest learning rate, because that was the best on
  tiny, with the lengths of its sweep; later the same for the other sweeps, as long as SPIN's compute allows.
- `spin-decay` and `spin-decay-space`, after `sft-high`, when SPIN had no lead on tiny; found on seeds 101 and 102.
- Longer runs of DPO, up to SPIN's compute, because its first sweep ended at half of it. No SDFT on tiny: its teacher is
  told the answer in words, and the model knows none.
- Before sql ran: `spin-low`, `spin-judge-sft_weight`. Its start is the best of learning rates 5e-5 and 1e-4: 10 epochs
  of 1e-4, the edge of that sweep. So 10 epochs of 3e-4 were tried: half a point more on dev, greedy four less. The
  start stayed. `spin-judge-many`, when 95% of sql's synthetic responses turned out to equal the real ones; it takes
  twice the compute that the sweeps are held to. `spin-judge-many-sft_weight`, when real responses had become less
  likely with it; four responses a prompt, so that it takes little more than `spin`. `-fast`, when one seed of that had
  gained less than more SFT, which was best at three times SPIN's learning rate. SDFT with one teacher, the paper's
  moving average, and DPO with one learning rate, so that a unit fits 40 minutes; a second one of each was planned.
  `spin-sft_weight-fast`, with the learning rate at which more SFT was best: `sft_weight` without a judge is more SFT on
  all data, and SPIN. `spin-judge-long`, when `spin-judge` was the best of SPIN by its greedy answers, for a quarter of
  the compute.

With so few seeds the interval is too narrow: look at each seed, too.
"""

import argparse
import json
import shutil
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from trials.methods import METHODS
from trials.scan import Scan
from trials.sql import Sql
from trials.sweep import percent
from trials.task import Task
from trials.tiny import Tiny
from trials.unit import RESULTS, ROOT, Found, Unit, once

TASKS: dict[str, type[Task]] = {task.name: task for task in (Tiny, Sql, Scan)}


def chain(options: argparse.Namespace, seed: int) -> None:
    """Run the methods of one seed one after another."""
    begin = Unit(options.task, "start", seed, options.results.absolute())
    known = begin.read() if begin.file.exists() else {}
    directory = options.out.absolute() / options.task / str(seed)
    task = TASKS[options.task](directory, seed, options.inputs, known.get("sweep", ()))
    for method in options.methods:
        unit = replace(begin, method=method)
        if not unit.file.exists():
            if known:
                same_start(task, known)
            unit.write(METHODS[method](task, unit))
            if method != "start":
                shutil.rmtree(task.directory / method)
        found = unit.read()
        scores = ", ".join(f"{name} {value:.1f}" for name, value in found["scores"].items())
        sys.stdout.write(f"{options.task}, {method}, seed {seed}: {scores}; compute {found['compute']:,}\n")
        sys.stdout.flush()


def same_start(task: Task, known: Found) -> None:
    """Refuse a start that was made again and is not the one of the results: rounding differs between machines.

    Raises:
        SystemExit: it differs on the dev split.
    """
    with once(task.directory / "same", json.dumps(known["dev"])) as needed:
        if needed and (dev := percent(task.score(task.start, "dev"))) != known["dev"]:
            raise SystemExit(
                f"evidence: the start of {task.name}, seed {task.seed}, was made again and has other scores on the dev "
                f"split, {dev} instead of {known['dev']}; methods are compared from one start, so use other --results"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="1 to this number")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all that make sense on the task")
    inputs = "sql, scan: directory with the data and base/, a chat model; see trials/sql.py and trials/scan_data.py"
    parser.add_argument("--inputs", type=Path, help=inputs)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/evidence", help="directory of the models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON files")
    parser.add_argument("--parallel", type=int, default=1, help="seeds at a time; set OMP_NUM_THREADS=1 with it")
    options = parser.parse_args()
    if options.seeds < 1 or options.parallel < 1:
        parser.error("--seeds and --parallel must be at least 1")
    task = TASKS[options.task]
    options.methods = options.methods or [method for method in METHODS if method not in task.without]
    senseless = [method for method in options.methods if method in task.without]
    if senseless:
        parser.error(f"{', '.join(senseless)}: no use on {task.name}, see trials/{task.name}.py")
    files = task.files
    if files and options.inputs is None:
        parser.error(f"--inputs is missing; {inputs}")
    options.inputs = options.inputs and options.inputs.absolute()
    missing = [name for name in files if not (options.inputs / name).exists()]
    if missing:
        parser.error(f"{options.inputs} lacks {', '.join(missing)}")
    errors = []
    with ThreadPoolExecutor(options.parallel) as pool:
        for ended in as_completed([pool.submit(chain, options, seed) for seed in range(1, options.seeds + 1)]):
            error = ended.exception()
            if error is not None:  # reported at once; the other seeds go on
                errors.append(error)
                expected = isinstance(error, SystemExit)
                sys.stderr.write(f"{error}\n" if expected else "".join(traceback.format_exception(error)))
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
