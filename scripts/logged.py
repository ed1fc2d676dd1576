"""Run a command with all of its output in a log: a terminal shows its latest line, and a failure the end of the log.

python -m scripts.logged LOG COMMAND [ARGUMENT ...]
"""

import sys
from pathlib import Path

from spin_plugin.cli.screen import run_logged

if __name__ == "__main__":
    sys.exit(run_logged(Path(sys.argv[1]), sys.argv[2:]))
