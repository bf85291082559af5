"""Victims and attackers of DLoRA's privacy benchmark: public models, whose texts cross, and who reads along."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dlora_attacks import Inverter, Overheard, fit, recovered
from peft import LoraConfig
from rows import append_rows, read_rows
from tasks import _rows
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from d2ft_peft.dlora import connect


DEPTHS = (0, 1, 2, 3)
"""Numbers of blocks that the edge owns below the cloud's."""


@dataclass
class Texts:
    """Tokens [texts, tokens], and which of them are text and not padding or marks of the tokenizer."""

    ids: Tensor
    mask: Tensor
    labels: Tensor | None = None

    def first(self, count: int) -> Texts:
        """The first texts."""
        return Texts(self.ids[:count], self.mask[:count], None if self.labels is None else self.labels[:count])


@dataclass
class Subject:
    """A public model, a victim's texts and an attacker's.

    Attributes:
        name: Of the model.
        base: Its folder.
        model_class: What the victim loads it as.
        adapted: Projections with adapters.
        victim, public, kin: Texts of the victim; of the attacker; and such that are like the victim's.
        hidden: Width of the attacker's network.
        batch, steps: Its training.
    """

    name: str
    base: str
    model_class: Any
    adapted: list[str]
    victim: Texts
    public: Texts
    kin: Texts
    hidden: int
    batch: int
    steps: int

    def adapter(self, rank: int = 8, **options: Any) -> LoraConfig:
        """The victim's adapter."""
        more = {} if self.model_class is AutoModelForCausalLM else {"modules_to_save": ["classifier"]}
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self.adapted, **more, **options)


