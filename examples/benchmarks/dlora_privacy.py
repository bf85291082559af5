"""What a cloud of DLoRA can find out about texts that never leave the edge: attacks on recorded traffic.

    python examples/benchmarks/dlora_privacy.py --assets ASSETS
    python examples/benchmarks/dlora_privacy.py --png docs/images/dlora_privacy.png

The victim is an edge that connects to a cloud in this process; what the cloud gets is recorded. The attacker has the
public base model and public text of another kind: children's stories where the victim has Shakespeare (small Llama, 512
tokens), news where it has film reviews (MiniLM, 30,522 tokens). Measurements that the result file holds are not made
again.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dlora_attacks import (
    labels_by_candidates,
    labels_by_direction,
    linear_map,
    listening,
    nearest,
    noised,
    packed,
    two_groups,
    unigram,
)
from dlora_subjects import DEPTHS, SUBJECTS, Attacker, Stage, Subject, Texts, learn, send
from rows import command_line, pyplot, read_rows, save
from torch import Tensor

from d2ft_peft.dlora import BaseModel, Cloud
from d2ft_peft.report import format_table


RESULTS = Path(__file__).parent / "results" / "dlora"


def tokens(stage: Stage) -> None:
    """Tokens from the hidden states that enter the span: by depth, noise and packing."""
    subject, attacker, victim = stage.subject, stage.attacker, stage.subject.victim
    guess = unigram(subject.public.ids, subject.public.mask, victim.ids, victim.mask)
    stage.note(guess, what="tokens", attack="most frequent token")
    small = subject.name == "llama"  # there is time for more
    settings = [(depth, noise, "none") for noise in (0.0, 1.0) for depth in DEPTHS]
    if small:
        settings += [(depth, noise, "none") for noise in (0.3, 3.0) for depth in DEPTHS]
        settings += [(0, 0.1, "none"), (0, 0.0, "int8"), (2, 0.0, "int8")]
    for depth, noise, packing in settings:
        states = stage.crossing(victim, edge_blocks=(depth, 0), noise=noise, packing=packing)
        row = {"what": "tokens", "depth": depth, "noise": noise, "packing": packing}
        stage.note(partial(nearest, states, victim.ids, victim.mask, attacker.rows_at), **row, attack="nearest")

        def disturb(own: Tensor, noise: float = noise, packing: str = packing) -> Tensor:
            return packed(noised(own, noise) if noise else own, packing)

        def read(
            context: bool, kin: bool = False, depth: int = depth, states: Tensor = states, disturb: Any = disturb
        ) -> float:
            return attacker.read(states, victim, attacker.states(depth, kin), context, kin, disturb)

        if small and packing == "none" and noise in (0.0, 1.0):
            stage.note(partial(read, False), **row, attack="alone")
        if small or not noise:
            stage.note(partial(read, True), **row, attack="context")
        if small and depth == 2 and packing == "none" and noise in (0.0, 1.0):
            stage.note(partial(read, True, True), **row, attack="context, text like the victim's")


def after_training(stage: Stage) -> None:
    """Tokens from hidden states behind edge blocks whose adapters have learned something that the attacker lacks."""
    subject, attacker = stage.subject, stage.attacker
    for depth in (2, 3):
        states = stage.crossing(subject.victim, trained=100, edge_blocks=(depth, 0))
        read = partial(attacker.read, states, subject.victim, attacker.states(depth), True)
        row = {"what": "tokens", "depth": depth, "noise": 0.0, "packing": "none"}
        stage.note(read, **row, attack="context, adapters trained for 100 steps")


def epochs(stage: Stage) -> None:
    """Tokens behind noise that is drawn anew in every epoch: whoever sees ten of them takes the mean."""
    subject, attacker, victim, times = stage.subject, stage.attacker, stage.subject.victim, 10
    for depth in (0, 2):
        for noise in (1.0, 3.0):
            model = stage.edge(edge_blocks=(depth, 0), noise=noise)
            stage.heard.clear()
            for _ in range(times):
                send(model, subject, victim)
            model.disconnect()
            seen = torch.cat(stage.heard.tensors("forward", "hidden"))
            states = seen.view(times, *victim.ids.shape, -1).mean(0)
            left = partial(noised, noise=noise / times**0.5)
            read = partial(attacker.read, states, victim, attacker.states(depth), True, disturb=left)
            row = {"what": "tokens", "depth": depth, "noise": noise, "packing": "none"}
            stage.note(read, **row, attack=f"context, mean of {times} epochs")


def narrow(stage: Stage) -> None:
    """Tokens from what crosses at rank r alone, as somebody hears it who does not run the cloud."""
    subject, attacker = stage.subject, stage.attacker
    for rank in (8, 32):
        model = stage.edge(subject.adapter(rank, layers_to_transform=[0, 2]), crossing="core")
        sent = []
        for texts in (subject.public.first(1000), subject.victim):
            stage.heard.clear()
            send(model, subject, texts, train=True)
            sent.append(list(stage.heard.told))
        groups = model.remote_span.adapters.groups
        model.disconnect()
        for number, names in groups.items():
            if len(names) != 3:  # queries, keys and values are enough to see
                continue
            for count in (1, 3):
                own, states = (_exchanged(messages, number, count) for messages in sent)
                row = {"what": "narrow", "block": int(names[0].split(".")[2]), "rank": rank, "modules": count}
                read = partial(attacker.read, states, subject.victim, own, True)
                stage.note(read, **row, attack="context")


def _exchanged(messages: list, group: int, count: int) -> Tensor:
    of_group = [m for m in messages if m.kind == "exchange" and m.fields["group"] == group]
    return torch.cat([torch.cat(list(m.tensors.values())[:count], -1).detach() for m in of_group])


def next_tokens(stage: Stage) -> None:
    """A causal LM's labels from gradients of the span's output, whose graph the cloud has."""
    subject, attacker, victim = stage.subject, stage.attacker, stage.subject.victim
    head, norm = attacker.model.get_input_embeddings().weight.detach(), attacker.model.norm
    labels = Texts(victim.ids[:, 1:], victim.mask[:, 1:])
    with torch.no_grad():
        guessed = (attacker.model(victim.ids).last_hidden_state @ head.T).argmax(-1)[:, :-1]
    stage.note(_share(guessed, labels.ids), what="labels", attack="the public model's own guess")
    for above in (0, 1, 2):
        own = public = None
        if above:
            public = subject.public.first(1000)
            own = stage.gradients(public, edge_blocks=(2, above))
            own, public = _joined(*own), Texts(public.ids[:, 1:], public.mask[:, 1:])
        for steps, packing in ((0, "none"), (100, "none"), *([] if above else [(100, "int8")])):
            outs, gradients = stage.gradients(victim, trained=steps, edge_blocks=(2, above), packing=packing)
            row = {"what": "labels", "blocks above": above, "packing": packing, "trained": steps}
            stage.note(_share(labels_by_direction(gradients, head), labels.ids), **row, attack="direction")
            if above:
                read = partial(attacker.read, _joined(outs, gradients), labels, own, True, known=public)
                stage.note(read, **row, attack="inverter")
            else:
                few, texts = slice(0, 40), labels.ids[:40].flatten()
                found = labels_by_candidates(gradients[few].flatten(0, 1), outs[few].flatten(0, 1), norm, head)
                stage.note(_share(found, texts), **row, attack="candidates")
    stage.heard.clear()
    model = stage.edge(head="cloud")
    send(model, subject, victim, train=True)
    model.disconnect()
    sent = _share(torch.cat(stage.heard.tensors("forward", "labels")), victim.ids)
    stage.note(sent, what="labels", attack="read, head in the cloud")


def _joined(outs: Tensor, gradients: Tensor) -> Tensor:
    return torch.cat([x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20) for x in (outs, gradients)], -1)


def classes(stage: Stage) -> None:
    """A classifier's labels from gradients of the span's output; its head is new, and only the edge has it."""
    subject = stage.subject
    for above in (0, 1):
        for steps in (0, 50):
            gradients = stage.gradients(subject.victim, trained=steps, edge_blocks=(0, above))[1]
            found = two_groups(gradients.flatten(1) if above else gradients[:, 0])
            share = _share(found, subject.victim.labels.bool())
            row = {"what": "classes", "blocks above": above, "trained": steps, "attack": "two groups"}
            stage.note(max(share, 100 - share), **row)


def adapters(stage: Stage) -> None:
    """The adapter itself, from questions and answers of one batch: relative error of its matrix, in per cent."""
    subject = stage.subject
    for crossing in ("hidden", "core"):
        for packing in ("none", "bf16", "int8"):
            config = subject.adapter(8, layers_to_transform=[1])
            model = stage.edge(config, crossing=crossing, packing=packing)
            learn(model, subject, subject.kin, 30)
            stage.heard.clear()
            send(model, subject, subject.victim.first(20), train=True)
            asked = next(m for m in stage.heard.told if m.kind == "exchange")
            answered = next(m for m in stage.heard.got if m.kind == "answer")
            x, y = (next(iter(m.tensors.values())).flatten(0, -2) for m in (asked, answered))
            name = model.remote_span.adapters.groups[asked.fields["group"]][0]
            layer = model.get_base_model().get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
            true = (b.core if crossing == "core" else b.weight @ a).detach().double() * layer.scaling["default"]
            error = 100 * float((linear_map(x, y) - true).norm() / true.norm())
            model.disconnect()
            stage.note(error, what="adapter", crossing=crossing, packing=packing, tokens=len(x))


def _share(found: Tensor, wanted: Tensor) -> float:
    return 100 * float((found == wanted).float().mean())


PARTS = {
    "llama": [tokens, epochs, after_training, next_tokens, narrow, adapters],
    "minilm": [classes, tokens],
}


def tables(rows: list[dict]) -> str:
    """All measurements, one table for each kind."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for what in dict.fromkeys(row["what"] for row in rows if row["model"] == model):
            of_kind = [row for row in rows if (row["model"], row["what"]) == (model, what)]
            parts += [f"{model}, {what}:", format_table(list(_wide(of_kind)), formats=None)]
    return "\n\n".join(parts)


