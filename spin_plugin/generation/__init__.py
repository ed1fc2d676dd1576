"""Synthetic responses: the job, its shards on disk, and the launcher of vLLM's own interpreter."""
