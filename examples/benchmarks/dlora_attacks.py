"""What somebody who runs a cloud of DLoRA, or listens to one, could do: record its traffic, and read texts from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ft_peft.dlora.cloud import server
from d2ft_peft.dlora.cloud.micro_batch_run import MicroBatchRun
from d2ft_peft.dlora.wire.compression import pack, unpack
from d2ft_peft.dlora.wire.messages import Message


@dataclass
class Overheard:
    """What a cloud got and what it answered, in order."""

    got: list[Message] = field(default_factory=list)
    told: list[Message] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything."""
        self.got.clear()
        self.told.clear()

    def tensors(self, kind: str, name: str, told: bool = False) -> list[Tensor]:
        """Tensors of one name in all messages of one kind."""
        found = [message.tensors.get(name) for message in (self.told if told else self.got) if message.kind == kind]
        return [tensor.detach().clone() for tensor in found if tensor is not None]


@contextmanager
def listening() -> Iterator[Overheard]:
    """Keep what crosses between edges and all clouds of this process."""
    heard = Overheard()

    class Listener(MicroBatchRun):
        def __init__(self, base, session, span, turns, room, receive, send):
            def get() -> Message | None:
                message = receive()
                if message is not None:
                    heard.got.append(message)
                return message

            def tell(message: Message) -> None:
                heard.told.append(message)
                send(message)

            super().__init__(base, session, span, turns, room, get, tell)

    with mock.patch.object(server, "MicroBatchRun", Listener):
        yield heard


def packed(states: Tensor, packing: str) -> Tensor:
    """States [..., width] as they come out on the other side."""
    data = b"".join(pack(states, packing))
    return unpack(memoryview(bytearray(data)), tuple(states.shape), states.dtype, packing)


def noised(states: Tensor, noise: float) -> Tensor:
    """States with noise as the edge adds it."""
    return states + noise * states.square().mean(-1, keepdim=True).sqrt() * torch.randn_like(states)


