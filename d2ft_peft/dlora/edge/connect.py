"""`connect`: a PEFT model whose middle blocks run in the cloud."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ..wire.compression import PACKINGS
from ..wire.credentials import Certificates
from ..wire.fingerprint import fingerprint
from ..wire.messages import DTYPES
from ..wire.protocol import VERSION
from .across_link import check_adapter, check_head_in_cloud, modules_across
from .core_adapter import is_alike, make_core
from .edge_model import EdgeModel
from .head_in_cloud import HeadInCloud
from .hidden_cache import HiddenCache
from .link import CloudError, Link
from .local_adapters import KILLED, LocalAdapters
from .remote_span import RemoteSpan
from .sample_cache import SampleCache
from .skeleton import load_skeleton, of_files


def connect(
    address: str,
    base: str,
    config: LoraConfig,
    *,
    edge_blocks: tuple[int, int] = (0, 0),
    head: str = "edge",
    crossing: str = "hidden",
    killed: str = "cloud_copy",
    packing: str = "none",
    in_flight: int = 1,
    connections: int = 1,
    noise: float = 0.0,
    cache_dir: str | None = None,
    cache_bytes: int = 1 << 33,
    certificates: Certificates | None = None,
    token: str | None = None,
    patience: float = 600.0,
    model_class: Any = AutoModelForCausalLM,
    adapter_name: str = "default",
    **from_pretrained: Any,
) -> PeftModel:
    """A PEFT model that trains on the edge, with its frozen middle blocks in the cloud (DLoRA, arXiv 2404.05182).

        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
        model = connect("localhost:50051", "meta-llama/Llama-3.2-1B", config)
        Trainer(model=model, ...).train()
        model.save_pretrained("adapter")  # a plain LoRA adapter

    Data, tokenizer, embedding, adapters, their optimizer, and head and loss by default, stay on the edge. What the
    cloud can learn from hidden states all the same, docs/dlora.md says first.

    Args:
        address: The server's ``"host:port"``.
        base: Folder or Hub id of the base model, in safetensors; only what the edge owns is read into memory.
        config: The adapter; its modules within the cloud's blocks live on the edge and take part by exchange.
        edge_blocks: Numbers of the lowest and of the uppermost blocks that the edge owns.
        head: ``"edge"`` keeps head, loss and labels here; ``"cloud"`` saves the edge the work and sends the labels.
        crossing: ``"hidden"``, or ``"core"``: frozen factors in the cloud, r x r numbers trained here, r instead of the
            width crosses for each token and module.
        killed: What becomes of a module of the span that is frozen after it has learned something: ``"cloud_copy"``
            hands a frozen copy to the cloud (exact), ``"drop"`` sets it back to nothing (changes
            the model), ``"exchange"`` goes on asking it (exact, and saves only the edge's backward pass).
        packing: How hidden states and gradients cross: ``"none"``, ``"bf16"``, or ``"int8"`` with a scale per token.
        in_flight: Parts of a batch that are on their way at the same time, so that links and cloud are kept busy.
        connections: TCP connections that these parts are spread over. Where TCP takes every lost packet for a busy link
            (cubic), several are faster on a link that loses some; else one is, which knows the link's rate.
        noise: Standard deviation of the noise on hidden states that leave, relative to each token's root mean square.
        cache_dir: Folder for hidden states that are the same in every epoch; they then cross once.
        cache_bytes: Most bytes in it.
        certificates: For TLS.
        token: What the server knows this edge by.
        patience: Seconds after which a cloud that gives no answer is given up.
        model_class: Class of the model, or Auto class.
        adapter_name: Name of the adapter.
        from_pretrained: See `transformers.PreTrainedModel.from_pretrained`: ``dtype``, ``revision``, ... The Hub's own
            token and cache are those of the environment (``HF_TOKEN``, ``HF_HOME``).

    Returns:
        A `PeftModel`; ``model.remote_span`` says what crossed, ``model.disconnect()`` ends the session.

    Raises:
        ValueError: If an argument, or the adapter's configuration, cannot be.
        CloudError: If the cloud refuses, holds another base model, or cannot be reached.
    """
    _check(head, crossing, killed, packing, in_flight, connections, noise, cache_dir)
    check_adapter(config, in_flight, crossing)
    hub = of_files(from_pretrained)
    base_config = AutoConfig.from_pretrained(base, **hub)
    prints = fingerprint(base, base_config, **hub)
    model, stack, span = load_skeleton(base, edge_blocks, model_class, head == "cloud", **from_pretrained)
    peft_model = get_peft_model(model, config, adapter_name)
    if head == "cloud":
        check_head_in_cloud(peft_model, stack)
    targets = modules_across(peft_model, stack, span)
    wish = {
        "protocol": VERSION, "base": {**prints, "dtype": _dtype_name(model.dtype)}, "edge_blocks": list(edge_blocks),
        "targets": targets, "rank": config.r if crossing == "core" else None, "with_head": head == "cloud",
        "packing": packing,
    }  # fmt: skip
    link = Link(address, wish, packing, certificates, token, patience, connections)
    told = link.open()
    if crossing == "core":
        _make_cores(peft_model, link, adapter_name)
    adapters = LocalAdapters(model, targets, told["groups"], killed)
    cache = None
    if cache_dir is not None:
        belongs_to = f"{prints['config']} {prints['weights']} {list(span)} {packing}"
        cache = SampleCache(HiddenCache(os.fspath(cache_dir), cache_bytes, belongs_to))
    remote = RemoteSpan(link, adapters, span, told["returns_tuple"] is True, in_flight, noise, cache)
    remote.attach(model, stack)
    if head == "cloud":
        HeadInCloud(model, remote).install()
    return EdgeModel.adopt(peft_model, remote, stack)


def _check(
    head: str, crossing: str, killed: str, packing: str, in_flight: int, connections: int, noise: float, cache_dir: Any
) -> None:
    for name, value, choices in (
        ("head", head, ("edge", "cloud")), ("crossing", crossing, ("hidden", "core")), ("killed", killed, KILLED),
        ("packing", packing, PACKINGS),
    ):  # fmt: skip
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")
    if type(in_flight) is not int or not 1 <= in_flight <= 32:
        raise ValueError(f"in_flight={in_flight!r} must be a whole number from 1 to 32.")
    if type(connections) is not int or not 1 <= connections <= in_flight:
        raise ValueError(
            f"connections={connections!r} must be a whole number from 1 to in_flight={in_flight}: a part needs but one."
        )
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise!r} must be a finite number, at least 0; 0 adds none.")
    if noise and cache_dir is not None:
        raise ValueError(f"noise={noise} makes hidden states of every epoch others; leave cache_dir out.")


def _make_cores(model: PeftModel, link: Link, adapter_name: str) -> None:
    """Frozen factors for every adapter, all of which have to cross; compared whenever a session is opened anew."""
    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    inside = set(link.wish["targets"])
    outside = sorted(layers.keys() - inside)
    if outside:
        raise ValueError(
            f"crossing='core' and edge_blocks={link.wish['edge_blocks']}: {outside[0]} does not cross, and has no "
            "use for a core; restrict the adapter to the cloud's blocks with layers_to_transform."
        )
    for message in link.factors(sorted(inside)):
        layer = layers[message.fields["name"]]
        a, b = message.tensors["a"], message.tensors["b"]
        expected = (layer.r[adapter_name], layer.in_features), (layer.out_features, layer.r[adapter_name])
        if (tuple(a.shape), tuple(b.shape)) != expected:
            raise ValueError(f"the cloud sent factors of shapes {list(a.shape)} and {list(b.shape)}, not {expected}.")
        make_core(layer, adapter_name, a.clone(), b.clone())

    def compare() -> None:
        for message in link.fetch_factors(sorted(inside)):
            layer = layers[message.fields["name"]]
            ours = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].factor
            if not all(map(is_alike, (message.tensors["a"], message.tensors["b"]), ours)):
                raise CloudError(
                    f"{link.address} has other factors of {message.fields['name']} than before it was away."
                )

    link.opened = compare


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)
