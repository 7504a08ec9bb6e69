"""Search: the ladder is optimal for its tables, the same tables give the same result, and what is said is true."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cnncomp
from cnncomp import SearchResult, Target
from cnncomp._container import contents, unpack
from cnncomp.errors import ArgumentError, CalibrationError
from cnncomp.models import ConcatNet
from cnncomp.search import (
    DENSE,
    Choice,
    Judge,
    LatencyTable,
    Point,
    Settings,
    Space,
    hull,
    ladder,
    pareto_front,
    run,
    search,
)
from cnncomp.search.variants import Variants, swapped, weight_bytes

INT8, HALF, NINE = Choice(int8=True), Choice(0.5), Choice(0.9)
LAYERS = ("stem", "narrow", "wide", "merge", "fc")


def table_of(seconds: dict[str, dict[Choice, float]], rest: float = 0.0) -> LatencyTable:
    """A table in which dense takes what DENSE says and every choice's kernel what is given."""
    kernels = {
        layer: {str(c): {"dense.nchw": row[DENSE], **({} if c == DENSE else {"fast": s})} for c, s in row.items()}
        for layer, row in seconds.items()
    }
    return LatencyTable(kernels, rest)


def even_table(**changed: dict[Choice, float]) -> LatencyTable:
    """Every layer of ConcatNet takes 4 s dense, 2 s in int8, 3 s with half and 1 s with a tenth of its weights."""
    row = {DENSE: 4.0, INT8: 2.0, HALF: 3.0, NINE: 1.0}
    return table_of({layer: changed.get(layer, row) for layer in LAYERS}, rest=1.0)


def images(labels: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(2)]
    return [(x, torch.randint(10, (16,), generator=generator)) for x in found] if labels else list(found)


def find(
    target: Target,
    table: LatencyTable | None = None,
    model: nn.Module | None = None,
    space: Space | None = None,
    data: Any = None,
    **settings: Any,
) -> SearchResult:
    torch.manual_seed(0)
    model = ConcatNet() if model is None else model
    space = Space((INT8, HALF, NINE)) if space is None else space
    tables = {0.0: even_table() if table is None else table}
    data = images() if data is None else data
    settings = {"progress": False, **settings}
    return search(model, data, images()[0], Settings(target, space, **settings), tables=tables, measure=False)


costs = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=4)


@given(st.lists(costs, min_size=1, max_size=3))
def test_the_ladder_is_the_convex_hull_of_all_configurations(rows: list[list[tuple[int, int]]]) -> None:
    layers = [f"l{i}" for i in range(len(rows))]
    choices = [Choice(0.1 * (j + 1)) for j in range(4)]
    seconds = {(n, DENSE): 20.0 for n in layers}
    losses = {}
    for n, row in zip(layers, rows, strict=True):
        for c, (s, loss) in zip(choices, row, strict=False):
            seconds[n, c], losses[n, c] = float(s), float(loss)
    rungs = ladder(layers, choices, lambda n, c: seconds[n, c], losses)

    def totals(config: dict[str, Choice]) -> tuple[float, float]:
        used = [(n, config.get(n, DENSE)) for n in layers]
        return sum(seconds[u] for u in used), sum(losses.get(u, 0.0) for u in used)

    got = [totals(r) for r in rungs]
    assert rungs[0] == {} and got[0] == (20.0 * len(rows), 0.0)
    assert all(a[0] > b[0] and a[1] <= b[1] for a, b in itertools.pairwise(got))
    options = [[DENSE, *(c for c in choices if (n, c) in losses)] for n in layers]
    every = [totals(dict(zip(layers, combination, strict=True))) for combination in itertools.product(*options)]
    for (s1, l1), (s2, l2) in itertools.pairwise(got):  # no configuration lies below a line between two rungs
        for s, loss in every:
            assert (loss - l1) * (s1 - s2) >= (l2 - l1) * (s1 - s) - 1e-6 * (1 + abs(loss))
    assert min(every)[0] == got[-1][0]


