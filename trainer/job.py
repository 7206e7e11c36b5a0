"""Configuration -> what a plan needs to know of the job."""

from __future__ import annotations

from elastic.planner import JobShape
from ntp.atoms import atom_elements_by_axis
from ntp.model_shape import atom_counts, tensor_specs
from trainer.config import RunConfig, model_shape


def job_shape(config: RunConfig) -> JobShape:
    """The job's model in atoms, its grid, its batch and its length."""
    shape = model_shape(config)
    return JobShape(
        counts=atom_counts(shape),
        sizes=atom_elements_by_axis(tensor_specs(shape)),
        tensor=config.parallel.tensor,
        replicas=config.parallel.replicas,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        steps=config.train.steps,
    )
