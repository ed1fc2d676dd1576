"""Why a worker died: the telling line of its log, and what to do about it where that is known."""

import re
import signal
from pathlib import Path

SMALLER = "lower vllm.gpu_memory_utilization or vllm.max_model_len"
ENGINE_DIED = "its engine process died (killed, or short of memory?)"
ADVICE = {
    "No module named 'ray'": "install it with pip as `ray[data]` into vLLM's environment, or set "
    "spin.generation.backend to local",
    "out of memory": SMALLER,
    "EngineCore encountered an issue": ENGINE_DIED,
    "Socket operation on non-socket": ENGINE_DIED,  # it was just being asked (vllm 0.32)
    "No available memory for the cache": "raise vllm.gpu_memory_utilization, or lower max_model_len",
    "max seq len": "lower vllm.max_model_len or raise vllm.gpu_memory_utilization",
    "Free memory on device": "free the GPU or lower vllm.gpu_memory_utilization",
    "Available memory on node": "free memory, or lower vllm.gpu_memory_utilization (on a CPU: the share of "
    "the machine's memory) or spin.generation.vllm_kwargs.kv_cache_memory_bytes",
}
# Where another attempt with less memory may succeed though vLLM had not even started.
SHORT_OF_MEMORY = ("out of memory", "Free memory on device", "Available memory on node")
# vLLM has no LoRA for the architecture, or not for these modules of it (vllm 0.32).
ABOUT_THE_ADAPTER = (
    "does not support LoRA", "expected target modules", "is unsupported LoRA weight", "not supported for LoRA",
    "No supported LoRA modules", "max_lora_rank", "Adapter bias is not supported",
)  # fmt: skip
LONGEST = 300
# `(EngineCore pid=4711) ERROR 11-22 12:00:09 [core.py:708] `, each part of it optional.
PREFIX = re.compile(r"^(?:\(\S.*?pid=[^)]*\)\s*)?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[.*?\]\s*)?")
RAISED = re.compile(r"[\w.]*(?:Error|Exception|Exit|Interrupt)\b")


def is_short_of_memory(cause: str) -> bool:
    """Whether a cause speaks of too little memory."""
    return any(sign.lower() in cause.lower() for sign in SHORT_OF_MEMORY)


def is_about_the_adapter(cause: str) -> bool:
    """Whether a cause says that vLLM cannot serve the adapter."""
    return any(sign in cause for sign in ABOUT_THE_ADAPTER)


def diagnose_exit(log: Path, returncode: int | None = None) -> str:
    """Why vLLM died, from its exit status or its log, and what to do about it where that is known."""
    lines = _lines(log)
    if returncode is not None and returncode < 0:  # the log of a killed process holds older and lesser troubles
        guess = "; out of memory?" if -returncode == signal.SIGKILL else ""
        cause = f"it was killed by signal {-returncode} ({signal.strsignal(-returncode)}{guess})"
    else:
        cause = _telling(lines)
    advice = next((text for sign, text in ADVICE.items() if sign.lower() in cause.lower()), None)
    if advice:  # vLLM's own names flags that the user of this plugin does not have
        cause = " ".join(part for part in re.split(r"(?<=\.)\s+(?=[A-Z])", cause) if not re.search(r"--\w|VLLM_", part))
    if len(cause) > LONGEST:  # cut between words
        end = cause.rfind(" ", LONGEST - 50, LONGEST)
        cause = f"{cause[: end if end > 0 else LONGEST]} …"
    return f"{cause}; {f'{advice}; ' if advice else ''}its log is {log}"


def _lines(log: Path) -> list[str]:
    """The log's last lines without their prefixes and without what vLLM itself took for harmless."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = []
    for line in (line.strip() for line in text.splitlines()[-400:]):
        prefix = PREFIX.match(line)
        assert prefix is not None  # every part of it is optional
        harmless = prefix["level"] in ("WARNING", "INFO", "DEBUG") and RAISED.match(line[prefix.end() :])
        if line[prefix.end() :] and not harmless:
            lines.append(line[prefix.end() :])
    return lines


def _telling(lines: list[str]) -> str:
    """The line that names the error, else the last one."""
    raised = [place for place, line in enumerate(lines) if RAISED.match(line)]
    if not raised:
        return (lines or ["it printed nothing"])[-1]
    # An engine process reports its error first; the parent's "see root cause above" comes after it.
    place = ([place for place in raised if "root cause" not in lines[place].lower()] or raised)[-1]
    # pydantic gives the reason in the next line
    return " ".join(lines[place : place + 2]) if "validation error" in lines[place] else lines[place]
