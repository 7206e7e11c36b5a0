"""What `everstep plan` shows: the text as a person reads it, a drawing that is sound, and errors.

EVERSTEP_REWRITE=1 rewrites the texts; read the difference before you keep it.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from elastic.forecast import Forecast, failed_places, forecast
from ntp.ranges import Range
from trainer.config import RunConfig
from trainer.config_file import load
from trainer.job import cluster_devices, element_bytes, job_shape
from trainer.main import app
from trainer.plan_svg import draw
from trainer.plan_view import render
from trainer.plan_words import amount, failure_title, numbers, owned_ranges

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TEXTS = Path(__file__).parent / "plans"
REWRITE = os.environ.get("EVERSTEP_REWRITE") == "1"
SVG = "{http://www.w3.org/2000/svg}"

BIG = (
    "parallel.replicas=16",
    "parallel.tensor=8",
    "cluster.nodes=16",
    "cluster.devices_per_node=8",
    "train.global_batch_size=128",
)


def ahead(names: tuple[str, ...], *overrides: str) -> tuple[RunConfig, Forecast]:
    config = load(DEMO, overrides)
    shape, devices = job_shape(config), cluster_devices(config)
    found = forecast(shape, devices, failed_places(names, shape, devices))
    assert isinstance(found, Forecast)
    return config, found


def drawing(names: tuple[str, ...], *overrides: str) -> ElementTree.Element:
    config, found = ahead(names, *overrides)
    return ElementTree.fromstring(draw(config.job, found, element_bytes(config)))


def slots(root: ElementTree.Element, css: str) -> list[ElementTree.Element]:
    return [group for group in root.iter(f"{SVG}g") if group.get("class") == css]


def words(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("name", "failures", "overrides"),
    [
        ("demo", ("1.2",), ()),
        ("nothing_lost", (), ()),
        ("replica_dropped", ("1.0", "1.1", "1.2", "1.3"), ()),
        ("many_replicas", ("1.2", "9.4", "9.5", "3.2"), BIG),
    ],
)
def test_the_text_is_as_its_file_says(
    name: str, failures: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    config, found = ahead(failures, *overrides)
    file = io.StringIO()
    Console(width=120, file=file).print(render(config.job, found, element_bytes(config)))
    text = "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
    path = TEXTS / f"{name}.txt"
    if REWRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_every_slot_is_drawn_once_and_the_vacant_one_so() -> None:
    root = drawing(("1.2",))
    assert len(slots(root, "slot")) == 7 and len(slots(root, "slot vacant")) == 1
    # One piece of each axis at home in 7 slots; 3 columns of rows and 2 KV groups adopted.
    bars = [rect for group in slots(root, "slot") for rect in group.iter(f"{SVG}rect")]
    assert len(bars) == 7 * 3 + 3 * 3 - 1
    assert len({rect.get("fill") for rect in bars}) == 4
    arrows = [path for path in root.iter(f"{SVG}path") if path.get("class") == "arrow"]
    assert len(arrows) == 3
    assert "demo" in words(root) and "replica 1 slot 2 lost (1 of 8 devices)" in words(root)
    assert "sends 4.74 MB" in words(root)


def test_the_height_of_the_bars_of_a_slot_is_what_it_owns() -> None:
    wounded = slots(drawing(("1.2",)), "slot")[4]
    tops: dict[str, float] = {}
    for rect in wounded.iter(f"{SVG}rect"):
        # Pieces are drawn a pixel lower than they are, to be told apart.
        tops[rect.get("x", "")] = (
            tops.get(rect.get("x", ""), 0.0) + float(rect.get("height", 0)) + 1
        )
    kv, mlp, vocabulary = tops.values()
    assert kv / mlp == pytest.approx((3 / 8) / (115 / 344), abs=0.01)
    assert kv / vocabulary == pytest.approx((3 / 8) / (86 / 256), abs=0.01)


def test_replicas_that_are_alike_are_drawn_once() -> None:
    root = drawing(("1.2", "3.2", "9.4"), *BIG)
    assert len(slots(root, "slot")) == 8 + 7 + 7 and len(slots(root, "slot vacant")) == 2
    titles = [text for text in words(root) if text.startswith("replica")]
    assert [title.partition(":")[0] for title in titles if ": TP" in title] == [
        "replicas 0, 2, 4-8, 10-15",
        "replicas 1, 3",
        "replica 9",
    ]


def test_many_kinds_of_replicas_are_not_all_drawn_and_the_drawing_says_so() -> None:
    one = [f"{replica}.{replica}" for replica in range(8)]
    two = [f"{replica}.{slot}" for replica in range(8, 15) for slot in (replica - 8, replica - 7)]
    # Replicas may not trade slots, or few kinds would be left.
    root = drawing((*one, *two), *BIG, "cluster.least_gain=100")
    text = " ".join(words(root))
    assert "Not drawn: 4 more replicas in 4 kinds." in text
    assert "too many arrows to draw" in text
    assert not [path for path in root.iter(f"{SVG}path") if path.get("class") == "arrow"]


def test_a_dropped_replica_is_drawn_empty() -> None:
    root = drawing(("1.0", "1.1", "1.2", "1.3"))
    assert len(slots(root, "slot vacant")) == 4
    assert "replica 1: no slot left, dropped" in words(root)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_999_999, "10.0 MB"),
        (123_456_789, "123 MB"),
        (999_600_000, "1.00 GB"),
        (5_000_000_000_000_000, "5.00 PB"),
    ],
)
def test_amounts_have_three_digits(count: int, expected: str) -> None:
    assert amount(count) == expected


def test_runs_and_ranges_are_short() -> None:
    assert numbers([0, 2, 3, 4, 9]) == "0, 2-4, 9"
    assert owned_ranges((Range(4, 6), Range(0, 1))) == "4-5 + 0"


def test_the_title_names_the_stages_where_others_of_the_slot_go_on() -> None:
    stages = "parallel.pipeline=2", "cluster.devices_per_node=8"
    assert failure_title(ahead(("node0/5",), *stages)[1]) == (
        "replica 0 stage 1 slot 1 lost (1 of 16 devices)"
    )
    assert failure_title(ahead(("node0/5", "1.2"), *stages)[1]) == (
        "replica 0 stage 1 slot 1, replica 1 slot 2 lost (3 of 16 devices)"
    )


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", str(DEMO), *arguments])


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    result = command("--fail", "1.2", "--fail", "node0/1", "--svg", str(path))
    assert result.exit_code == 0, result.output
    assert "demo: replica 0 slot 1, replica 1 slot 2 lost (2 of 8 devices)" in result.output
    assert "throughput" in result.output and f"the drawing is in {path}" in result.output
    assert len(slots(ElementTree.parse(path).getroot(), "slot vacant")) == 2


def test_a_drawing_that_cannot_be_written_is_refused_before_anything_is_printed() -> None:
    result = command("--fail", "1.2", "--svg", "/nowhere/x.svg")
    assert result.exit_code == 2 and "throughput" not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--fail", "7.0"), 2, "refused: --fail 7.0: there is no such slot; replicas are 0..1"),
        (("--fail", "x"), 2, "refused: --fail x: write it as REPLICA.SLOT"),
        (("--fail", "node4/0"), 2, "refused: --fail node4/0: the device does not exist"),
        (("--set", "train.steps=x"), 2, "train.steps: Input should be a valid integer"),
        (
            ("--fail", "0.3", "--fail", "1.3"),
            3,
            "the job would halt: nobody alive holds KV groups 6-7, MLP columns 258-343 and",
        ),
        (("--svg", "/nowhere/x.svg"), 2, "refused: --svg /nowhere/x.svg cannot be written"),
    ],
)
def test_the_command_refuses_with_a_reason(
    arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = command(*arguments)
    assert result.exit_code == code
    assert message in result.output
