"""This machine: packages, vLLM's interpreter, GPUs or memory."""

import json
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from platform import python_version
from typing import Any

import psutil
from packaging.specifiers import SpecifierSet
from rich.filesize import decimal

from spin_plugin import __version__
from spin_plugin.console import SpinError, say, warn
from spin_plugin.generation.python import INSTALL, vllm_python
from spin_plugin.versions import VLLM, require_supported_axolotl

PACKAGES = ("axolotl", "torch", "transformers", "accelerate", "peft", "datasets")
VLLM_TIMEOUT = 50  # seconds; its import takes 5 to 30
PROBE = """
import json, vllm
from vllm.platforms import current_platform
print(json.dumps({"version": vllm.__version__, "cpu": current_platform.is_cpu()}))
"""


@dataclass(frozen=True)
class Device:
    """What a training process computes on."""

    name: str
    memory: int
    """In bytes; without a GPU, the machine's."""
    gpu: bool


def devices() -> list[Device]:
    """Return the visible GPUs; without one, the machine itself."""
    import torch

    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if not found:
        return [Device("CPU", psutil.virtual_memory().total, gpu=False)]
    return [Device(one.name, one.total_memory, gpu=True) for one in found]


def check_packages() -> None:
    """The installed versions."""
    require_supported_axolotl()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    say(f"spin-plugin {__version__}, Python {python_version()}, {versions}")


def check_devices() -> None:
    """The GPUs: their memory and whether something occupies it."""
    import torch

    for number, device in enumerate(devices()):
        if not device.gpu:
            free = psutil.virtual_memory().available
            say(f"no GPU: {os.cpu_count()} cores, {decimal(device.memory)} of memory, {decimal(free)} free")
            return
        major, minor = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        say(f"GPU {number}: {device.name}, sm_{major}{minor}, {decimal(total)}, {decimal(free)} free")
        if major < 8:
            warn(f"GPU {number}: sm_{major}{minor} is older than any GPU that our attention was compiled for")
        if free < 0.9 * total:
            warn(f"GPU {number}: {decimal(total - free)} are in use, by other processes too; vLLM takes 85% of it")


class VllmProbe:
    """Imports vLLM in its interpreter while other checks run."""

    def __init__(self, configured: str | None) -> None:
        """
        Args:
            configured: `generation.vllm_python`.

        Raises:
            SpinError: see `vllm_python`.
        """
        self.python = vllm_python(configured)
        # this interpreter's packages are not for vLLM's
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [str(self.python), "-c", PROBE],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def check(self) -> None:
        """Whether vLLM can be imported, in a supported version, built for this machine."""
        try:
            output, errors = self.process.communicate(timeout=VLLM_TIMEOUT)
        except subprocess.TimeoutExpired:
            warn(f"{self.python}: `import vllm` takes more than {VLLM_TIMEOUT} s; not checked any further")
            return
        finally:
            self.close()
        if self.process.returncode:
            reason = (errors.strip().splitlines() or ["no message"])[-1]
            raise SpinError(f"{self.python}: `import vllm` fails: {reason[:200]}; {INSTALL}")
        found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        gpu = devices()[0].gpu
        if found["cpu"] and gpu:
            warn(f"{self.python}: vLLM's CPU build generates on the CPU although there is a GPU; {INSTALL}")
        if not found["cpu"] and not gpu:
            raise SpinError(f"{self.python}: vLLM is built for a GPU, but none is visible; {INSTALL}")
        if not SpecifierSet(VLLM).contains(found["version"], prereleases=True):
            warn(f"{self.python}: vLLM {found['version']} is untested; tested: {VLLM}")
        say(f"vLLM {found['version']}, {'CPU' if found['cpu'] else 'GPU'} build, {self.python}")

    def close(self) -> None:
        """End the interpreter if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
