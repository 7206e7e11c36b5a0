"""Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), elementwise.

Replicas must stay bitwise equal although an element may lie at another place of another length of
vector in each of them. Kernels that fuse a multiplication with an addition round differently in
their vectorised body and in their scalar tail, so torch's own Adam does not promise that. Here
every kernel does one rounding per element, and the result cannot depend on where an element lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.shard_state import ShardState


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """Coefficients of Adam; `weight_decay` applies to matrices, not to norms and biases."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


class Adam:
    """Updates one ShardState. The count of updates is a function of the step."""

    def __init__(self, state: ShardState, settings: AdamSettings) -> None:
        self._state = state
        self._settings = settings
        self._scaled = torch.empty_like(state.master)
        self._scratch = torch.empty_like(state.master)
        self._decayed = _decayed(state) if settings.weight_decay else None

    def update(
        self,
        step: int,
        learning_rate: float,
        gradient_scale: float,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Apply the gradients of `step` (from 0), times `gradient_scale`.

        `between` is called when the moments are updated and the parameters are not.
        """
        state, settings = self._state, self._settings
        gradient, scratch = self._scaled, self._scratch
        torch.mul(state.gradients, gradient_scale, out=gradient)
        torch.mul(gradient, 1.0 - settings.beta1, out=scratch)
        state.first_moment.mul_(settings.beta1).add_(scratch)
        torch.mul(gradient, gradient, out=scratch)
        scratch.mul_(1.0 - settings.beta2)
        state.second_moment.mul_(settings.beta2).add_(scratch)
        between()
        torch.div(state.second_moment, 1.0 - settings.beta2 ** (step + 1), out=scratch)
        scratch.sqrt_().add_(settings.epsilon)
        update = torch.div(
            state.first_moment, 1.0 - settings.beta1 ** (step + 1), out=gradient
        ).div_(scratch)
        if self._decayed is not None:
            torch.mul(state.master, settings.weight_decay, out=scratch)
            update.add_(scratch.mul_(self._decayed))
        state.master.sub_(update.mul_(learning_rate))
        state.publish()


def _decayed(state: ShardState) -> torch.Tensor:
    """1 where weight decay applies, 0 elsewhere."""
    mask = torch.zeros_like(state.master)
    for placement in state.shards.placements:
        if len(placement.spec.parameter_shape(1)) == 2:
            state.shards.tensor(mask, placement).fill_(1.0)
    return mask
