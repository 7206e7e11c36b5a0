"""Configuration -> what a plan, or the forecast of one, needs to know of the job."""

from __future__ import annotations

from elastic.forecast import ElementBytes
from elastic.job_shape import JobShape, PlacementRules
from elastic.job_shape import cluster_devices as devices_of
from elastic.topology import DeviceId
from elastic.workload import SplitBatchBy
from ntp.atoms import atom_elements_by_axis
from ntp.model_shape import atom_counts
from ntp.stages import stage_chunks, stage_specs
from trainer.config import RunConfig, model_shape


def job_shape(config: RunConfig) -> JobShape:
    """The job's model in atoms, its grid, its batch and its length."""
    shape, parallel = model_shape(config), config.parallel
    stages = (
        stage_chunks(shape.layers, parallel.pipeline, stage, parallel.virtual_pipeline)
        for stage in range(parallel.pipeline)
    )
    return JobShape(
        counts=atom_counts(shape),
        sizes=tuple(
            atom_elements_by_axis(stage_specs(shape, chunks, parallel.sequence_parallel))
            for chunks in stages
        ),
        tensor=config.parallel.tensor,
        stages=parallel.pipeline,
        # The interleaved schedule needs a microbatch for each stage.
        least_share=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        replicas=config.parallel.replicas,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        steps=config.train.steps,
        split_batch_by=SplitBatchBy(config.train.split_batch_by),
        rules=PlacementRules(
            tensor_across_nodes=config.cluster.tensor_across_nodes,
            least_gain=config.cluster.least_gain,
            device_memory_bytes=config.cluster.device_memory_bytes,
            element_bytes=element_bytes(config).resident,
        ),
    )


def cluster_devices(config: RunConfig) -> tuple[DeviceId, ...]:
    """All devices, in order; those beyond the grid are spares."""
    return devices_of(config.cluster.nodes, config.cluster.devices_per_node)


def element_bytes(config: RunConfig) -> ElementBytes:
    """Bytes of one element: float64 jobs keep all in float64, others in float32.

    A slot keeps the master parameter, Adam's two moments, the gradient, and the two vectors (three
    with weight decay) that Adam works with; a bfloat16 model computes with a copy.
    """
    word = 8 if config.train.dtype == "float64" else 4
    copy = 2 if config.train.dtype == "bfloat16" else 0
    working = 3 if config.train.weight_decay else 2
    return ElementBytes(parameter=word, optimizer=2 * word, resident=(4 + working) * word + copy)