class Inverter(nn.Module):
    """From hidden states [batch, tokens, width] to tokens.

    Args:
        width: Of what is read.
        embedding: Rows of the public model's embedding [vocabulary, features]; a token's logit is a product with its
            row, so that tokens which the attacker's text lacks can be found as well.
        context: Whether positions see their neighbours, by two layers of a transformer, or each is read alone.
        hidden: Width of its layers.
    """

    def __init__(self, width: int, embedding: Tensor, context: bool, hidden: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.skip = nn.Linear(width, embedding.shape[1])
        self.context, self.positions = None, None
        if context:
            layer = nn.TransformerEncoderLayer(
                hidden, 4, 2 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.context = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.positions = nn.Parameter(0.02 * torch.randn(512, hidden))
        self.out = nn.Linear(hidden, embedding.shape[1])
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.zeros(len(embedding)))
        self.register_buffer("rows", F.normalize(embedding.float() - embedding.float().mean(0), dim=-1))

    def features(self, states: Tensor, mask: Tensor) -> Tensor:
        """What is compared with the rows [batch, tokens, features]."""
        states = states / states.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        inner = self.inner(states)
        if self.context is not None:
            inner = inner + self.positions[: inner.shape[1]]
            inner = self.context(inner, src_key_padding_mask=~mask)
        return F.normalize(self.out(inner) + self.skip(states), dim=-1)

    def logits(self, features: Tensor, among: Tensor | slice = slice(None)) -> Tensor:
        """Logits [..., number of tokens in `among`]."""
        return self.scale * features @ self.rows[among].T + self.bias[among]


def fit(
    inverter: Inverter,
    states: Tensor,
    tokens: Tensor,
    mask: Tensor,
    steps: int,
    batch: int,
    disturb: Callable[[Tensor], Tensor],
    rate: float = 2e-3,
    negatives: int = 2048,
) -> None:
    """Train an inverter on text of one's own.

    Args:
        inverter: The inverter.
        states, tokens, mask: Hidden states [texts, tokens, width] of known text [texts, tokens], and which are real.
        steps, batch, rate: Of AdamW, with a linear decay.
        disturb: What packing and noise make of a batch of states; drawn anew in each step.
        negatives: Tokens among which the right one is to be found, where the vocabulary is larger.
    """
    optimizer = torch.optim.AdamW(inverter.parameters(), lr=rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    vocabulary = len(inverter.rows)
    for _ in range(steps):
        chosen = torch.randint(len(states), (batch,))
        real = mask[chosen]
        wanted = tokens[chosen][real]
        features = inverter.features(disturb(states[chosen].float()), real)[real]
        if vocabulary <= 2 * negatives:
            loss = F.cross_entropy(inverter.logits(features), wanted)
        else:
            among = torch.cat([wanted, torch.randint(vocabulary, (negatives,))]).unique()
            loss = F.cross_entropy(inverter.logits(features, among), torch.searchsorted(among, wanted))
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()


@torch.no_grad()
def recovered(inverter: Inverter, states: Tensor, tokens: Tensor, mask: Tensor) -> float:
    """Share of a text's tokens that an inverter finds, in per cent."""
    right = total = 0
    for part, wanted, real in zip(states.split(32), tokens.split(32), mask.split(32), strict=True):
        found = inverter.logits(inverter.features(part, real)[real]).argmax(-1)
        right, total = right + int((found == wanted[real]).sum()), total + int(real.sum())
    return 100 * right / total


@torch.no_grad()
def nearest(states: Tensor, tokens: Tensor, mask: Tensor, rows_at: Callable[[int], Tensor]) -> float:
    """Share of tokens that are found by the row with the smallest angle, in per cent.

    Args:
        states, tokens, mask: See `recovered`.
        rows_at: The public model's embedding of every token at a position [vocabulary, width].
    """
    right = 0
    for position in range(states.shape[1]):
        real = mask[:, position]
        if real.any():
            found = F.normalize(states[real, position], dim=-1) @ F.normalize(rows_at(position), dim=-1).T
            right += int((found.argmax(-1) == tokens[real, position]).sum())
    return 100 * right / int(mask.sum())


def unigram(public: Tensor, public_mask: Tensor, tokens: Tensor, mask: Tensor) -> float:
    """Share of tokens that is the most frequent one of other text, in per cent."""
    guess = public[public_mask].mode().values
    return float(100 * (tokens[mask] == guess).float().mean())


@torch.no_grad()
def labels_by_direction(gradients: Tensor, head: Tensor) -> Tensor:
    """Tokens [...] whose rows of the head [vocabulary, width] gradients [..., width] point away from most.

    The gradient of a token's loss is (p - onehot) W, seen through the final norm.
    """
    return (F.normalize(gradients, dim=-1) @ head.T).argmin(-1)


def labels_by_candidates(gradients: Tensor, outs: Tensor, norm: nn.Module, head: Tensor) -> Tensor:
    """Tokens [n] whose loss would have a gradient in the same direction as what was seen.

    Args:
        gradients: Gradients of the span's outputs [n, width].
        outs: These outputs [n, width], which the cloud has computed itself.
        norm: The public final norm.
        head: The public head's rows [vocabulary, width].
    """
    found = []
    for gradient, out in zip(gradients.split(64), outs.split(64), strict=True):
        jacobian = torch.func.vmap(torch.func.jacrev(norm))(out).detach()
        with torch.no_grad():
            p = (norm(out) @ head.T).softmax(-1)
            candidates = ((p @ head)[:, None] - head[None]) @ jacobian
            cosine = (F.normalize(candidates, dim=-1) @ F.normalize(gradient, dim=-1)[:, :, None]).squeeze(-1)
            found.append(cosine.argmax(-1))
    return torch.cat(found)


def two_groups(gradients: Tensor) -> Tensor:
    """Which of two classes each sample belongs to, by the sign of its gradient [n, width] along their main direction;
    which class is which, it does not say."""
    main = torch.linalg.svd(gradients, full_matrices=False).Vh[0]
    return gradients @ main > 0


def linear_map(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The matrix [out, in] that makes outputs [n, out] of inputs [n, in]: of an adapter, all that there is to know."""
    return torch.linalg.lstsq(inputs.double(), outputs.double()).solution.T
