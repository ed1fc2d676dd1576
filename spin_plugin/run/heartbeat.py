"""Say of a process that it lives and, once it has ended, that it is gone. Needs nothing but the standard library.

    python heartbeat.py ALIVE GONE PID        # PID has to be the parent

The file ALIVE is touched every few seconds. When the parent is gone, ALIVE becomes GONE, and this process ends. A
parent that leaves in peace ends it first. It is a process of its own, for who was killed can say nothing.
"""

import os
import sys
import time
from contextlib import suppress

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_HEARTBEATS = 5.0


def main(alive: str, gone: str, pid: int) -> None:
    last_beat = time.monotonic()
    while os.getppid() == pid:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if time.monotonic() - last_beat > SECONDS_BETWEEN_HEARTBEATS:
            last_beat = time.monotonic()
            with suppress(OSError):  # the file system may be away for a while
                os.utime(alive)
    with suppress(FileNotFoundError):  # another start has cleared the directory
        os.rename(alive, gone)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
