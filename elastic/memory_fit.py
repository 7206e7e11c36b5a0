"""Whether the model's state fits on a device.

Pure. A replica at a lower degree holds more on each device, and while a worker changes from one
layout to another it holds both. Counted is what a worker keeps of the model (parameters, gradients,
optimizer state), not activations: `cluster.device_memory_bytes` is to leave room for these.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic.job_shape import JobShape
from elastic.throughput import fullest_slot


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """`held[degree]`: bytes that the fullest slot of a replica holds, 0 at degree 0. `limit`: bytes
    of a device, 0: unlimited."""

    held: tuple[int, ...]
    limit: int

    def fits(self, before: int, after: int) -> bool:
        """Whether a replica can go from one degree to another, or stay as it is.

        `before` is 0 if its workers hold nothing.
        """
        return self.fits_both(before if before != after else 0, after)

    def fits_both(self, before: int, after: int) -> bool:
        """Whether a worker can hold its part at both degrees at once."""
        return not self.limit or self.held[before] + self.held[after] <= self.limit

    def problem(self, before: int, after: int) -> str:
        """Why it cannot, in words."""
        stays = before in (0, after)
        what = f"TP{after}" if stays else f"the change from TP{before} to TP{after}"
        needed = self.held[after] + (0 if stays else self.held[before])
        return (
            f"{what} needs {needed} bytes a device, above "
            f"cluster.device_memory_bytes ({self.limit})"
        )


def memory_fit(shape: JobShape) -> MemoryFit:
    """The memory that the job needs and has."""
    rules = shape.rules
    held = tuple(
        rules.element_bytes
        * max(
            fullest_slot(shape.counts, sizes, degree) + sizes.replicated
            for sizes in set(shape.sizes)
        )
        for degree in range(1, shape.tensor + 1)
    )
    return MemoryFit((0, *held), rules.device_memory_bytes)
