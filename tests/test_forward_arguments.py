"""What a forward may take: optional, keyword and nested arguments, before and after convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cnncomp
from cnncomp.errors import ArgumentError
from cnncomp.nn import ConvertedLayer

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class OptionalArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, shift: float = 0.0, *, feat: bool = False
    ) -> Tensor:
        y = self.conv(x) * scale
        if mask is not None:
            y = y * mask
        return y if feat else self.last(y) + shift


@pytest.fixture(params=[False, True], ids=["converted", "loaded"])
def fast(request: pytest.FixtureRequest, tmp_path: Path) -> cnncomp.ConvertedModel:
    model = cnncomp.convert(OptionalArguments().eval(), X, measure=False)
    assert not model.conversion.kept
    if request.param:
        cnncomp.save(model, tmp_path / "model")
        model = cnncomp.load(tmp_path / "model")
    return model


def test_what_nothing_branches_on_stays_free(fast: cnncomp.ConvertedModel) -> None:
    convs = [fast.network.get_submodule(name) for name in ("conv", "last")]

    def expected(scale: float, shift: float) -> Tensor:
        return convs[1](convs[0](X) * scale) + shift

    for got, want in (
        (fast(X), expected(1, 0)), (fast(X, scale=2.0), expected(2, 0)), (fast(X, None, 2.0, 3.0), expected(2, 3)),
        (fast(X, shift=3.0), expected(1, 3)), (fast(X, mask=None, feat=False), expected(1, 0)), (fast(x=X), expected(1, 0)),
    ):  # fmt: skip
        torch.testing.assert_close(got, want)


def test_what_was_fixed_takes_no_other_value(fast: cnncomp.ConvertedModel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match="mask: got a Tensor, expected None: the forward branches on it"):
        fast(X, torch.ones(1))
    with pytest.raises(ArgumentError, match="mask: got a Tensor"):
        fast(X, mask=torch.ones(1))
    with pytest.raises(ArgumentError, match="feat: got True, expected False"):
        fast(X, feat=True)


def test_convert_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    cnncomp.convert(OptionalArguments().eval(), X, measure=False)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_compiled_and_exported() -> None:
    fast = cnncomp.convert(OptionalArguments().eval(), X, measure=False)
    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X, scale=2.0), fast(X, scale=2.0))
        torch.testing.assert_close(torch.export.export(fast, (X,)).module()(X), fast(X))


class Keywords(nn.Module):
    """Calls its layers by keyword; with ``branch``, in code that can't be traced."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.a, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() > 1e9:
            x = -x
        return self.block(input=self.norm(input=self.a(input=x)))


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_layers_called_by_keyword_are_converted(branch: bool, quantized: bool) -> None:
    model = Keywords(branch).eval()
    if quantized:
        cnncomp.quantize(model, [X], progress=False)
    fast = cnncomp.convert(model, X, measure=False)
    assert {m.info.name for m in fast.modules() if isinstance(m, ConvertedLayer)} == {"a", "block.0"}
    assert any(isinstance(m, nn.BatchNorm2d) for m in fast.modules()) == branch
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=0.1 if quantized else 1e-4, atol=0.1 if quantized else 1e-5)


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * 2).clip(-0.5, 0.5).bfloat16()


def test_save_knows_common_methods(tmp_path: Path) -> None:
    fast = cnncomp.convert(Methods().eval(), X, measure=False)
    cnncomp.save(fast, tmp_path / "model")
    assert torch.equal(cnncomp.load(tmp_path / "model")(X), fast(X))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, images: list[Tensor], more: dict[str, Tensor]) -> Tensor:
        return self.a(images[0]) + self.b(images[1]) * more["scale"]


def test_inputs_in_lists_and_dictionaries() -> None:
    model, inputs = Nested().eval(), ([X, X + 1], {"scale": torch.ones(1)})
    fast = cnncomp.convert(model, inputs, measure=False)
    assert {m.info.name for m in fast.modules() if isinstance(m, ConvertedLayer)} == {"a", "b"}
    for args in (inputs, ([X[:1], X[1:]], {"scale": torch.full((1,), 3.0)}), inputs, inputs):
        with torch.no_grad():
            torch.testing.assert_close(fast(*args), model(*args), rtol=1e-4, atol=1e-5)
    assert cnncomp.profile(fast, inputs, progress=False).layers


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, image: Tensor, gain: Tensor) -> Tensor:
        return self.conv(image) * gain


class TakesOne(Named):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.conv(batch["image"]) * batch["gain"]


@pytest.mark.parametrize("make", [Named, TakesOne])
def test_a_mapping_names_the_arguments_or_is_one(make: type[Named]) -> None:
    model, given = make().eval(), {"gain": torch.tensor(2.0), "image": X}
    fast = cnncomp.convert(model, given, measure=False)
    assert isinstance(fast.network.get_submodule("conv"), ConvertedLayer)
    call = {"batch": given} if make is TakesOne else given
    torch.testing.assert_close(fast(**call), model(**call))
    assert [row.name for row in cnncomp.profile(fast, given, progress=False).layers] == ["conv"]


def test_a_mapping_may_leave_out_optional_arguments() -> None:
    model = OptionalArguments().eval()
    given = {"x": X, "shift": torch.ones(1)}
    fast = cnncomp.convert(model, given, measure=False)  # type: ignore[arg-type]
    assert not fast.conversion.kept
    torch.testing.assert_close(fast(X, None, 1.0, torch.ones(1)), model(**given))  # type: ignore[arg-type]
    torch.testing.assert_close(fast(**given), model(**given))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="mask: got a Tensor"):
        fast(X, torch.ones(1), 1.0, torch.ones(1))


class KeywordOnly(Named):
    def forward(self, *, image: Tensor) -> Tensor:  # type: ignore[override]
        return self.conv(image)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (Named(), {"image": X, "gian": X}, r"\('gian' no parameter; 'gain' missing\).*\['image', 'gain'\]"),
        (Named(), {"image": X}, "'gain' missing"),
        (KeywordOnly(), {"image": X}, "'image' keyword-only"),
        (OptionalArguments(), {"x": X, "feat": True}, "'feat' keyword-only"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(model: nn.Module, given: dict[str, object], message: str) -> None:
    for call in (cnncomp.convert, cnncomp.profile, cnncomp.channels_of):
        with pytest.raises(ArgumentError, match=message):
            call(model.eval(), given)