def test_the_hull_of_one_layer() -> None:
    a, b, c, d = (Choice(x) for x in (0.1, 0.2, 0.3, 0.4))
    corners = hull([(10.0, 0.0, DENSE), (6.0, 1.0, a), (5.0, 4.0, b), (2.0, 5.0, c), (3.0, 9.0, d)])
    assert [x[2] for x in corners] == [DENSE, a, c]  # b above the line from a to c, d beaten by c


def test_table_seconds() -> None:
    table = table_of({"a": {DENSE: 4.0, HALF: 3.9, NINE: 1.0}, "b": {DENSE: 0.0}}, rest=0.5)
    assert table.seconds("a") == 4.0
    assert table.seconds("a", NINE) == 1.0
    assert table.seconds("a", HALF) == 4.0  # too near to dense: dense runs
    assert table.seconds("a", INT8) == 4.0  # no entry
    assert table.seconds("b", NINE) == 0.0
    assert table.predict({"a": NINE}) == 1.5
    # A slower moment doubles both times of one entry; the ratio counts.
    table.kernels["a"][str(NINE)] = {"dense.nchw": 8.0, "fast": 2.0}
    table.kernels["a"][str(INT8)] = {"dense.nchw": 4.0, "fast": 2.0}
    assert (table.seconds("a"), table.seconds("a", NINE), table.seconds("a", INT8)) == (4.0, 1.0, 2.0)
    again = LatencyTable.from_json(table.to_json())
    assert again == table
    for text in (
        "",
        "{}",
        '{"kernels": 3, "rest": 0, "device": ""}',
        '{"kernels": {"a": {"b": 1}}, "rest": 0, "device": ""}',
    ):
        with pytest.raises(ArgumentError, match="table"):
            LatencyTable.from_json(text)


@pytest.mark.parametrize("labels", [False, True])
def test_the_same_table_gives_the_same_result_which_is_what_it_says(labels: bool) -> None:
    target, data = Target(latency=0.6, accuracy_drop=0.5), images(labels)
    first, second = find(target, data=data), find(target, data=data)
    assert first.to_json() == second.to_json()
    assert first.reached and first.message.startswith("reached")
    assert first.quality == ("accuracy" if labels else "agreement with the dense network")
    config = {layer: next(c for c in (INT8, HALF, NINE) if str(c) == text) for layer, text in first.best.config.items()}
    assert first.best.latency == pytest.approx(even_table().predict(config) / 21)
    assert first.best.latency <= 0.6
    torch.manual_seed(0)
    model = ConcatNet().eval()
    with torch.no_grad():
        x = torch.cat([b[0] for b in data] if labels else data)
        truth = torch.cat([b[1] for b in data]) if labels else model(x).argmax(1)
        got, before = first.model(x).argmax(1), model(x).argmax(1)
    assert first.best.quality == pytest.approx(float((got == truth).float().mean()), abs=1 / 32 + 1e-6)
    assert first.points[0].quality == pytest.approx(float((before == truth).float().mean()), abs=1e-6)
    for name, layer in model.named_modules():
        if name in config and config[name].sparsity:
            zeros = 1 - torch.count_nonzero(first_weight(first.model, name)) / layer.weight.numel()
            assert zeros == pytest.approx(config[name].sparsity, abs=0.01)


def first_weight(model: nn.Module, name: str) -> Tensor:
    layer = next(m for m in model.modules() if getattr(getattr(m, "info", None), "name", None) == name)
    return layer.to_dense().weight


