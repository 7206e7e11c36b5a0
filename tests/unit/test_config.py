"""A configuration that exists is consistent; one that cannot be used says what to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from elastic.config import ClusterConfig, ParallelConfig, check_cluster
from elastic.health_config import HealthConfig
from elastic.workload import SplitBatchBy
from ntp.model_shape import ModelShape
from trainer.config import RunConfig, model_shape
from trainer.config_file import ConfigError, load
from trainer.job import job_shape

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def problems(*overrides: str) -> list[str]:
    """What is wrong with the demo after these overrides, without the line that names the file."""
    with pytest.raises(ConfigError) as caught:
        load(DEMO, overrides)
    return str(caught.value).splitlines()[1:]


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [field.annotation for field in model.model_fields.values()]
    found = [each for each in inner if isinstance(each, type) and issubclass(each, BaseModel)]
    return [model, *found]


def test_the_demo_loads() -> None:
    config = load(DEMO)
    assert config.parallel == ParallelConfig(tensor=4, replicas=2)
    assert config.cluster.devices == config.parallel.devices == 8
    assert config.train.dtype == "float64"
    assert config.health == HealthConfig()
    assert model_shape(config) == ModelShape(
        layers=4,
        hidden=128,
        heads=16,
        kv_groups=8,
        kv_channels=8,
        ffn=344,
        vocab=256,
        gated=True,
        bias=False,
        tied=False,
        norm_bias=False,
        qk_norm=False,
    )


def test_model_defaults_are_resolved_as_in_megatron() -> None:
    shape = model_shape(
        load(
            DEMO,
            (
                "model.num_query_groups=null",
                "model.ffn_hidden_size=null",
                "model.normalization=LayerNorm",
                "model.untie_embeddings_and_output_weights=false",
                "model.add_bias_linear=true",
                "model.qk_layernorm=true",
                "model.gated_linear_unit=false",
            ),
        )
    )
    assert (shape.kv_groups, shape.kv_channels, shape.ffn) == (16, 8, 512)
    assert (shape.norm_bias, shape.tied, shape.bias, shape.qk_norm) == (True, True, True, True)
    assert not shape.gated


def test_every_setting_is_documented_and_every_section_closed() -> None:
    for section in sections(RunConfig):
        assert section.model_config["frozen"] is True
        assert section.model_config["extra"] == "forbid"
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"


def test_a_configuration_is_a_value() -> None:
    config = load(DEMO)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.job = "other"  # type: ignore[misc]


def test_overrides_apply_in_order_and_make_missing_sections() -> None:
    config = load(
        DEMO,
        (
            "train.steps=7",
            "train.steps=9",
            "train.learning_rate=1e-2",
            "health.max_recoveries=3",
            "data.kind=text",
            "data.path=a=b.txt",
        ),
    )
    assert config.train.steps == 9
    assert config.train.learning_rate == 0.01  # YAML itself reads 1e-2 as a string.
    assert config.health.max_recoveries == 3
    assert config.data.path == "a=b.txt"


def test_the_batch_need_not_divide_into_replicas_and_microbatches() -> None:
    config = load(DEMO, ("train.global_batch_size=7", "train.split_batch_by=speed"))
    assert job_shape(config).global_batch_size == 7
    assert job_shape(config).split_batch_by is SplitBatchBy.SPEED


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write it as section.name=value"),
        (".steps=1", "write it as section.name=value"),
        ("train.steps=[", "not YAML: line 1"),
        ("job.name=x", "job is 'demo', not a section"),
    ],
)
def test_malformed_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(DEMO, (override,))
    assert f"--set {override}: " in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.global_batchsize=8", "train.global_batchsize: {} train.global_batch_size?"),
        ("train.stepz=8", "train.stepz: {} train.steps?"),
        ("steps=8", "steps: {} train.steps?"),
        ("paralel.tensor=8", "paralel: {} parallel?"),
        ("model.seq_length=8", "model.seq_length: {} train.seq_length?"),
    ],
)
def test_unknown_settings_name_the_nearest_valid_one(override: str, expected: str) -> None:
    line = problems(override)[0]
    name, _, nearest = line.partition("no such setting; did you mean ")
    assert name + "{} " + nearest == expected


def test_context_parallelism_is_refused_as_such() -> None:
    (line,) = problems("parallel.context=2")
    assert line.startswith("parallel.context: context parallelism is not supported, as megatron")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("train.global_batch_size=1",),
            "train.global_batch_size: 1 samples cannot give each of parallel.replicas (2) at least"
            " one; set it to 2 or more, or parallel.replicas to 1 or less",
        ),
        (
            ("model.num_query_groups=2",),
            "model.num_query_groups: 2 is less than parallel.tensor (4), and KV groups cannot be"
            " cut; set parallel.tensor to 2 or less",
        ),
        (
            ("model.ffn_hidden_size=3",),
            "model.ffn_hidden_size: 3 is less than parallel.tensor (4)",
        ),
        (
            ("model.num_query_groups=5",),
            "model.num_query_groups: 16 attention heads do not divide into 5 KV groups",
        ),
        (("model.hidden_size=100",), "model.kv_channels: hidden_size 100 does not divide by 16"),
        (("model.kv_channels=7",), "model.kv_channels: RoPE rotates pairs, but 7 channels"),
        (("model.rotary_percent=0.1",), "model.kv_channels: RoPE rotates pairs, but 8 channels"),
        (("model.vocab_size=255",), "model.vocab_size: 255 token ids cannot name the 256 values"),
        (
            ("train.min_learning_rate=1",),
            "train.min_learning_rate: 1.0 is above train.learning_rate (0.001)",
        ),
        (("data.kind=text",), "data.path: required when data.kind is text"),
        (("data.path=x",), "data.path: 'x' would be ignored, as data.kind is builtin_text"),
        (
            ("parallel.virtual_pipeline=2",),
            "parallel.virtual_pipeline: 2 chunks need more than one stage; set it to 1, or",
        ),
        (
            ("parallel.pipeline=2", "parallel.replicas=1", "model.num_layers=1"),
            "model.num_layers: 1 layers cannot fill parallel.pipeline (2) x",
        ),
        (("train.seq_length=0",), "train.seq_length: Input should be greater than or equal to 1"),
        (("train.steps=null",), "train.steps: Input should be a valid integer, not None"),
        (("job=My Job",), "job: String should match pattern"),
        (("train=null",), "train: Input should be a valid dictionary"),
        (("health.spawn_timeout_seconds=.inf",), "health.spawn_timeout_seconds: Input should be"),
        (
            ("health.quiesce_timeout_seconds=10",),
            "health.quiesce_timeout_seconds: 10 must be above health.rebuild_timeout_seconds (10)",
        ),
    ],
)
def test_a_problem_names_the_setting_the_numbers_and_the_remedy(
    overrides: tuple[str, ...], expected: str
) -> None:
    lines = problems(*overrides)
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_all_problems_are_reported_at_once() -> None:
    lines = problems("train.global_batch_size=2", "model.vocab_size=3", "parallel.replicas=3")
    names = [line.partition(":")[0] for line in lines]
    assert names == ["cluster", "model.vocab_size", "model.vocab_size", "train.global_batch_size"]
    assert [line.partition(":")[0] for line in problems("train.steps=x", "model.x=1")] == [
        "model.x",
        "train.steps",
    ]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be read"):
        load(path)
    path.write_text("train:\n  steps: 1\n bad: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml is not YAML: line 3, column 2"):
        load(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load(path)
    path.write_text("")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines()[1:] == [
        "model: required; set it in the file, or with --set model=VALUE",
        "train: required; set it in the file, or with --set train=VALUE",
    ]


@given(
    nodes=st.integers(1, 6),
    per_node=st.integers(1, 8),
    spares=st.integers(0, 8),
    tensor=st.integers(1, 8),
    replicas=st.integers(1, 6),
)
def test_the_cluster_fits_or_the_remedies_make_it_fit(
    nodes: int, per_node: int, spares: int, tensor: int, replicas: int
) -> None:
    cluster = ClusterConfig(nodes=nodes, devices_per_node=per_node, spare_devices=spares)
    parallel = ParallelConfig(tensor=tensor, replicas=replicas)
    if nodes * per_node == tensor * replicas + spares:
        check_cluster(cluster, parallel)
        return
    with pytest.raises(ValueError, match="devices, but") as caught:
        check_cluster(cluster, parallel)
    message = str(caught.value)
    for number in (nodes * per_node, tensor * replicas + spares):
        assert f"= {number} devices" in message
    _, _, remedies = message.partition("; set ")
    for remedy in remedies.split(", or ") if remedies else ():
        name, value = remedy.split(" to ")
        section, _, field = name.partition(".")
        change = {field: int(value)}
        check_cluster(
            cluster.model_copy(update=change) if section == "cluster" else cluster,
            parallel.model_copy(update=change) if section == "parallel" else parallel,
        )
