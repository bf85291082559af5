"""Hidden states on the edge's disk that are the same in every epoch: they cross once.

Below the lowest module that was ever alive the cloud's blocks are frozen, so what arrives there depends on the sample
alone. A file a sample and place; only its real tokens are in it.
"""

from __future__ import annotations

import os
import warnings
import zlib

from safetensors.torch import save_file
from torch import Tensor

from ...hidden_states import bytes_of, content_key, with_padding
from ...whole_files import reading, replacing


_ENDING = ".safetensors"


class HiddenCache:
    """Hidden states by sample, in a folder.

    What is in it is never thrown out for something newer: epochs ask for the samples in turn, so that a full cache that
    made room would always have thrown out what is asked for next.

    Args:
        directory: The folder; it may hold what a former run left.
        max_bytes: Most bytes in it.
        belongs_to: What the hidden states depend on besides the sample: base model and blocks.
    """

    def __init__(self, directory: str, max_bytes: int, belongs_to: str):
        if max_bytes < 1:
            raise ValueError(f"cache_bytes={max_bytes!r} must be at least 1; leave the cache out for none.")
        self.directory, self.max_bytes, self._belongs_to = directory, max_bytes, belongs_to
        os.makedirs(directory, exist_ok=True)
        self._sizes = {
            entry.name.removesuffix(_ENDING): entry.stat().st_size
            for entry in os.scandir(directory)
            if entry.name.endswith(_ENDING)
        }
        self.hits = self.misses = 0
        self._told = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is in it."""
        return sum(self._sizes.values())

    def key(self, hidden: Tensor, real: Tensor, positions: Tensor | None, place: str) -> str:
        """Name of a sample's entry.

        Args:
            hidden: Hidden states before the span [tokens, width].
            real: Which of its tokens are no padding, bool [tokens].
            positions: Their positions [tokens], where the model was given them.
            place: Where in the span the hidden states are from.
        """
        return content_key(f"{self._belongs_to} {place}", hidden, real, positions).hex()

    def get(self, key: str, real: Tensor) -> Tensor | None:
        """Hidden states [tokens, ...] of a sample, zeros at its padding; None if they are not there, or damaged."""
        found = self._read(key) if key in self._sizes else None
        if found is not None and found.shape[0] != int(real.sum()):
            found = self._drop(key, "has another length")
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        return with_padding(found, real)

    def put(self, key: str, values: Tensor, real: Tensor) -> None:
        """Keep the hidden states [tokens, ...] of a sample, if there is room."""
        if key in self._sizes:
            return
        kept = values[real].detach().cpu().contiguous()
        if self.num_bytes + kept.nbytes > self.max_bytes:
            if not self._told:
                self._told = True
                warnings.warn(
                    f"the cache {self.directory!r} is full ({self.max_bytes} bytes, {len(self._sizes)} entries): "
                    "further samples cross in every epoch; raise cache_bytes.",
                    stacklevel=2,
                )
            return
        path = self._path(key)
        with replacing(path) as partial:
            save_file({"values": kept}, partial, {"crc32": str(zlib.crc32(bytes_of(kept)))})
        self._sizes[key] = os.path.getsize(path)

    def _read(self, key: str) -> Tensor | None:
        try:
            with reading(self._path(key)) as file:
                values, checksum = file.get_tensor("values"), (file.metadata() or {}).get("crc32")
        except ValueError as error:
            return self._drop(key, str(error))
        if str(zlib.crc32(bytes_of(values))) != checksum:
            return self._drop(key, "is damaged")
        return values

    def _drop(self, key: str, why: str) -> None:
        warnings.warn(f"cached hidden states in {self._path(key)!r} are fetched again: the file {why}.", stacklevel=4)
        self._sizes.pop(key, None)
        if os.path.exists(self._path(key)):
            os.remove(self._path(key))

    def _path(self, key: str) -> str:
        return os.path.join(self.directory, key + _ENDING)
