"""`python -m spin_plugin.cli`."""

from spin_plugin.cli import spin

spin(prog_name="spin")
