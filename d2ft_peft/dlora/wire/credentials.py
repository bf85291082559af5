"""Who may talk to whom: TLS, client certificates, and a token for every edge."""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass

import grpc


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files.

    Attributes:
        authority: Certificate of whoever signed the other side's certificate.
        certificate: The own certificate; a server needs one, an edge where the server asks for one.
        key: The own certificate's private key.
    """

    authority: str | None = None
    certificate: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError(f"certificate={self.certificate!r} and key={self.key!r} belong together; give both.")

    def of_server(self) -> grpc.ServerCredentials:
        """TLS of a server; with `authority` it asks every edge for a certificate (mutual TLS).

        Raises:
            ValueError: If there is no certificate.
        """
        if self.certificate is None:
            raise ValueError("certificate=None: a server with TLS needs a certificate and its key.")
        pair = (_read(self.key), _read(self.certificate))
        authority = None if self.authority is None else _read(self.authority)
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)

    def of_edge(self) -> grpc.ChannelCredentials:
        """TLS of an edge; without `authority` it trusts whom the operating system trusts."""
        return grpc.ssl_channel_credentials(
            None if self.authority is None else _read(self.authority),
            None if self.key is None else _read(self.key),
            None if self.certificate is None else _read(self.certificate),
        )


def check_binding(host: str, secured: bool, insecure: bool) -> None:
    """Refuse to listen where others could read along.

    Raises:
        ValueError: If `host` is anything but loopback without TLS, and that was not asked for.
    """
    if not secured and not insecure and not is_loopback(host):
        raise ValueError(
            f"host={host!r} is not loopback, and without TLS everyone on the way can read and change what crosses; "
            "give a certificate and its key, or ask for it by name (insecure=True, --insecure)."
        )


def is_loopback(host: str) -> bool:
    """Whether an address never leaves the machine."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_admitted(authorization: str | None, tokens: frozenset[str] | None) -> bool:
    """Whether a call's ``authorization`` names one of the tokens; everybody is admitted where there are none."""
    if tokens is None:
        return True
    given = (authorization or "").removeprefix("Bearer ").encode()
    # All of them are compared, and each in constant time: how long it takes tells nothing of them.
    return sum(hmac.compare_digest(given, token.encode()) for token in tokens) > 0


def read_tokens(path: str) -> frozenset[str]:
    """The tokens in a file, one a line.

    Raises:
        ValueError: If there is none, or a short one.
    """
    tokens = frozenset(_read(path).decode().split())
    if not tokens or min(map(len, tokens)) < 16:
        raise ValueError(f"{path!r} must hold a token of at least 16 characters a line.")
    return tokens


def _read(path: str) -> bytes:
    if not os.path.isfile(path):
        raise ValueError(f"{path!r} is no file; give the path of a PEM file (or of a file with tokens).")
    with open(path, "rb") as file:
        return file.read()
