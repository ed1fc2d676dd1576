"""Judges synthetic responses, so that those as good as the real one are left out of training.

The ready-made judges: `spin.judge.function` names one of them, or a function of the user's with the same signature.
Imported in every judge process, so it needs only the standard library.
"""

from spin_plugin.judge.answers import exact, number
from spin_plugin.judge.sql import sqlite

__all__ = ["exact", "number", "sqlite"]
