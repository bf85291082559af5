"""The command that serves a base model: ``python -m d2ft_peft.dlora.cloud BASE``, or ``d2ft-cloud BASE``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading

from ...value_checks import check, is_positive
from ..wire.credentials import Certificates, read_tokens
from ..wire.protocol import Limits
from .base_model import BaseModel
from .server import Cloud


def main(argv: list[str] | None = None) -> None:
    """Serve until the process is told to end."""
    parser = argparse.ArgumentParser("d2ft-cloud", description="Serve the frozen blocks of a model to edges (DLoRA).")
    parser.add_argument("base", help="folder or Hub id of a model in safetensors")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=50051, help="0 takes a free one")
    parser.add_argument("--dtype", default="auto", help="of weights and computation: float32, bfloat16, ...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--revision", default=None)
    parser.add_argument("--certificate", help="PEM file; with --key, for TLS")
    parser.add_argument("--key", help="PEM file of the certificate's private key")
    parser.add_argument("--client-authority", help="PEM file: edges need a certificate that this one signed")
    parser.add_argument("--insecure", action="store_true", help="listen without TLS where others can reach it")
    parser.add_argument("--token-file", help="file with a token a line: edges need one of them")
    parser.add_argument("--memory-gib", type=float, default=None, help="most memory for micro-batches in flight")
    parser.add_argument("--compute-at-once", type=int, default=1, help="micro-batches that compute at a time")
    for name, default in Limits().as_json().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    certificates = None
    if args.certificate is not None or args.key is not None or args.client_authority is not None:
        certificates = Certificates(args.client_authority, args.certificate, args.key)
    hub = {} if args.revision is None else {"revision": args.revision}
    cloud = Cloud(
        BaseModel.load(args.base, args.dtype, args.device, **hub),
        Limits(**{name: getattr(args, name) for name in Limits().as_json()}),
        None if args.memory_gib is None else _bytes(args.memory_gib),
        args.compute_at_once,
        None if args.token_file is None else read_tokens(args.token_file),
    )
    port = cloud.start(args.port, args.host, certificates, args.insecure)
    print(f"serving {cloud.base.name} ({cloud.base.depth} blocks) on {args.host}:{port}", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        # In a thread of its own: a handler interrupts the main thread wherever it is, and must wait for nothing there.
        signal.signal(number, lambda *_: threading.Thread(target=cloud.stop).start())
    cloud.wait()


def _bytes(gib: float) -> int:
    check(is_positive(gib), "memory_gib", gib, "must be a finite number above zero; leave it out for no limit")
    return int(gib * 2**30)


def command() -> None:
    """`main` for a shell: what is wrong with the arguments is one line, not a traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"d2ft-cloud: error: {error}")


if __name__ == "__main__":
    command()
