"""What a saved file may hold: exact codings, and one typed error for whatever is damaged, foreign or forged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cnncomp
from cnncomp import serialization
from cnncomp._graph_json import FUNCTIONS, METHODS, check_path, decode_value, encode_value
from cnncomp.errors import FileFormatError
from tests.saved_networks import converted


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small int8 network with a shortcut, a max-pool and a bitmap-coded layer."""
    model, _ = converted("sparse-int8")
    path = tmp_path_factory.mktemp("saved") / "model.cnncomp"
    cnncomp.save(model, path)
    return path


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([torch.float16, torch.uint8, torch.channels_last, torch.device("cpu"), Ellipsis]),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.builds(slice, inner, inner, inner),
    max_leaves=8,
)  # fmt: skip


@given(_VALUES)
def test_argument_round_trip(value: Any) -> None:
    text = json.dumps(encode_value(value), allow_nan=False)
    assert repr(decode_value(json.loads(text), {})) == repr(value)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(
        [torch.int8, torch.uint8, torch.float16, torch.float32, torch.float64, torch.bool, torch.int64]
    ),
    zeros=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_bitmaps_are_exact_and_never_larger(shape: list[int], dtype: torch.dtype, zeros: float, seed: int) -> None:
    torch.manual_seed(seed)
    t = (torch.randn(shape) * 100).to(dtype) * (torch.rand(shape) >= zeros).to(dtype)
    if dtype.is_floating_point and t.numel() > 2:
        t.view(-1)[:3] = torch.tensor([-0.0, math.nan, math.inf], dtype=dtype)
    stored, shapes = serialization._take_out_zeros({"w": t})
    back = serialization._put_zeros_back(stored, shapes)["w"]
    assert back.dtype == dtype and back.shape == t.shape
    assert torch.equal(back.view(torch.uint8), t.contiguous().view(torch.uint8)) if t.numel() else True
    assert sum(s.numel() * s.element_size() for s in stored.values()) <= t.numel() * t.element_size()


