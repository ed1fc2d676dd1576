"""Supported versions of Axolotl (the full test suite runs on 0.19 and 0.21) and their differences; those of vLLM."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from spin_plugin.console import SpinError

SUPPORTED = SpecifierSet(">=0.19,<0.22")
VLLM = ">=0.20.2,<0.33"  # tested
FIRST_TO_DISCOVER_PLUGINS = Version("0.21")


def require_supported_axolotl() -> None:
    """Reject untested versions, whose hooks may behave differently.

    Raises:
        SpinError: the installed version is outside the supported range.
    """
    installed = version("axolotl")
    if not SUPPORTED.contains(installed, prereleases=True):
        raise SpinError(
            f"axolotl {installed} is not supported by this version of spin-plugin; "
            f"install a supported one: pip install 'axolotl{SUPPORTED}'"
        )


def discovers_plugins() -> bool:
    """Whether Axolotl discovers installed plugins automatically, so that a configuration need not list them."""
    return Version(version("axolotl")) >= FIRST_TO_DISCOVER_PLUGINS
