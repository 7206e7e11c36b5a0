"""Mixtures of experts: the layer of one slot against a loop over tokens, its tensors, its plans.

Uneven shards of whole models are compared over real processes in tests/gloo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.answers import Answers
from elastic.messages import Quiesced
from elastic.plan import Action, Plan
from elastic.planner import JobShape, Situation, home_devices, plan_generation
from elastic.session import Session, standing
from elastic.topology import DeviceId, Member
from ntp.atoms import AtomCounts, Axis, atom_elements_by_axis
from ntp.experts import ExpertShard, _TakeRows, owned_experts, route
from ntp.geometry import Range, SlotRef, full_layout, with_active
from ntp.megatron_cpu import prepare
from ntp.megatron_layers import ModelNumerics, transformer_config
from ntp.model_shape import ModelShape, atom_counts, tensor_specs
from trainer.config import RunConfig, model_shape
from trainer.config_file import ConfigError, load
from trainer.job import job_shape
from trainer.shard_state import ShardState, initialize

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
CPU = torch.device("cpu")
SHAPE = ModelShape(
    layers=2,
    hidden=8,
    heads=6,
    kv_groups=3,
    kv_channels=2,
    ffn=11,
    vocab=37,
    gated=True,
    bias=False,
    tied=False,
    experts=7,
    expert_ffn=5,
    top_k=3,
)
PLAIN = replace(SHAPE, gated=False)


class Alone(dist.ProcessGroup):
    """A group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def shard(shape: ModelShape, owned: tuple[int, ...], dtype: torch.dtype) -> ExpertShard:
    """The layer of a slot with these experts; weights depend on the expert alone."""
    prepare()
    numerics = ModelNumerics(dtype, 16, activation="silu" if shape.gated else "gelu")
    config = transformer_config(shape, numerics, 1, dict.fromkeys(Axis, 1), 1, CPU)
    layer = ExpertShard(config, shape, owned, Alone(0, 1))
    router, first, second = drawn(shape)
    mine = list(owned)
    with torch.no_grad():
        layer.router["weight"].copy_(router)
        layer.experts["weight1"].copy_(first[mine].flatten(0, -2))
        layer.experts["weight2"].copy_(second[mine].flatten(0, 1))
    return layer


