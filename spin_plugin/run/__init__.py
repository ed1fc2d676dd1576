"""The run directory and the processes that use it. Imports neither torch nor Axolotl."""
