"""A link of limited rate, with delay and loss, between two network namespaces, and processes at its ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


ADDRESSES = ("10.231.7.1", "10.231.7.2")
PORT = 50051
QUEUE_MS = 100
FREE = (100_000.0, 0.0, 0.0)
"""Mbit/s, ms and per cent of a link that costs nothing."""


def call(*command: str) -> None:
    subprocess.run(command, check=True)


class Network:
    """Two namespaces, whose link can be made anew."""

    def __init__(self, folder: str):
        self.names = [f"d2ft{os.getpid()}_{end}" for end in range(2)]
        self.program = str(Path(folder) / "link_emulator")
        self.link: subprocess.Popen | None = None
        call("cc", "-O2", "-o", self.program, str(Path(__file__).with_name("link_emulator.c")))
        for name in self.names:
            call("ip", "netns", "add", name)
            call("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")

    def set(self, rate: float, round_trip: float, loss: float, control: str) -> None:
        """Replace the link; connections across the former one break."""
        self.cut()
        words = [f"{value:g}" for value in (rate, round_trip / 2, loss, QUEUE_MS)]
        self.link = subprocess.Popen([self.program, *self.names, *words], stdout=subprocess.PIPE, text=True)
        assert self.link.stdout.readline() == "ready\n"
        for end, name in enumerate(self.names):
            inside = ("ip", "netns", "exec", name, "ip")
            call(*inside, "addr", "add", f"{ADDRESSES[end]}/24", "dev", f"link{end}")
            call(*inside, "link", "set", f"link{end}", "mtu", "1500", "txqueuelen", "10000", "up")
            network = ADDRESSES[end].rpartition(".")[0] + ".0/24"
            call(*inside, "route", "change", network, "dev", f"link{end}", "congctl", control)
            call(*inside, "tcp_metrics", "flush", "all")  # what TCP learned of the former link

    def start(self, end: int, *command: str, **streams: Any) -> subprocess.Popen:
        """A Python process at one end."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        inside = ["ip", "netns", "exec", self.names[end], sys.executable, *command]
        return subprocess.Popen(inside, env=environment, text=True, **streams)

    def cut(self) -> None:
        """Take the link away."""
        if self.link is not None:
            self.link.kill()
            self.link.wait()

    def close(self) -> None:
        self.cut()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


_SINK = """
import socket, time
server = socket.create_server(("{address}", {port}))
print("ready", flush=True)
connection, _ = server.accept()
begun, received = time.monotonic(), 0
while part := connection.recv(1 << 20):
    received += len(part)
    late = time.monotonic() - begun
print(8e-6 * received / late, flush=True)
"""
_SOURCE = """
import socket, time
connection = socket.create_connection(("{address}", {port}))
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    connection.sendall(bytes(1 << 16))
"""


def plain_tcp(network: Network, seconds: float) -> float:
    """Mbit/s of one socket that only sends, from its first byte on."""
    words = {"address": ADDRESSES[0], "port": PORT + 1, "seconds": seconds}
    sink = network.start(0, "-c", _SINK.format(**words), stdout=subprocess.PIPE)
    sink.stdout.readline()
    network.start(1, "-c", _SOURCE.format(**words)).wait()
    return float(sink.communicate()[0])
