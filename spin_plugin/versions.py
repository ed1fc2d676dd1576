"""Which versions of Axolotl are supported (0.19 and 0.21 run all tests), and where they differ."""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from spin_plugin.console import SpinError

SUPPORTED = SpecifierSet(">=0.19,<0.22")
FIRST_TO_DISCOVER_PLUGINS = Version("0.21")


def require_supported_axolotl() -> None:
    """Refuse a version that nobody has tried, whose hooks may mean something else.

    Raises:
        SpinError: names the version and the range.
    """
    installed = version("axolotl")
    if not SUPPORTED.contains(installed, prereleases=True):
        raise SpinError(
            f"axolotl {installed} is not supported by this version of spin-plugin; "
            f"install one in the range: pip install 'axolotl{SUPPORTED}'"
        )


def discovers_plugins() -> bool:
    """Whether Axolotl finds installed plugins by itself, so that a configuration need not name them."""
    return Version(version("axolotl")) >= FIRST_TO_DISCOVER_PLUGINS
