"""A digest of logical weights that slots compute in parts.

Each element is hashed together with its place in the *global* tensors (splitmix64's finaliser, from
Steele, Lea & Flood 2014) and the hashes are added modulo 2**64. A sum does not care who owns which
element, so the parts of a replica's slots add up to the same digest at any layout, and two replicas
are bitwise equal exactly if their digests are (up to chance of 2**-64).
"""

from __future__ import annotations

from math import prod

import torch

from ntp.model_shape import ModelShape, tensor_specs
from trainer.shard_state import ShardState

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


class WeightsDigest:
    """Digests the master parameters of one ShardState, which holds a stage of `shape`.

    With pipeline stages each one gives its own part. The copy of a tied weight in the last stage is
    left out, as the first stage counts it.
    """

    def __init__(self, state: ShardState, shape: ModelShape) -> None:
        self._state = state
        self._shape = shape
        # Made when first needed: nobody should wait for them while a recovery is under way.
        self._keys: torch.Tensor | None = None

    def parts(self) -> tuple[int, int]:
        """This slot's part (its own atoms), and the digest of the replicated tensors; unsigned."""
        if self._keys is None:
            self._keys = _keys(self._state, self._shape)
        master = self._state.master
        bits = master.view(torch.int64 if master.dtype is torch.float64 else torch.int32)
        hashes = _mix(bits.to(torch.int64) ^ self._keys)
        hashes[self._state.copied] = 0
        sharded = self._state.shards.sharded
        return _unsigned(hashes[:sharded]), _unsigned(hashes[sharded:])


def _keys(state: ShardState, shape: ModelShape) -> torch.Tensor:
    """A pseudo-random number per element, from its place in the list of all global tensors."""
    first = {}
    total = 0
    for spec in tensor_specs(shape):
        first[spec.name] = total
        total += prod(spec.shape)
    keys = torch.empty(state.shards.total, dtype=torch.int64, device=state.master.device)
    for placement in state.shards.placements:
        spec = placement.spec
        places = state.shards.tensor(keys, placement).fill_(first[spec.name])
        for dim, size in enumerate(spec.shape):
            step = prod(spec.shape[dim + 1 :])
            along = torch.arange(0, size * step, step, device=keys.device)
            along = along.view([-1 if each == dim else 1 for each in range(len(spec.shape))])
            places += state.local_part(spec, along) if dim == spec.atom_dim else along
    return _mix(keys.mul_(_GOLDEN))


def _mix(values: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, in place; int64 arithmetic wraps, masks make shifts logical."""
    values.bitwise_xor_((values >> 30).bitwise_and_((1 << 34) - 1)).mul_(_FIRST)
    values.bitwise_xor_((values >> 27).bitwise_and_((1 << 37) - 1)).mul_(_SECOND)
    return values.bitwise_xor_((values >> 31).bitwise_and_((1 << 33) - 1))


def _unsigned(hashes: torch.Tensor) -> int:
    return int(hashes.sum().item()) % (1 << 64)
