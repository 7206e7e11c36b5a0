"""The training state of one slot: flat parameters, gradients, and Adam's two moments.

There is no other state: learning rate, data and initial values are functions of (seed, step). State
is kept in the precision of the optimizer (float32, or float64); a bfloat16 model computes with a
copy of the parameters.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import prod

import torch

from ntp.atoms import TensorSpec
from ntp.geometry import ReplicaLayout
from ntp.local_shards import LocalShards

RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight", "experts.weight2")


class ShardState:
    """Flat tensors of one slot in one layout.

    `master`, `first_moment`, `second_moment` and `gradients` have the state's dtype; `parameters`
    has the model's, and is `master` itself where the two agree. All have ``shards.total`` elements.
    `loss_sum` is the sum of the token losses whose gradients these are, where the loss is computed.
    `copied` are the elements of a tensor, named in `copies`, that another stage holds too and
    counts in norms and digests.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        layout: ReplicaLayout,
        slot: int,
        model_dtype: torch.dtype,
        device: torch.device,
        copies: frozenset[str] = frozenset(),
    ) -> None:
        self.specs = specs
        self.layout = layout
        self.slot = slot
        self.shards = LocalShards(specs, layout.shards, slot)
        dtype = torch.float64 if model_dtype is torch.float64 else torch.float32
        size = self.shards.total
        self.master = torch.zeros(size, dtype=dtype, device=device)
        self.first_moment = torch.zeros_like(self.master)
        self.second_moment = torch.zeros_like(self.master)
        self.gradients = torch.zeros_like(self.master)
        self.loss_sum = 0.0
        self.copied = slice(0, 0)
        for placement in self.shards.placements:
            if placement.spec.name in copies:
                assert self.copied == slice(0, 0), "norms leave out a single run of elements"
                self.copied = slice(placement.offset, placement.offset + prod(placement.shape))
        self.parameters = self.master if model_dtype is dtype else self.master.to(model_dtype)

    @property
    def persistent(self) -> tuple[torch.Tensor, ...]:
        """What must survive a failure, in the order in which it travels."""
        return (self.master, self.first_moment, self.second_moment)

    def clear_gradients(self) -> None:
        """No sample has been computed yet."""
        self.gradients.zero_()
        self.loss_sum = 0.0

    def counted(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The elements of `flat`, or of its beginning, that are not `copied`, as two views."""
        return flat[: self.copied.start], flat[self.copied.stop :]

    def publish(self) -> None:
        """Give the model the present master parameters."""
        if self.parameters is not self.master:
            self.parameters.copy_(self.master)

    def local_part(self, spec: TensorSpec, whole: torch.Tensor) -> torch.Tensor:
        """The part of a global tensor (in its split shape) that this slot owns, in local order."""
        if spec.axis is None:
            return whole
        owned = self.layout.shards.owned(spec.axis, self.slot)
        parts = [whole.narrow(spec.atom_dim, atoms.start, len(atoms)) for atoms in owned]
        return torch.cat(parts, dim=spec.atom_dim)


def initialize(state: ShardState, seed: int, deviation: float, layers: int) -> None:
    """Give parameters their initial values, a function of the seed and the tensor's name alone.

    Norm weights are 1, biases 0, all else normal with `deviation`, divided by sqrt(2 * layers) for
    the projections back to the residual stream (Megatron's scaled initialisation). A tensor is
    generated whole, so every layout, stage and replica cuts the same values. `layers` are those
    of the whole model.
    """
    for placement in state.shards.placements:
        spec = placement.spec
        target = state.shards.tensor(state.master, placement)
        if "norm" in spec.name and spec.name.endswith("weight"):
            target.fill_(1.0)
        elif spec.name.endswith("bias"):
            target.zero_()
        else:
            residual = spec.name.endswith(RESIDUAL_PROJECTIONS)
            scale = deviation / (2 * layers) ** 0.5 if residual else deviation
            generator = torch.Generator().manual_seed(seed + zlib.crc32(spec.name.encode()))
            whole = torch.randn(spec.shape, generator=generator, dtype=torch.float64) * scale
            target.copy_(state.local_part(spec, whole))
    state.publish()
