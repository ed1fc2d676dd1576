"""`axolotl spin …`, and the same as `python -m spin_plugin.cli …` without Axolotl's start-up time."""

import click

from spin_plugin.cli.init import init
from spin_plugin.cli.reset import reset
from spin_plugin.cli.schema import config_schema
from spin_plugin.cli.setup import setup
from spin_plugin.cli.status import status
from spin_plugin.cli.train import train


@click.group()
def spin() -> None:
    """Self-Play Fine-Tuning: set it up, train all iterations, look at runs, take iterations back."""


for command in (init, setup, train, status, reset, config_schema):
    spin.add_command(command)