@pytest.mark.parametrize("latency", [0.35, 0.5, 0.62, 0.75, 0.93])
def test_bisection_finds_the_first_rung_that_is_fast_enough(latency: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs: list[dict[str, Choice]] = []
    monkeypatch.setattr(run, "ladder", lambda *a: rungs.extend(ladder(*a)) or rungs)
    monkeypatch.setattr(run, "EXTRA_RUNGS", 2)  # the two ends
    result = find(Target(latency=latency))
    wanted = next(r for r in rungs if even_table().predict(r) <= latency * 21)
    assert len(rungs) > 8
    assert {layer: str(c) for layer, c in wanted.items()} in [p.config for p in result.points]
    assert len(result.points) <= 2 + (len(rungs) - 1).bit_length()


def test_only_layers_that_gain_are_touched() -> None:
    slow = {DENSE: 4.0, INT8: 4.2, HALF: 4.0, NINE: 3.9}
    table = even_table(stem=slow, narrow=slow, fc=slow, merge=slow)
    result = find(Target(latency=0.01), table)
    assert not result.reached
    assert {layer for p in result.points for layer in p.config} == {"wide"}
    assert result.best.config == {"wide": str(NINE)}
    assert "not reached" in result.message and f"{(4 * 4 + 1 + 1) / 21:.2f} of dense" in result.message


def test_a_sensitive_layer_goes_last() -> None:
    torch.manual_seed(0)
    model = ConcatNet()
    with torch.no_grad():
        model.merge.weight *= 1e-3  # what comes from before it is nothing beside its bias
        model.merge.bias.normal_()
    result = find(Target(latency=0.45), model=model)
    assert result.reached and set(result.best.config) == {"stem", "narrow", "wide", "merge"}


def test_a_target_of_accuracy_alone_gives_the_fastest_within_it() -> None:
    for allowed in (0.0, 0.1, 1.0):
        result = find(Target(accuracy_drop=allowed))
        assert result.reached
        assert result.best.drop <= allowed + 1e-9
        assert result.best.latency == min(p.latency for p in result.points if p.drop <= allowed + 1e-9)
    assert set(result.best.config.values()) == {str(NINE)} and len(result.best.config) == 5


def test_what_cannot_be_reached_together_gives_the_fastest_good_one() -> None:
    result = find(Target(latency=0.3, accuracy_drop=0.0))
    assert not result.reached
    assert result.best.drop == 0 and result.best.latency > 0.3
    assert "not reached" in result.message and "the least lost" in result.message
    assert any(p.latency <= 0.3 and p.drop > 0 for p in result.points)


def test_training_after_pruning_and_exclusion() -> None:
    torch.manual_seed(0)
    seen: list[float] = []

    def finetune(model: nn.Module) -> None:
        seen.append(cnncomp.sparsity_of(model).sparsity)
        model.fc.bias.data += 0.0

    result = find(Target(latency=0.3), finetune=finetune, exclude=("stem",), space=Space((NINE,)))
    assert seen and all(s > 0 for s in seen)
    assert all("stem" not in p.config for p in result.points)
    assert len(seen) == sum(bool(p.config) for p in result.points)


def test_channels_are_a_ladder_of_their_own() -> None:
    torch.manual_seed(0)
    table = even_table()
    small = table_of({layer: {DENSE: 1.0, INT8: 0.5} for layer in LAYERS}, rest=1.0)
    space, halves = Space((INT8,), channels=(0.0, 0.5), round_to=4), torch.bfloat16
    settings = Settings(Target(latency=0.2), space, float_dtype=halves, progress=False)
    result = search(ConcatNet(), images(), images()[0], settings, tables={0.0: table, 0.5: small}, measure=False)
    assert result.reached and result.best.channels == 0.5 and result.model.plan.float_dtype == "bfloat16"
    assert result.best.latency == min(p.latency for p in result.points if p.drop == result.best.drop)
    assert {p.channels for p in result.points} == {0.0, 0.5}
    dense_small = next(p for p in result.points if p.channels and not p.config)
    assert dense_small.latency == pytest.approx(6 / 21)
    assert dense_small.bytes < result.points[0].bytes / 2


def test_the_front() -> None:
    points = [
        Point(*p, 0.9, d, 1)
        for p, d in [((1, 1), 0.0), ((0.8, 1), 0.0), ((0.9, 1), 0.1), ((0.5, 1), 0.3), ((0.5, 1), 0.2)]
    ]
    assert pareto_front(points) == [points[1], points[4]]


def test_json_and_picture(tmp_path: Path) -> None:
    result = find(Target(latency=0.5, accuracy_drop=0.3))
    raw = json.loads(result.to_json())
    assert raw["target"] == {"latency": 0.5, "accuracy_drop": 0.3}
    assert len(raw["points"]) == len(result.points) and raw["points"][0]["config"] == {}
    assert [p["latency"] for p in raw["front"]] == sorted((p["latency"] for p in raw["front"]), reverse=True)
    assert result.message in str(result)
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ArgumentError, match="path"):
        result.plot(tmp_path / "front.nosuch")


