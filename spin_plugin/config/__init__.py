"""Axolotl's configuration: `rl: spin` becomes a supervised run, what cannot work is refused, and keys are compared."""
