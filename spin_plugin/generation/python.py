"""Which Python has vLLM."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from spin_plugin.console import SpinError

CHECKOUT = Path(__file__).resolve().parents[2]
HOW_TO_GET_ONE = "make an environment for it with `axolotl spin setup` (in a checkout: `scripts/setup.sh`)"


def vllm_python(configured: str | None) -> Path:
    """The interpreter that runs vLLM.

    `generation.vllm_python`, else the variable SPIN_VLLM_PYTHON, else this interpreter if it has vLLM, else
    `.venv-vllm` beside the working directory or the plugin's checkout.

    Raises:
        SpinError: there is none, or the one that was named has no vLLM.
    """
    for name, path in (
        ("spin.generation.vllm_python", configured),
        ("SPIN_VLLM_PYTHON", os.environ.get("SPIN_VLLM_PYTHON")),
    ):
        if path:
            return _checked(name, Path(path).expanduser())
    if find_spec("vllm"):
        return Path(sys.executable)
    for directory in (Path.cwd(), CHECKOUT):
        candidate = directory / ".venv-vllm" / "bin" / "python"
        if candidate.exists():
            return _checked(str(candidate), candidate)
    raise SpinError(
        f"vLLM was not found: {HOW_TO_GET_ONE}, or name its interpreter in spin.generation.vllm_python or "
        "SPIN_VLLM_PYTHON"
    )


def _checked(name: str, python: Path) -> Path:
    """The interpreter that `name` points to, once it has shown that it has vLLM."""
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise SpinError(f"{name}: {python} is no interpreter; {HOW_TO_GET_ONE}")
    probe = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"]
    try:
        without = subprocess.run(probe, capture_output=True, check=False).returncode
    except OSError as error:
        raise SpinError(f"{name}: {python} cannot be run ({error.strerror}); {HOW_TO_GET_ONE}") from None
    if without:
        raise SpinError(f"{name}: {python} has no vLLM; {HOW_TO_GET_ONE}")
    return python