def llama(assets: Path, victim: int = 200, public: int = 3000) -> Subject:
    """Shakespeare through the small Llama."""
    base = assets / "models" / "stories260k-llama"
    tokenizer = AutoTokenizer.from_pretrained(base)

    def blocks(name: str) -> Tensor:
        lines = (assets / "data" / "text" / name).read_text().splitlines(keepends=True)
        ids = [token for line in lines for token in tokenizer(line, add_special_tokens=False)["input_ids"]]
        return torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)

    shakespeare, stories = blocks("tinyshakespeare.txt"), blocks("tinystories_1mb.txt")[:public]
    texts = [Texts(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in (shakespeare, stories)]
    own = texts[0]
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Subject(
        "llama", str(base), AutoModelForCausalLM, projections, Texts(own.ids[-victim:], own.mask[-victim:]), texts[1],
        own.first(min(public, len(own.ids) - victim)), 128, 16, 300,
    )  # fmt: skip


def minilm(assets: Path, victim: int = 256, public: int = 2000) -> Subject:
    """Film reviews (SST-2) through MiniLM."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "minilm-l6")
    base = tempfile.mkdtemp()  # with the classes' head in it: modules have other names in a bare BertModel
    whole = AutoModelForSequenceClassification.from_pretrained(assets / "models" / "minilm-l6", dtype=torch.float32)
    whole.save_pretrained(base)

    def encode(name: str, split: str, column: str, count: int) -> Texts:
        rows = _rows(assets, name, split, count)
        found = tokenizer(list(rows[column]), truncation=True, max_length=48, padding="max_length", return_tensors="pt")
        ids = found["input_ids"]
        marks = torch.tensor(tokenizer.all_special_ids)
        return Texts(ids, ~torch.isin(ids, marks), torch.tensor(rows["label"]))

    return Subject(
        "minilm", base, AutoModelForSequenceClassification, ["query", "value"],
        encode("sst2", "validation", "sentence", victim), encode("ag_news", "train", "text", public),
        encode("sst2", "train", "sentence", public), 256, 16, 200,
    )  # fmt: skip


class Attacker:
    """Has the public model and runs it on text of its own."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.model = AutoModel.from_pretrained(subject.base, dtype=torch.float32).eval()
        self._known: dict[bool, list[Tensor]] = {}
        self.rows = self.model.get_input_embeddings().weight.detach()

    @torch.no_grad()
    def states(self, depth: int, kin: bool = False) -> Tensor:
        """Hidden states of the attacker's text after some blocks, in half precision."""
        if kin not in self._known:
            ids = (self.subject.kin if kin else self.subject.public).ids
            found: list[list[Tensor]] = [[] for _ in range(max(DEPTHS) + 1)]
            for part in ids.split(50):
                mask = _attended(self.subject, part)
                states = self.model(part, attention_mask=mask, output_hidden_states=True).hidden_states
                for kept, of_depth in zip(found, states, strict=False):
                    kept.append(of_depth.half())
            self._known[kin] = [torch.cat(parts) for parts in found]
        return self._known[kin][depth]

    @torch.no_grad()
    def rows_at(self, position: int) -> Tensor:
        """What every token of the vocabulary enters the first block as."""
        if hasattr(self.model, "embeddings"):
            ids = torch.arange(len(self.rows)).view(-1, 1)
            return self.model.embeddings(input_ids=ids, position_ids=torch.tensor([[position]]))[:, 0]
        return self.model.get_input_embeddings().weight

    def read(
        self, states: Tensor, victim: Texts, own: Tensor, context: bool, kin: bool = False,
        disturb: Callable[[Tensor], Tensor] = lambda states: states, known: Texts | None = None,
    ) -> float:  # fmt: skip
        """Train an inverter on states of one's own text, and read the victim's; per cent of tokens.

        Args:
            states: What crossed of the victim's text [texts, tokens, width].
            victim: The victim's text.
            own: The same of the attacker's text.
            context: See `dlora_attacks.Inverter`.
            kin: Whether the attacker's text is the one that is like the victim's.
            disturb: See `dlora_attacks.fit`.
            known: The attacker's text, if it is another one.
        """
        subject = self.subject
        texts = known or (subject.kin if kin else subject.public)
        set_seed(0)
        inverter = Inverter(own.shape[-1], self.rows, context, subject.hidden)
        fit(inverter, own, texts.ids[: len(own)], texts.mask[: len(own)], subject.steps, subject.batch, disturb)
        return recovered(inverter, states, victim.ids, victim.mask)


def _attended(subject: Subject, ids: Tensor) -> Tensor:
    return torch.ones_like(ids) if subject.name == "llama" else (ids != 0).long()


def _inputs(subject: Subject, texts: Texts, start: int, size: int) -> dict[str, Tensor]:
    ids = texts.ids[start : start + size]
    labels = ids if texts.labels is None else texts.labels[start : start + size]
    return {"input_ids": ids, "attention_mask": _attended(subject, ids), "labels": labels}


def send(model: Any, subject: Subject, texts: Texts, train: bool = False, size: int = 20) -> None:
    """Run texts through an edge's model, with a backward pass where `train` says so."""
    model.train(train)
    with torch.set_grad_enabled(train):
        for start in range(0, len(texts.ids), size):
            inputs = _inputs(subject, texts, start, size)
            outputs = model(**inputs)
            if train:
                outputs.loss.backward()
    model.zero_grad()


def learn(model: Any, subject: Subject, texts: Texts, steps: int, rate: float = 5e-3) -> None:
    """Train the adapters of an edge's model."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        model(**_inputs(subject, texts, step * 8 % (len(texts.ids) - 8), 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Stage:
    """What all measurements share."""

    subject: Subject
    attacker: Attacker
    address: str
    heard: Overheard
    results: Path

    def edge(self, config: LoraConfig | None = None, **options: Any) -> Any:
        """An edge's model."""
        set_seed(1)
        subject = self.subject
        config = config or subject.adapter()
        options = {"model_class": subject.model_class, "dtype": torch.float32, **options}
        return connect(self.address, subject.base, config, **options)

    def crossing(self, texts: Texts, trained: int = 0, **options: Any) -> Tensor:
        """Hidden states [texts, tokens, width] as they enter the cloud, after some steps of training."""
        model = self.edge(**options)
        learn(model, self.subject, self.subject.kin, trained)
        self.heard.clear()
        send(model, self.subject, texts)
        model.disconnect()
        return torch.cat(self.heard.tensors("forward", "hidden"))

    def gradients(self, texts: Texts, trained: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
        """What leaves the span, and its gradients as they enter the cloud; of a causal LM without the last position,
        which has no label."""
        model = self.edge(**options)
        learn(model, self.subject, self.subject.kin, trained)
        self.heard.clear()
        send(model, self.subject, texts, train=True)
        model.disconnect()
        until = -1 if self.subject.model_class is AutoModelForCausalLM else None
        heard = self.heard.tensors("output", "out", told=True), self.heard.tensors("backward", "out")
        outs, gradients = (torch.cat(part)[:, :until] for part in heard)
        return outs, gradients

    def note(self, found: float | Callable[[], float], **row: Any) -> None:
        """Note what was found, or will be, unless it is known."""
        row = {"model": self.subject.name, **row}
        if any(all(known.get(k) == v for k, v in row.items()) for known in read_rows(self.results)):
            return
        row["found"] = found() if callable(found) else found
        append_rows(self.results, [row])
        print(row, flush=True)


SUBJECTS = {"llama": llama, "minilm": minilm}