def _wide(rows: list[dict]) -> Iterator[dict]:
    """Attacks side by side."""
    settings = [{k: v for k, v in row.items() if k not in ("model", "what", "attack", "found")} for row in rows]
    for setting in [s for i, s in enumerate(settings) if s not in settings[:i]]:
        of_setting = [row for row, own in zip(rows, settings, strict=True) if own == setting]
        yield setting | {row.get("attack", "found"): f"{row['found']:.3g}" for row in of_setting}


def plot(rows: list[dict], path: str) -> None:
    """Tokens recovered, by depth and noise: by the best attack on one pass, and from the mean of several."""
    plt = pyplot()
    read = [row for row in rows if row["what"] == "tokens" and row.get("packing", "none") == "none"]
    measured = [
        row for row in read if "depth" in row and "like" not in row["attack"] and "trained" not in row["attack"]
    ]
    models = [name for name in SUBJECTS if any(row["model"] == name for row in measured)]
    figure, axes = plt.subplots(1, len(models), figsize=(2 + 4 * len(models), 4), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for number, noise in enumerate(sorted({row["noise"] for row in measured})):
            of_noise = [row for row in measured if (row["model"], row["noise"]) == (model, noise)]
            for style, repeated in (("o-", False), ("s--", True)):
                found: dict[int, float] = {}
                for row in of_noise:
                    if ("epochs" in row["attack"]) == repeated:
                        found[row["depth"]] = max(row["found"], found.get(row["depth"], 0))
                name = f"noise {noise:g}" + (", mean of ten epochs" if repeated else "") if noise else "no noise"
                if found:
                    axis.plot(*zip(*sorted(found.items()), strict=True), style, color=f"C{number}", label=name)
        for row in read:
            if row["model"] == model and row["attack"] == "most frequent token":
                axis.axhline(row["found"], color="0.6", linestyle=":", label="most frequent token")
        axis.set_xticks(DEPTHS)
        axis.set_ylim(0, 103)
        axis.set_xlabel("blocks on the edge before the cloud")
        axis.set_title({"llama": "small Llama, 512 tokens", "minilm": "MiniLM, 30,522 tokens"}[model], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens recovered by the best attack, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--assets", help="folder with models/ and data/; without it what is known is shown")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--parts", nargs="+", default=None, help="names of functions of this script")
    parser.add_argument("--results", default=str(RESULTS / "privacy.jsonl"))
    parser.add_argument("--png", help="picture of the tokens that are recovered")
    args = parser.parse_args(argv)
    if args.assets is None:
        print(tables(list(read_rows(args.results))))
        if args.png:
            plot(list(read_rows(args.results)), args.png)
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        attack(SUBJECTS[name](Path(args.assets)), args.parts, Path(args.results))


def attack(subject: Subject, parts: list[str] | None, results: Path) -> None:
    """Make all measurements of a model, or some."""
    with listening() as heard:
        cloud = Cloud(BaseModel.load(subject.base, torch.float32))
        stage = Stage(subject, Attacker(subject), f"localhost:{cloud.start()}", heard, results)
        try:
            for part in PARTS[subject.name]:
                if parts is None or part.__name__ in parts:
                    part(stage)
        finally:
            cloud.stop()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
