"""A process that publishes and ends in one way or other: `python leaver.py NAME WAY COUNT`.

Prints the time at which it begins to end. Each event's
data say who published it (`process`, `thread`) and its place there (`n`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from event_bus import event_bridge

SOURCE = "leaver"
THREADS = 20


def emit(process: str, count: int, thread: int = 0) -> None:
    for n in range(count):
        data = {"action": "leave", "process": process, "thread": thread, "n": n}
        assert event_bridge.user_action(data, source=SOURCE)


def main() -> None:
    name, way, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    emit(name, count)
    if way == "fork":
        child = os.fork()
        emit(f"{name} {'child' if child == 0 else 'after'}", count)
        if child:
            os.waitpid(child, 0)
        else:
            return
    elif way == "threads":
        threads = [
            threading.Thread(target=emit, args=(f"{name} threads", count, i))
            for i in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if way == "flush and SIGKILL":
        event_bridge.flush(5.0)
    print(time.monotonic(), flush=True)
    if way == "exception":
        raise ValueError("on purpose")
    if way == "sys.exit":
        sys.exit(3)
    if way == "os._exit":
        os._exit(0)
    if way.endswith("SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
