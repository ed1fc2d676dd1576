"""SPIN (Self-Play Fine-Tuning, arXiv 2401.01335) for Axolotl: `rl: spin`."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["SpinPlugin", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the plugin, and with it Axolotl, on first access.

    The lower-level packages (objective, args, run, …) stay importable without Axolotl.
    """
    if name == "SpinPlugin":
        from spin_plugin.plugin import SpinPlugin

        return SpinPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
