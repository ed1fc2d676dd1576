"""Synthetic responses: generation jobs, their shards on disk, and the launcher of vLLM's interpreter."""
