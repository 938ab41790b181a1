"""One seed, many named and restartable random streams.

A stream is a function of (seed, names) alone, so that member 3 of an ensemble draws the same noise
whatever the ensemble's size, the batch it is computed in, or the process that computes it.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed that depends on ``seed`` and every name, by SHA-256."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the stream ``(seed, *names)``."""
    return torch.Generator("cpu").manual_seed(derive(seed, *names))


class Streams:
    """Independent normal draws for a batch of members, one stream each.

    ``Streams(seed, [0, 1, 2], 'sampler').normal((4, 5))`` has shape ``(3, 4, 5)``; its first rows are the
    same for any longer list of members. Draws are made on the CPU, so devices agree.
    """

    def __init__(self, seed: int, members: Sequence[int], *names: object):
        self.generators = [generator(seed, *names, "member", m) for m in members]

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        draws = [torch.randn(tuple(shape), generator=g, dtype=dtype) for g in self.generators]
        return torch.stack(draws).to(device)
