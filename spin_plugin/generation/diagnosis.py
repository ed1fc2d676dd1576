"""Exit diagnosis of a worker: the decisive line of its log, with advice for known errors."""

import re
import signal
from pathlib import Path

LOWER_MEMORY = "lower vllm.gpu_memory_utilization or vllm.max_model_len"
ENGINE_DIED = "its engine process died (killed, or short of memory?)"
ADVICE = {
    "No module named 'ray'": "install it with pip as `ray[data]` into vLLM's environment, or set "
    "spin.generation.backend to local",
    "out of memory": LOWER_MEMORY,
    "EngineCore encountered an issue": ENGINE_DIED,
    "Socket operation on non-socket": ENGINE_DIED,  # if a request was being sent to it (vllm 0.32)
    "No available memory for the cache": "raise vllm.gpu_memory_utilization or lower vllm.max_model_len",
    "max seq len": "lower vllm.max_model_len or raise vllm.gpu_memory_utilization",
    "Free memory on device": "free the GPU or lower vllm.gpu_memory_utilization",
    "Available memory on node": "free memory, or lower vllm.gpu_memory_utilization (on a CPU: the share of "
    "the machine's memory) or spin.generation.vllm_kwargs.kv_cache_memory_bytes",
}
# Errors at startup that a retry with less memory may avoid.
SHORT_OF_MEMORY = ("out of memory", "Free memory on device", "Available memory on node")
# vLLM does not support LoRA for the architecture or for these target modules (vllm 0.32).
ABOUT_THE_ADAPTER = (
    "does not support LoRA", "expected target modules", "is unsupported LoRA weight", "not supported for LoRA",
    "No supported LoRA modules", "max_lora_rank", "Adapter bias is not supported",
)  # fmt: skip
MAX_LENGTH = 300
# `(EngineCore pid=4711) ERROR 11-22 12:00:09 [core.py:708] `; every part is optional.
PREFIX = re.compile(r"^(?:\(\S.*?pid=[^)]*\)\s*)?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[.*?\]\s*)?")
RAISED = re.compile(r"[\w.]*(?:Error|Exception|Exit|Interrupt)\b")


def is_short_of_memory(cause: str) -> bool:
    """Return whether vLLM exited for lack of memory."""
    return any(sign.lower() in cause.lower() for sign in SHORT_OF_MEMORY)


def is_about_the_adapter(cause: str) -> bool:
    """Return whether vLLM exited because it cannot serve the adapter."""
    return any(sign in cause for sign in ABOUT_THE_ADAPTER)


def diagnose_exit(log: Path, returncode: int | None = None) -> str:
    """Return why vLLM exited, from its exit status or its log, with advice for known errors."""
    lines = _lines(log)
    if returncode is not None and returncode < 0:  # errors in the log are older than the signal
        guess = "; out of memory?" if -returncode == signal.SIGKILL else ""
        cause = f"killed by signal {-returncode} ({signal.strsignal(-returncode)}{guess})"
    else:
        cause = _decisive_line(lines)
    advice = next((text for sign, text in ADVICE.items() if sign.lower() in cause.lower()), None)
    if advice:  # drop vLLM's own, which names flags that do not exist here
        cause = " ".join(part for part in re.split(r"(?<=\.)\s+(?=[A-Z])", cause) if not re.search(r"--\w|VLLM_", part))
    if len(cause) > MAX_LENGTH:  # shorten between words
        end = cause.rfind(" ", MAX_LENGTH - 50, MAX_LENGTH)
        cause = f"{cause[: end if end > 0 else MAX_LENGTH]} …"
    return f"{cause}; {f'{advice}; ' if advice else ''}see {log}"


def _lines(log: Path) -> list[str]:
    """Return the log's last lines without prefixes and without exceptions that vLLM logged below error level."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = []
    for line in (line.strip() for line in text.splitlines()[-400:]):
        prefix = PREFIX.match(line)
        assert prefix is not None  # every part is optional
        harmless = prefix["level"] in ("WARNING", "INFO", "DEBUG") and RAISED.match(line[prefix.end() :])
        if line[prefix.end() :] and not harmless:
            lines.append(line[prefix.end() :])
    return lines


def _decisive_line(lines: list[str]) -> str:
    """Return the line that names the error, or the last one."""
    raised = [index for index, line in enumerate(lines) if RAISED.match(line)]
    if not raised:
        return (lines or ["no output"])[-1]
    # The engine process logs its error first, then its parent logs "see root cause above".
    index = ([index for index in raised if "root cause" not in lines[index].lower()] or raised)[-1]
    # pydantic puts the reason on the next line
    return " ".join(lines[index : index + 2]) if "validation error" in lines[index] else lines[index]
