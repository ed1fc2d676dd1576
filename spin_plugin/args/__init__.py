"""The `spin:` block: every option with its type, bounds, default and description.

docs/reference.md is generated from these classes (`python scripts/make_reference.py`).
"""

from spin_plugin.args.block import Block, Mark
from spin_plugin.args.generation import IN_VLLM_BLOCK, PLUGIN_VLLM_KEYS, VLLM_SERVER_KEYS, GenerationArgs, VllmArgs
from spin_plugin.args.judge import JudgeArgs
from spin_plugin.args.spin import RUN_WIDE_KEYS, SpinArgs, SpinPluginArgs
from spin_plugin.args.stop import StopArgs

__all__ = [
    "IN_VLLM_BLOCK",
    "PLUGIN_VLLM_KEYS",
    "RUN_WIDE_KEYS",
    "VLLM_SERVER_KEYS",
    "Block",
    "GenerationArgs",
    "JudgeArgs",
    "Mark",
    "SpinArgs",
    "SpinPluginArgs",
    "StopArgs",
    "VllmArgs",
]
