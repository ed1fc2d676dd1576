"""`axolotl spin …`. `python -m spin_plugin.cli …` runs the same commands without Axolotl's startup time."""

import click

from spin_plugin.cli.doctor import doctor
from spin_plugin.cli.export import export
from spin_plugin.cli.init import init
from spin_plugin.cli.report import report
from spin_plugin.cli.reset import reset
from spin_plugin.cli.schema import config_schema
from spin_plugin.cli.setup import setup
from spin_plugin.cli.status import status
from spin_plugin.cli.train import train


@click.group()
def spin() -> None:
    """Self-Play Fine-Tuning (SPIN): set up, check, train, inspect, export models, remove iterations."""


for command in (init, setup, doctor, train, status, report, export, reset, config_schema):
    spin.add_command(command)
