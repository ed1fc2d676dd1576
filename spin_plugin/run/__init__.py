"""The run directory and the processes that work in it. Needs neither torch nor Axolotl."""