def _contents(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors, read from the description of the format alone."""
    data = source.read_bytes()
    stored = safetensors.torch.load(data)
    if list(stored) == ["zlib"]:
        data = zlib.decompress(stored["zlib"].numpy().tobytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["model"]), safetensors.torch.load(data)


def _sealed(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    data = safetensors.torch.save(tensors, {"cnncomp": "1", "sha256": "0" * 64, **metadata})
    return data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + hashlib.sha256(data).hexdigest().encode(), 1)


def _resealed(source: Path, edit: Callable[[dict[str, Any]], None], tensors: dict[str, Tensor] | None = None) -> bytes:
    """The file with an edited document and a right checksum."""
    document, stored = _contents(source)
    edit(document)
    return _sealed({"model": json.dumps(document)}, stored if tensors is None else tensors)


def _load_bytes(data: bytes, folder: Path) -> cnncomp.ConvertedModel:
    path = folder / "altered.cnncomp"
    path.write_bytes(data)
    try:
        return cnncomp.load(path, replan=False)
    except FileFormatError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) > len(str(path)) + 10
        raise


def test_compression_is_optional_and_bounded(saved: Path, tmp_path: Path) -> None:
    """A forged stream that is cut off, no zlib, or longer or shorter than it says is a format error."""
    document, tensors = _contents(saved)
    plain = safetensors.torch.save(tensors, {"cnncomp": "1", "model": json.dumps(document)})
    assert saved.stat().st_size < 0.9 * len(plain)
    whole = _load_bytes(saved.read_bytes(), tmp_path)

    def packed(stream: bytes, size: object) -> bytes:
        return _sealed({"size": str(size)}, {"zlib": torch.frombuffer(bytearray(stream), dtype=torch.uint8)})

    stream = zlib.compress(plain)
    for data in (packed(stream, len(plain)), _sealed({"model": json.dumps(document)}, tensors)):
        assert str(_load_bytes(data, tmp_path).plan) == str(whole.plan)
    cut = zlib.compress(plain[:-1])
    for forged in (
        *(packed(stream, n) for n in (len(plain) - 1, len(plain) + 1, 0, -1, "x")),
        *(packed(raw, len(plain)) for raw in (stream[:-5], b"no zlib", stream[:1], cut)),
        packed(zlib.compress(stream), len(stream)),
        packed(cut, len(plain) - 1),
        _sealed({"size": "1"}, tensors),
        _sealed({}, tensors),
    ):
        with pytest.raises(FileFormatError):
            _load_bytes(forged, tmp_path)


def test_any_truncation_is_a_format_error(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for length in [*range(40), *range(40, len(data), len(data) // 60), len(data) - 1]:
        with pytest.raises(FileFormatError, match="truncated|not a file that cnncomp.save wrote"):
            _load_bytes(data[:length], tmp_path)
    with pytest.raises(FileFormatError):
        _load_bytes(data + b"\0", tmp_path)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), value=st.integers(1, 255))
def test_any_altered_byte_is_a_format_error(
    saved: Path, tmp_path: Path, where: float, in_header: bool, value: int
) -> None:
    data = bytearray(saved.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
    data[int(where * end)] ^= value
    with pytest.raises(FileFormatError):
        _load_bytes(bytes(data), tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"PK\x03\x04" + b"\0" * 100, b"\xff" * 50, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]", b"\x20" * 64,
     safetensors.torch.save({"w": torch.zeros(3)}), safetensors.torch.save({"w": torch.zeros(3)}, {"format": "pt"})],
    ids=range(8),
)  # fmt: skip
def test_foreign_file(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="not a file that cnncomp.save wrote|truncated"):
        _load_bytes(data, tmp_path)


def test_newer_version_is_named(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes().replace(b'"cnncomp":"1"', b'"cnncomp":"7"', 1)
    with pytest.raises(FileFormatError, match="format version 7.*reads version 1.*upgrade cnncomp"):
        _load_bytes(data, tmp_path)


def test_resealing_alone_changes_nothing(saved: Path, tmp_path: Path) -> None:
    model, x = converted("sparse-int8")
    assert torch.equal(_load_bytes(_resealed(saved, lambda d: None), tmp_path)(x), model(x))


def _node(document: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in document["graph"] if n["op"] == op)


def _layer(document: dict[str, Any]) -> dict[str, Any]:
    return document["modules"]["conv2.0"]


#: What a forged file must not get past: code in names, calls outside the tables, sizes that do not fit the tensors.
FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "function": lambda d: _node(d, "call_method").update(op="call_function", target="os.system"),
    "dunder method": lambda d: _node(d, "call_method").update(target="__reduce__"),
    "method of a constant": lambda d: _node(d, "call_method").update(target="to", args=["x"]),
    "getattr": lambda d: _node(d, "call_method").update(
        op="call_function", target="builtins.getattr", args=[{"node": "x"}, "__class__"]
    ),
    "node name": lambda d: _node(d, "call_method").update(name="a = __import__('os')"),
    "keyword": lambda d: _node(d, "call_method").update(kwargs={"a=print(1),b": 1}),
    "argument name": lambda d: _node(d, "placeholder").update(target="x, y=print(1)"),
    "argument stars": lambda d: _node(d, "placeholder").update(target="***x"),
    "module path": lambda d: _node(d, "call_module").update(target="a b"),
    "reserved path": lambda d: _node(d, "call_module").update(target="forward"),
    "unknown op": lambda d: _node(d, "call_method").update(op="exec"),
    "unknown node": lambda d: _node(d, "call_method").update(args=[{"node": "nothing"}]),
    "two nodes of one name": lambda d: d["graph"].insert(1, dict(d["graph"][0])),
    "no output": lambda d: d["graph"].pop(),
    "module class": lambda d: _layer(d).update(layer="Module"),
    "torch class": lambda d: d["modules"].update(avgpool={"torch": "Sequential", "config": {}}),
    "torch arguments": lambda d: d["modules"].update(avgpool={"torch": "ReLU", "config": {"inplace": False, "x": 1}}),
    "unknown kernel": lambda d: d.update(plan=d["plan"].replace('_int8"', '_int4"', 1)),
    "stride 0": lambda d: _layer(d)["config"]["geometry"].update(stride=[0, 1]),
    "padding": lambda d: _layer(d)["config"]["geometry"].update(padding=[-1, 1]),
    "dilation": lambda d: _layer(d)["config"]["geometry"].update(dilation="ab"),
    "groups": lambda d: _layer(d)["config"]["geometry"].update(groups=0),
    "channels": lambda d: _layer(d)["config"]["geometry"].update(out_channels=640),
    "scale": lambda d: _layer(d)["config"].update(input=[0.0, "uint8"]),
    "dtype": lambda d: _layer(d)["config"].update(input=[0.1, "float32"]),
    "extra argument": lambda d: _layer(d)["config"].update(more=1),
    "bitmap shape": lambda d: next(iter(d["bitmaps"].values())).append(3),
    "module that is not called": lambda d: d["modules"].update(extra=d["modules"]["avgpool"]),
    "inputs": lambda d: d.update(inputs=[[[1, -1], "float32"]]),
    "input dtype": lambda d: d.update(inputs=[[[1, 1], "Tensor"]]),
    "plan": lambda d: d.update(plan="{}"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_file_is_refused(forgery: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError):
        _load_bytes(_resealed(saved, FORGERIES[forgery]), tmp_path)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    stored = _contents(saved)[1]
    changes: dict[str, Tensor | None] = {
        "conv2.0.bias": torch.zeros(3), "conv2.0.weight:values": None, "extra": torch.zeros(2),
        "conv2.0.weight_scale": -torch.ones(64),
        "conv3.0.weight:mask": torch.zeros(5, dtype=torch.uint8),
    }  # fmt: skip
    for name, value in changes.items():
        changed = {k: v for k, v in stored.items() if k != name} | ({} if value is None else {name: value})
        assert (name in stored) != (name == "extra")
        with pytest.raises(FileFormatError):
            _load_bytes(_resealed(saved, lambda d: None, changed), tmp_path)


def _spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, v in inner for spot in _spots(v, (*path, key)))]


_JUNK = st.sampled_from(
    [None, True, -1, 0, 10**30, 1.5, "", "x", "\0", [], {}, [None], {"node": "x"}, {"tuple": 3}, "nan"]
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), junk=_JUNK, delete=st.booleans())
def test_document_with_junk_loads_or_is_a_format_error(
    saved: Path, tmp_path: Path, where: float, junk: Any, delete: bool
) -> None:
    def edit(document: dict[str, Any]) -> None:
        spots = _spots(document)[1:]
        *path, last = spots[int(where * len(spots))]
        owner: Any = document
        for key in path:
            owner = owner[key]
        if delete:
            del owner[last]
        else:
            owner[last] = junk

    with contextlib.suppress(FileFormatError):
        assert isinstance(_load_bytes(_resealed(saved, edit), tmp_path), cnncomp.ConvertedModel)


def test_tables_hold_functions_of_torch_and_operator_only() -> None:
    own = {name for name in FUNCTIONS if name.startswith("cnncomp.")}
    assert own == {"cnncomp.require_default"}
    for name, function in FUNCTIONS.items() - {(name, FUNCTIONS[name]) for name in own}:
        assert re.fullmatch(r"(torch|torch\.nn\.functional|operator|builtins)\.[a-z0-9_]+", name) and callable(function)
    assert not {m for m in METHODS if m.startswith("_") or not hasattr(Tensor, m)}
    assert "torch.load" not in FUNCTIONS and "operator.methodcaller" not in FUNCTIONS


def test_paths_of_modules() -> None:
    for path in ("conv1", "layer1.0.conv2", "_tensor_constant0", "0"):
        assert check_path(path) == path
    for path in ("", ".", "a..b", "a b", "0x", "class", "a.if", "forward", "a.__class__", "_modules", "graph", "ä", 3):
        with pytest.raises(ValueError):
            check_path(path)
