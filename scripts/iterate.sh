#!/usr/bin/env bash
# Run all iterations of a SPIN run: scripts/iterate.sh CONFIG [--iterations N] [-- arguments of `axolotl train`]
exec axolotl spin train "$@"
