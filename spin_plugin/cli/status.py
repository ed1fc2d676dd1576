"""`axolotl spin status`: show the iterations of a run from its files."""

import json
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import console, exit_on_error
from spin_plugin.objective.decline import decline
from spin_plugin.objective.metrics import METRICS
from spin_plugin.run.directory import RunDir
from spin_plugin.run.scores import shown_scores

METRIC_COLUMNS = {metric.column: f"spin/{name}" for name, metric in METRICS.items() if metric.column}


@click.command()
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as the last line of the output.")
@exit_on_error
def status(config: Path, as_json: bool) -> None:
    """Show the iterations of the run configured by CONFIG."""
    content = run_status(config)
    if as_json:
        click.echo(json.dumps(content))
    else:
        console.print(_table(content))
        if scored := [entry for entry in content["iterations"] if "lm_eval" in entry]:
            console.print(_scores(scored))


def run_status(config: Path) -> dict[str, Any]:
    """Return state, pair statistics and latest metrics of every iteration.

    Raises:
        SpinError: `config` is not a SPIN configuration, or the run directory is damaged.
    """
    args, run = read_config(config)
    state = run.read_state()
    finished = state.finished if state else []
    iterations = [entry | {"state": _finished_state(entry)} for entry in finished]
    for number in range(len(finished), args.iterations):
        iterations.append(_unfinished(run, number, started=number == len(finished)))
    return {"output_dir": str(run.root), "iterations": iterations}


def _finished_state(entry: dict[str, Any]) -> str:
    """Say whether a finished iteration made the model worse."""
    return "finished, worse" if decline(entry) else "finished"


def _unfinished(run: RunDir, number: int, *, started: bool) -> dict[str, Any]:
    """Return the progress of an unfinished iteration."""
    directory = run.iteration(number)
    stats_file = directory.pairs / "stats.json"
    pairs = json.loads(stats_file.read_text(encoding="utf-8")) if started and stats_file.exists() else {}
    metrics = directory.last_metrics() if started else {}
    if metrics:
        state = f"training, step {int(metrics['step'])}"
    elif pairs:
        state = "pairs built"
    elif started and directory.synthetic.exists():
        shards = len(list(directory.synthetic.glob("shard-*.jsonl")))
        state = f"generating responses, {shards} shards"
    else:
        state = "not started"
    return {"iteration": number, "state": state, "pairs": pairs, "metrics": metrics}


def _judge_score(entry: dict[str, Any]) -> str:
    """Return the judge's mean score of the held-out responses."""
    judge = entry["pairs"].get("eval", {}).get("judge")
    return f"{judge['mean']:.4f}" if judge and judge["judged"] else ""


def _scores(entries: list[dict[str, Any]]) -> Table:
    """Return a table of lm-evaluation-harness's scores, with a column for each iteration."""
    table = Table(title="lm_eval (± standard error)", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("task/metric", overflow="fold")
    for entry in entries:
        table.add_column(f"t = {entry['iteration']}", justify="right")
    scores = [shown_scores(entry["lm_eval"]) for entry in entries]
    for name in dict.fromkeys(name for shown in scores for name in shown):
        table.add_row(name, *(shown.get(name, "") for shown in scores))
    return table


def _table(content: dict[str, Any]) -> Table:
    table = Table(
        title=f"{content['output_dir']} (real, synth.: mean response length in tokens; metrics: mean over last epoch)",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    judged = any(_judge_score(entry) for entry in content["iterations"])
    columns = ("t", "state", "pairs", "real", "synth.", "equal", *(["judge"] if judged else []), *METRIC_COLUMNS)
    for heading in columns:
        # a pipe has 80 columns; wrap instead of truncating
        table.add_column(heading, justify="left" if heading == "state" else "right", overflow="fold")
    for entry in content["iterations"]:
        stats, metrics = entry["pairs"].get("train"), entry["metrics"]
        described = ["", "", "", ""]
        if stats:
            equal = stats["equal"] / max(1, stats["responses"])
            lengths = (stats["real_mean"], stats["synthetic_mean"])
            described = [f"{stats['pairs']:,}", *(f"{mean:.1f}" for mean in lengths), f"{equal:.1%}"]
        described += [_judge_score(entry)] if judged else []
        values = [f"{metrics[name]:.4f}" if name in metrics else "" for name in METRIC_COLUMNS.values()]
        table.add_row(str(entry["iteration"]), entry["state"], *described, *values)
    return table
