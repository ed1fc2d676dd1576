"""Find the Python interpreter that runs vLLM."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from spin_plugin.console import SpinError

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALL = "create an environment for it with `axolotl spin setup` (in a checkout: `scripts/setup.sh`)"


def vllm_python(configured: str | None) -> Path:
    """Return the interpreter that runs vLLM.

    The first of: `generation.vllm_python`, the variable SPIN_VLLM_PYTHON, this interpreter if it has vLLM, `.venv-vllm`
    in the working directory, `.venv-vllm` in the plugin's checkout.

    Raises:
        SpinError: no interpreter was found, or the chosen one has no vLLM.
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
        f"vLLM was not found; {INSTALL}, or set spin.generation.vllm_python or SPIN_VLLM_PYTHON to an interpreter that "
        "has it"
    )


def _checked(name: str, python: Path) -> Path:
    """Return the interpreter that `name` points to, after checking that it has vLLM."""
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise SpinError(f"{name}: {python} is not an executable file; {INSTALL}")
    probe = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"]
    try:
        missing = subprocess.run(probe, capture_output=True, check=False).returncode
    except OSError as error:
        raise SpinError(f"{name}: {python} cannot be run ({error.strerror}); {INSTALL}") from None
    if missing:
        raise SpinError(f"{name}: {python} has no vLLM; {INSTALL}")
    return python
