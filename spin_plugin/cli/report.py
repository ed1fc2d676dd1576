"""`axolotl spin report`: what self-play did, as a page, JSON and JSONL."""

from pathlib import Path

import click

from spin_plugin.cli.config_file import CONFIG, read_config
from spin_plugin.console import exit_on_error, say


@click.command()
@CONFIG
@click.option(
    "--prompts", type=click.IntRange(min=1), default=300, show_default=True, help="Prompts in the grid, at most."
)
@exit_on_error
def report(config: Path, prompts: int) -> None:
    """Write report.html, report.json and report.jsonl into the output_dir of CONFIG.

    Every iteration writes them at its end; this command does so at any time, also while the run trains.
    """
    from spin_plugin.report.write import write_report

    args, run = read_config(config)
    page = write_report(run, args, prompts)
    say(f"report: {page}; its numbers are in {page.with_suffix('.json')}, its prompts in {page.with_suffix('.jsonl')}")
