"""`axolotl spin status`: show the iterations of a run from its files."""

import json
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import console, exit_on_error, say
from spin_plugin.objective.metrics import METRICS
from spin_plugin.run.overview import list_iterations, newest_stats
from spin_plugin.run.scores import shown_scores
from spin_plugin.run.stop import Best, conclusion

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
        for entry in content["iterations"]:
            for finding in entry.get("findings", []):
                console.print(f"iteration {entry['iteration']}: {finding['message']}; {finding['advice']}")
        if best := content["best"]:
            say(f"best: {Best(**best)}")
        if content["stopped"]:
            say(content["stopped"])


def run_status(config: Path) -> dict[str, Any]:
    """Return state, pair statistics and latest metrics of every iteration, the best one, and why the run has stopped.

    Raises:
        SpinError: `config` is not a SPIN configuration, or the run directory is damaged.
    """
    args, run = read_config(config)
    iterations = list_iterations(run, args.iterations)
    return {
        "output_dir": str(run.root),
        "iterations": iterations,
        **conclusion(iterations[: run.finished()], args),
    }


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
    diverges = any("divergence" in entry for entry in content["iterations"])
    explained = "real, synth.: mean response length in tokens; metrics: mean over last epoch"
    judged = any(_judge_score(entry) for entry in content["iterations"])
    explained += "; judge: mean score of the opponent's held-out responses" if judged else ""
    explained += "; KL: nats per token from iteration 0's opponent" if diverges else ""
    table = Table(
        title=f"{content['output_dir']} ({explained})",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    columns = ["t", "state", "pairs", "real", "synth.", "equal", *(["judge"] if judged else []), *METRIC_COLUMNS]
    columns += ["KL"] if diverges else []
    for heading in columns:
        # a pipe has 80 columns; wrap instead of truncating
        table.add_column(heading, justify="left" if heading == "state" else "right", overflow="fold")
    for entry in content["iterations"]:
        stats, metrics = entry["pairs"].get("train"), entry["metrics"]
        described = ["", "", "", ""]
        if stats:
            own = newest_stats(entry)
            equal = own["equal"] / max(1, own["responses"])
            lengths = (own["real_mean"], own["synthetic_mean"])
            described = [f"{stats['pairs']:,}", *(f"{mean:.1f}" for mean in lengths), f"{equal:.1%}"]
        described += [_judge_score(entry)] if judged else []
        values = [f"{metrics[name]:.4f}" if name in metrics else "" for name in METRIC_COLUMNS.values()]
        values += [f"{entry['divergence']:.4f}" if "divergence" in entry else ""] if diverges else []
        table.add_row(str(entry["iteration"]), entry["state"], *described, *values)
    return table
