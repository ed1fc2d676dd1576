"""Axolotl's configuration: parsing, validation, lowering to a supervised run, and comparison between commands."""
