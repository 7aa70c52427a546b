"""On import: cuts this process off from everything but loopback, and hides the modules named in HIDDEN_MODULES."""

import os
import socket
import sys
from importlib.machinery import PathFinder

LOCAL = {"", "localhost", "::", "::1", "0.0.0.0", socket.gethostname()}


def block_network(event, args):
    """An audit hook: connections and name look-ups beyond loopback fail as on a machine without network."""
    if event in ("socket.connect", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else ""  # a string is a Unix socket
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0] or ""
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL and not host.startswith("127."):
        raise ConnectionError(f"tests run without network, and something asked for {host}")


class HidingFinder(PathFinder):
    """Python's own finder, to which the hidden modules are not installed."""

    names = os.environ.get("HIDDEN_MODULES", "").split()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in cls.names else super().find_spec(fullname, path, target)


sys.addaudithook(block_network)
sys.meta_path[:] = [HidingFinder if finder is PathFinder else finder for finder in sys.meta_path]
