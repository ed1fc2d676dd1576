"""Signal that the parent process is alive, and report its exit. Uses only the standard library.

    python heartbeat.py ALIVE GONE PID        # PID must be the parent

Touches the file ALIVE every few seconds. When the parent exits, renames ALIVE to GONE and exits. A parent that leaves
normally kills this process first. It is a separate process because a killed parent cannot report its own death.
"""

import os
import sys
import time
from contextlib import suppress

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 5.0


def main(alive: str, gone: str, pid: int) -> None:
    last_beat = time.monotonic()
    while os.getppid() == pid:
        time.sleep(POLL_SECONDS)
        if time.monotonic() - last_beat > HEARTBEAT_SECONDS:
            last_beat = time.monotonic()
            with suppress(OSError):  # a network file system can be temporarily unavailable
                os.utime(alive)
    with suppress(FileNotFoundError):  # another start has cleared the directory
        os.rename(alive, gone)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