def test_measured_on_this_device(tmp_path: Path) -> None:
    """The whole way with real times; of them nothing is asked but that they are there."""
    torch.manual_seed(0)
    model, data = ConcatNet(), images(labels=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = cnncomp.compress(
        model, data, example_inputs=data[0][0][:1], target=Target(accuracy_drop=0.2), progress=False
    )
    assert result.reached and result.measured
    assert set(result.tables[0.0].kernels) == set(LAYERS)
    assert all(p.seconds > 0 for p in result.points)
    assert result.points[0].latency == 1.0 and not result.points[0].config
    x, labels = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    cnncomp.save(result.model, tmp_path / "best.cnncomp")
    loaded = cnncomp.load(tmp_path / "best.cnncomp", replan=False)
    for network in (result.model, loaded):
        assert float((network(x).argmax(1) == labels).double().mean()) == pytest.approx(result.best.quality)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("choice", [DENSE, INT8, HALF, NINE])
def test_bytes_are_those_of_the_file(choice: Choice, tmp_path: Path) -> None:
    model = ConcatNet().eval()
    variants = Variants(model, images(), {}, ())
    config = {} if choice == DENSE else dict.fromkeys(variants.names, choice)
    fast = cnncomp.convert(variants.build(config), images()[0], measure=False)
    path = tmp_path / "model.cnncomp"
    cnncomp.save(fast, path)
    stored = sum(t.numel() * t.element_size() for t in contents(unpack(path.read_bytes()))[1].values())
    assert weight_bytes(model, config) == pytest.approx(stored, rel=0.05)


def test_loss_is_the_divergence_and_swapping_restores() -> None:
    torch.manual_seed(0)
    model, data = ConcatNet().eval(), images()
    judge = Judge(model, data, probe=16)
    assert judge.loss(model) == pytest.approx(0, abs=1e-12)
    other = Variants(model, data, {}, ()).uniform(NINE)
    own = model.wide
    with swapped(model, "wide", other.wide), torch.no_grad():
        p = F.softmax(judge.dense[:16].double(), 1)
        expected = F.kl_div(F.log_softmax(model(data[0]).double(), 1), p, reduction="batchmean")
        assert judge.loss(model) == pytest.approx(float(expected), rel=1e-4)
        assert float(expected) > 0
    assert model.wide is own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "at least one"),
        (dict(latency=0), "latency: got 0"),
        (dict(latency=1.5), "latency: got 1.5"),
        (dict(accuracy_drop=-0.1), "accuracy_drop"),
        (dict(accuracy_drop=True), "accuracy_drop"),
    ],
)
def test_targets_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Target(**arguments)


def test_bad_input() -> None:
    target, x = Target(latency=0.5), images()[0]
    with pytest.raises(ArgumentError, match="data: got None"):
        cnncomp.compress(ConcatNet(), None, example_inputs=x, target=target)
    with pytest.raises(ArgumentError, match="recipe: got sparsity 0.5"):
        cnncomp.compress(ConcatNet(), [x], cnncomp.Recipe(sparsity=0.5), example_inputs=x, target=target)
    with pytest.raises(CalibrationError, match="no batches"):
        cnncomp.compress(ConcatNet(), [], example_inputs=x, target=target)
    with pytest.raises(ArgumentError, match="classifier"):
        find(target, model=nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ArgumentError, match="no label per image"):
        find(target, data=[(x, torch.zeros(3, dtype=torch.long))])
    with pytest.raises(ArgumentError, match="tables"):
        search(ConcatNet(), [x], x, Settings(target), measure=False)
    with pytest.raises(ArgumentError, match="channels"):
        Space(channels=(1.0,))