def drawn(shape: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """Router [experts, h], first [experts, (2,) f, h] and second matrices [experts, h, f]."""
    generator = torch.Generator().manual_seed(5)
    experts, ffn, hidden = shape.experts, shape.expert_ffn, shape.hidden
    first = (experts, 2, ffn, hidden) if shape.gated else (experts, ffn, hidden)
    sizes = ((experts, hidden), first, (experts, hidden, ffn))
    router, one, two = (
        torch.randn(size, generator=generator, dtype=torch.float64) * 0.5 for size in sizes
    )
    return router, one, two


def tokens(sequence: int = 6, batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequence, batch, SHAPE.hidden, generator=generator, dtype=torch.float64)


def one_by_one(shape: ModelShape, hidden: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The whole layer, token by token and expert by expert."""
    router, first, second = weights
    output = []
    for token in hidden.flatten(0, 1):
        logits = router @ token
        chosen = sorted(range(shape.experts), key=lambda e: (-logits[e].item(), e))[: shape.top_k]
        gates = (logits[chosen] - logits.max()).exp()
        parts = []
        for expert in chosen:
            if shape.gated:
                columns = functional.silu(first[expert, 0] @ token) * (first[expert, 1] @ token)
            else:
                columns = functional.gelu(first[expert] @ token)
            parts.append(second[expert] @ columns)
        output.append((torch.stack(parts) * gates.unsqueeze(1)).sum(0) / gates.sum())
    return torch.stack(output).view_as(hidden)


@pytest.mark.parametrize("shape", [SHAPE, PLAIN], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("top_k", [2, 3, 7])
def test_one_slot_is_a_loop_over_tokens_and_experts(shape: ModelShape, top_k: int) -> None:
    shape = replace(shape, top_k=top_k)
    layer = shard(shape, tuple(range(shape.experts)), torch.float64)
    ours, theirs = tokens().requires_grad_(), tokens().requires_grad_()
    weights = tuple(weight.requires_grad_() for weight in drawn(shape))
    output, bias = layer(ours, padding_mask=None)
    expected = one_by_one(shape, theirs, weights)
    assert bias is None
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    upstream = tokens(seed=2)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        assert parameter.grad is not None and weight.grad is not None
        torch.testing.assert_close(
            parameter.grad, weight.grad.view(parameter.shape), rtol=1e-11, atol=1e-12
        )


def test_slots_share_the_output_and_the_routers_gradient() -> None:
    """Their outputs, and their gradients of tokens and router, sum to those of one slot."""
    upstream = tokens(seed=2)

    def run(owned: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        layer, hidden = shard(SHAPE, owned, torch.float64), tokens().requires_grad_()
        output = layer(hidden)[0]
        (output * upstream).sum().backward()
        gradient = layer.router["weight"].grad
        assert hidden.grad is not None and gradient is not None
        return output.detach(), hidden.grad, gradient

    whole = run(tuple(range(7)))
    # Storage order is home first, so not ascending after a loss.
    parts = [run(owned) for owned in ((4, 0), (1, 2, 6), (3, 5))]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(apart).sum(0), together, rtol=1e-12, atol=1e-12)
        assert not any(torch.allclose(part, together) for part in apart)


def test_experts_without_tokens_have_zero_gradients_and_keep_the_graph_whole() -> None:
    """Otherwise their slot would miss the collectives of backward, and the others wait."""
    layer = shard(replace(SHAPE, top_k=2), (1, 5), torch.float64)
    told: list[Tensor] = []
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.register_post_accumulate_grad_hook(told.append)
    with torch.no_grad():
        layer.router["weight"][[1, 5]] = layer.router["weight"][[0, 2]].neg()
    hidden = tokens()
    experts = route(hidden.flatten(0, 1), layer.router["weight"], 2)[1]
    lonely = hidden.flatten(0, 1)[~((experts == 1) | (experts == 5)).any(1)].unsqueeze(1)
    assert len(lonely)
    lonely.requires_grad_()
    output = layer(lonely)[0]
    assert output.requires_grad
    assert not output.any()
    output.sum().backward()
    assert lonely.grad is not None and not lonely.grad.any()
    assert {id(each) for each in told} == {id(each) for each in layer.parameters()}
    assert not any(
        parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None
    )


def test_a_tokens_output_depends_on_this_token_alone() -> None:
    layer = shard(SHAPE, tuple(range(7)), torch.float64)
    hidden = tokens(sequence=9)
    together = layer(hidden)[0]
    alone = torch.cat([layer(hidden[place : place + 1])[0] for place in range(9)])
    torch.testing.assert_close(alone, together, rtol=1e-13, atol=1e-13)


def test_positions_without_gradient_leave_none() -> None:
    """The padding of sequence parallelism: routed like any token, with nothing coming back."""
    gradients = []
    for padding in (0, 5):
        layer = shard(SHAPE, tuple(range(7)), torch.float64)
        padded = torch.cat([tokens(), tokens(sequence=5, seed=9)[:padding] * 1e3])
        (layer(padded)[0][:6] * tokens(seed=2)).sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_of_equal_logits_the_lower_expert_goes_first() -> None:
    hidden = torch.ones(4, 8)
    weight = torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0, 2.0]).unsqueeze(1).expand(-1, 8)
    gates, experts = route(hidden, weight, 4)
    assert experts.tolist() == [[1, 3, 4, 2]] * 4
    assert torch.equal(gates[:, 0], gates[:, 2])


def test_bfloat16_routes_in_float32() -> None:
    """Two experts that bfloat16 cannot tell apart: the second is better by 2**-9."""
    hidden = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 0.0]], dtype=torch.bfloat16)
    gates, experts = route(hidden, weight, 2)
    assert experts.tolist() == [[1, 0]]
    assert gates.dtype is torch.float32
    layer = shard(SHAPE, tuple(range(7)), torch.bfloat16)
    output = layer(tokens().bfloat16())[0]
    assert output.dtype is torch.bfloat16
    # Rounded weights may choose others for a token near a tie: of most tokens, the output is right.
    expected = one_by_one(SHAPE, tokens(), drawn(SHAPE))
    close = torch.isclose(output.double(), expected, rtol=0.1, atol=0.1).all(-1)
    assert close.double().mean() > 0.8


def test_taking_rows_has_the_gradient_of_index_select() -> None:
    matrix = tokens().flatten(0, 1)[:5].requires_grad_()
    rows = torch.tensor([0, 3, 4, 3, 1, 4])

    def take(matrix: Tensor) -> Tensor:
        taken: Tensor = _TakeRows.apply(matrix, rows, [3, 0, 2, 1])
        return taken

    assert torch.equal(take(matrix), matrix[rows])
    assert torch.autograd.gradcheck(take, (matrix,))


@given(
    base=st.integers(1, 6), experts=st.integers(6, 40), gone=st.sets(st.integers(0, 5), max_size=5)
)
def test_every_expert_has_one_slot(base: int, experts: int, gone: set[int]) -> None:
    counts = AtomCounts(base, 0, base, experts)
    active = tuple(slot for slot in range(base) if slot not in gone) or (0,)
    shards = with_active(full_layout(counts, base, 1).replicas[0], active).shards
    owned = [owned_experts(shards, slot) for slot in range(base)]
    assert sorted(expert for mine in owned for expert in mine) == list(range(experts))
    assert {len(mine) for slot, mine in enumerate(owned) if slot not in active} <= {0}
    for slot in active:
        home = shards.axis(Axis.EXPERT).home[slot]
        assert owned[slot][: len(home)] == tuple(range(home.start, home.stop))
        for local, expert in enumerate(owned[slot]):
            piece = Range(expert, expert + 1)
            assert shards.offset_of(Axis.EXPERT, slot, piece) == local


@pytest.mark.parametrize("shape", [SHAPE, PLAIN], ids=["gated", "plain"])
def test_a_layers_tensors_are_the_layers_parameters(shape: ModelShape) -> None:
    layer = shard(shape, (6, 0, 2), torch.float32)
    specs = {
        spec.name.partition("layers.0.mlp.")[2]: spec
        for spec in tensor_specs(shape)
        if "layers.0.mlp." in spec.name
    }
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        name: spec.parameter_shape(3) for name, spec in specs.items()
    }
    assert specs["router.weight"].partial_gradient
    assert [specs[f"experts.weight{n}"].axis for n in (1, 2)] == [Axis.EXPERT] * 2


def test_a_model_of_experts_has_no_mlp_columns() -> None:
    assert atom_counts(SHAPE) == AtomCounts(3, 0, 37, 7)
    assert atom_counts(replace(SHAPE, experts=0)) == AtomCounts(3, 11, 37, 0)
    specs = tensor_specs(SHAPE)
    assert not any(spec.axis is Axis.MLP_COLUMN for spec in specs)
    sizes = atom_elements_by_axis(specs)
    # Two layers; gate, up and down of five columns; norms and the router are replicated.
    assert (sizes.expert, sizes.mlp_column) == (2 * 3 * 5 * 8, 0)
    assert sizes.replicated == 2 * (2 * 8 + 7 * 8) + 8
    assert atom_elements_by_axis(tensor_specs(PLAIN)).expert == 2 * 2 * 5 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ffn": 0}, "7 experts of 0 columns"),
        ({"experts": -1}, "-1 experts of 5 columns"),
        ({"top_k": 8}, "top_k is 8 of 7 experts"),
        ({"top_k": 1}, "top_k is 1 of 7 experts; choose at least 2"),
        ({"bias": True}, "biases are not supported with 7 experts"),
    ],
)
def test_impossible_shapes(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **change)


def test_the_second_matrix_of_an_expert_is_initialised_as_a_residual_projection() -> None:
    shape = replace(SHAPE, hidden=32, expert_ffn=64)
    layout = full_layout(atom_counts(shape), 1, 1).replicas[0]
    state = ShardState(tensor_specs(shape), layout, 0, torch.float64, CPU)
    initialize(state, 3, 0.2, layers=shape.layers)
    for placement in state.shards.placements:
        name = placement.spec.name
        if ".mlp." in name:
            expected = 0.1 if name.endswith("experts.weight2") else 0.2
            deviation = float(state.shards.tensor(state.master, placement).std())
            assert deviation == pytest.approx(expected, rel=0.15), name


def configured(*overrides: str) -> RunConfig:
    return load(DEMO, ("model.num_moe_experts=8", *overrides))


def test_a_configuration_of_experts() -> None:
    shape = model_shape(configured("model.moe_ffn_hidden_size=24", "model.moe_router_topk=3"))
    assert (shape.experts, shape.expert_ffn, shape.top_k) == (8, 24, 3)
    columns = load(DEMO).model.ffn_size
    assert model_shape(configured()).expert_ffn == columns
    assert model_shape(configured()).top_k == 2
    dense = model_shape(load(DEMO))
    assert (dense.experts, dense.expert_ffn, dense.top_k) == (0, 0, 0)
    # Columns of an MLP that the model does not have need not fill the slots.
    configured("model.ffn_hidden_size=3")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("model.num_moe_experts=3",),
            "model.num_moe_experts: 3 is less than parallel.tensor (4), and experts cannot be cut;"
            " set parallel.tensor to 3 or less, or model.num_moe_experts to at least 4",
        ),
        (
            ("model.moe_router_topk=9",),
            "model.moe_router_topk: a token cannot take 9 of 8 experts; set model.num_moe_experts"
            " to 9 or more, or model.moe_router_topk to 8 or less",
        ),
        (("model.moe_router_topk=1",), "model.moe_router_topk: Input should be greater than or"),
        (
            ("model.num_moe_experts=null", "model.moe_ffn_hidden_size=8"),
            "model.moe_ffn_hidden_size: 8 would be ignored, as the model is dense; set",
        ),
        (
            ("model.transformer_impl=transformer_engine",),
            "model.transformer_impl: Transformer Engine's layers cannot hold the 8 experts; set it"
            " to local, or model.num_moe_experts to null",
        ),
        (
            ("model.add_bias_linear=true",),
            "model.add_bias_linear: the 8 experts have no biases; set it to false, or",
        ),
    ],
)
def test_a_problem_names_the_setting_the_numbers_and_the_remedy(
    overrides: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 1
    assert lines[0].startswith(expected)


def test_a_loss_moves_the_lost_slots_experts_and_a_return_brings_them_back() -> None:
    job: JobShape = job_shape(configured("model.num_moe_experts=10"))
    assert job.counts.axes == (Axis.KV_GROUP, Axis.VOCAB_ROW, Axis.EXPERT)
    size = job.replicas * job.stages * job.tensor
    homes = home_devices(job, [DeviceId(0, number) for number in range(size)])
    workers = {device: Member(device, 1) for device in homes.values()}
    first = plan_generation(job, Situation(1, workers, Answers(), {}, "node0:7", homes))
    assert isinstance(first, Plan)
    lost = SlotRef(1, 2)
    session = Session(committed=3)
    answers = Answers(
        Quiesced(2, member, standing(place.slot_ref, session, 1, 0), True, 0.0)
        for place, member in first.placement
        if place.slot_ref != lost
    )
    left = {member.device: member for member in answers.by_member}
    second = plan_generation(job, Situation(2, left, answers, {1: first}, "node0:7", homes))
    assert isinstance(second, Plan) and second.action is Action.REDUCE_TP
    home = first.layout.replica(1).shards.axis(Axis.EXPERT).home[lost.slot]
    moved = [move for move in second.reshard[0].moves if move.axis is Axis.EXPERT]
    assert sorted(expert for m in moved for expert in range(m.atoms.start, m.atoms.stop)) == list(
        range(home.start, home.stop)
    )
    shards = second.layout.replica(1).shards
    held = [len(owned_experts(shards, slot)) for slot in (0, 1, 3)]
    assert (sum(held), max(held) - min(held)) == (10, 1)
