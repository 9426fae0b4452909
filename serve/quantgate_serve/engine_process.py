"""The engine's process: `python -m quantgate_serve.engine_process FD PARENT`.

Started by engine_child.py, nobody else. It ends with the front: by Stop, by the end of the socket,
and by SIGKILL from the kernel when the process PARENT ends before it. What it does is in
engine_host.py.
"""

import ctypes
import logging
import os
import signal
import socket
import sys

from quantgate_serve.channel import Channel, ChannelClosedError
from quantgate_serve.imports import UNUSED_BY_MODELS, uncollected, without

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Serve the socket with this file descriptor until its other end says stop or is gone."""
    descriptor, parent = int(argv[0]), int(argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    _die_with(parent)
    # These reach the whole foreground group. The front drains, or reloads, and tells this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # torch and transformers come with it.
    with without(*UNUSED_BY_MODELS), uncollected():
        from quantgate_serve.engine_host import host
    try:
        host(Channel(socket.socket(fileno=descriptor)))
    except ChannelClosedError:
        _log.info("the front has ended, and so does its engine")
    return 0


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the front's does, however that ends."""
    if sys.platform != "linux":
        return  # the end of the socket is noticed between two steps
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
