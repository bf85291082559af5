"""DLoRA (arXiv 2404.05182): fine-tuning on an edge device of a model that a cloud runs, with few adapter modules alive
at a time. `KillRevive`, which chooses those modules, works without a cloud as well, for any PEFT method.

What talks over a network needs grpc, an extra of the package (``pip install "d2ft_peft[dlora]"``), and is loaded when
it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .kill_revive import KillRevive, KillReviveCallback, KillReviveRule


if TYPE_CHECKING:
    from .cloud.base_model import BaseModel
    from .cloud.server import Cloud
    from .edge.connect import connect
    from .edge.link import CloudError
    from .edge.progress import CloudProgressCallback
    from .wire.credentials import Certificates
    from .wire.protocol import Limits


__all__ = [
    "BaseModel",
    "Certificates",
    "Cloud",
    "CloudError",
    "CloudProgressCallback",
    "KillRevive",
    "KillReviveCallback",
    "KillReviveRule",
    "Limits",
    "connect",
]

_OVER_A_NETWORK = {
    "BaseModel": "cloud.base_model",
    "Certificates": "wire.credentials",
    "Cloud": "cloud.server",
    "CloudError": "edge.link",
    "CloudProgressCallback": "edge.progress",
    "Limits": "wire.protocol",
    "connect": "edge.connect",
}


def __getattr__(name: str) -> Any:
    """What talks over a network, when it is asked for.

    Raises:
        ImportError: If grpc is not installed; says how to install it.
    """
    if name not in _OVER_A_NETWORK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_OVER_A_NETWORK[name]}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "grpc":
            raise
        raise ImportError(
            f"{__name__}.{name} talks over grpc, which is not installed; "
            'install it with pip install "d2ft_peft[dlora]".',
            name="grpc",
        ) from error
    return getattr(module, name)
