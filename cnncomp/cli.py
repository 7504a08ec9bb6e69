"""The command line: ``cnncomp compress | convert | profile | demo | doctor``. A thin skin over the Python functions.

An error of cnncomp's own is one red line on stderr and exit code 2.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from typer.core import TyperGroup

import cnncomp
from cnncomp._modules import resolve_device
from cnncomp.cli_inputs import (
    check_output,
    check_runs,
    load_network,
    parse_shape,
    read_images,
    split,
)
from cnncomp.convert import ConvertedModel
from cnncomp.dispatch import interleaved
from cnncomp.errors import ArgumentError, CnncompError
from cnncomp.progress import track

if TYPE_CHECKING:
    from cnncomp.demo import Outcome


class Group(TyperGroup):
    """Turns errors that a user can do something about into one line and exit code 2. ``--debug`` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (CnncompError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            line = " ".join(part.strip() for part in str(error).splitlines())
            Console(stderr=True).print(
                f"Error: {line}", style="bold red", highlight=False, markup=False, soft_wrap=True
            )
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


class Float(Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[
    str, typer.Option(metavar="MODULE:FUNCTION", help="What returns the network, e.g. cnncomp.models:mobilenet_v2.")
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Its state dict, .pt or .safetensors; left out if MODULE:FUNCTION loads it."),
]
Out = Annotated[Path, typer.Option(metavar="FILE", help="Where to save the converted model.")]
FloatDtype = Annotated[
    Float,
    typer.Option(help="What layers that do not run in int8 may compute in on a GPU; halves round the outputs."),
]
Size = Annotated[int, typer.Option(min=1, help="Height and width of the images the network takes.")]
Channels = Annotated[int, typer.Option(min=1, help="Channels of its input; of images, 3 (RGB) or 1 (grey).")]
Measure = Annotated[bool, typer.Option(help="Time the kernels; otherwise choose by a rule of thumb.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; by default what torch takes.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def main() -> None:
    """Entry point of the ``cnncomp`` script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnncomp {cnncomp.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Make a trained convolutional network smaller and measurably faster."""


@app.command(
    epilog="Example: cnncomp compress --model cnncomp.models:mobilenet_v2 --weights mobilenet_v2.pt --images photos "
    "--out mobilenet_v2.cnncomp"
)
def compress(
    model: Model,
    images: Annotated[Path, typer.Option(metavar="DIR", help="Typical images, a few dozen to a few hundred.")],
    out: Out,
    weights: Weights = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of weights to make zero, without training after it.")] = 0.0,
    pattern: Annotated[
        str, typer.Option(help="Which weights go together: unstructured, 2:4, 64:2:16, 1x4, block16x16, channel, ...")
    ] = "unstructured",
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Solve on the images for what the weights that stay should be; takes minutes. "
            "By default where single weights or blocks of them go.",
        ),
    ] = None,
    int8: Annotated[bool, typer.Option(help="Quantise weights and activations to 8 bit.")] = True,
    method: Annotated[
        str, typer.Option(help=f"How int8 scales are chosen: {', '.join(cnncomp.quantization.METHODS)}.")
    ] = "mse",
    rounding: Annotated[
        str, typer.Option(help="Of int8 weights: nearest, or adaptive, which takes minutes.")
    ] = "nearest",
    float_budget: Annotated[
        float, typer.Option(help="Keep the most sensitive layers float, up to this fraction of the multiplications.")
    ] = 0.0,
    size: Size = 224,
    channels: Channels = 3,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave as they are, e.g. 'features.0*'.")
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Find what to do to each layer for this fraction of the dense latency, e.g. 0.5."),
    ] = None,
    accuracy_drop: Annotated[
        float | None, typer.Option(help="The same, for at most this loss of agreement with the network, e.g. 0.01.")
    ] = None,
    measure: Measure = True,
    float_dtype: FloatDtype = Float.float32,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Prune, quantise and convert a network, save it, and show what was gained.

    Images get ImageNet's preprocessing. They calibrate the quantisation; of ten or more, every fifth is kept out of it
    and used to compare with full precision. To train after pruning, use the Python functions.
    """
    _set_threads(threads)
    check_output("--out", out)
    target = None if latency is None and accuracy_drop is None else cnncomp.Target(latency, accuracy_drop)
    recipe = cnncomp.Recipe(
        sparsity=sparsity,
        pattern=pattern,
        reconstruct=pattern != "channel" and target is None if reconstruct is None else reconstruct,
        int8=int8,
        method=method,
        rounding=rounding,
        float_budget=float_budget,
        exclude=tuple(exclude or ()),
    )
    where = resolve_device(device)
    network = load_network(model, weights).to(where)
    pictures = read_images(images, size, channels).to(where)
    check_runs(network, pictures[:1], "--size and --channels")
    calibration, held_out = split(pictures)
    batches = list(calibration.split(8))
    scored = None if target is None else list(held_out.split(8))
    found = cnncomp.compress(
        network, batches, recipe, example_inputs=pictures[:1], target=target, held_out=scored, measure=measure,
        float_dtype=getattr(torch, float_dtype.value),
    )  # fmt: skip
    if not isinstance(found, ConvertedModel):
        typer.echo(str(found))
        found = found.model
    _finish(network, found, pictures[:1], held_out, out)


@app.command(
    epilog="Example: cnncomp convert --model mynet:build --weights pruned.safetensors --out pruned.cnncomp --size 32"
)
def convert(
    model: Model,
    out: Out,
    weights: Weights = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images to compare with full precision on.")
    ] = None,
    size: Size = 224,
    channels: Channels = 3,
    measure: Measure = True,
    float_dtype: FloatDtype = Float.float32,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Convert a network as it is, e.g. one whose weights are pruned already, save it, and show what was gained."""
    _set_threads(threads)
    check_output("--out", out)
    where = resolve_device(device)
    network = load_network(model, weights).to(where)
    if images is None:
        pictures = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(where)
    else:
        pictures = read_images(images, size, channels).to(where)
    check_runs(network, pictures[:1], "--size and --channels")
    fast = cnncomp.convert(network, pictures[:1], measure=measure, float_dtype=getattr(torch, float_dtype.value))
    _finish(network, fast, pictures[:1], pictures if images is not None else None, out)


@app.command(epilog="Example: cnncomp profile model.cnncomp --shape 8,3,224,224 --json profile.json")
def profile(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What compress, convert or cnncomp.save wrote.")],
    shape: Annotated[
        str | None, typer.Option(metavar="N,C,H,W", help="Shape of the input; by default the one it was converted for.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as JSON too.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV too.")] = None,
    threads: Threads = None,
) -> None:
    """Time a saved model layer by layer, each against the best dense float kernel."""
    _set_threads(threads)
    check_output("--json", json)
    check_output("--csv", csv)
    model = cnncomp.load(file)
    sizes = parse_shape(shape) if shape is not None else _example_shape(model)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(device)
    check_runs(model, x, "--shape")
    report = cnncomp.profile(model, x)
    typer.echo(str(report))
    if json is not None:
        json.write_text(report.to_json())
    if csv is not None:
        csv.write_text(report.to_csv())


@app.command(epilog="Example: cnncomp demo --only digits --json demo.json --plot demo.png")
def demo(
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="mobilenet, digits or resnet; by default all.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    compile: Annotated[bool, typer.Option(help="Time torch.compile too, which takes a minute to compile.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that it runs: little data, rough times.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the saved models in this folder.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as JSON too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the times as a picture too.")] = None,
) -> None:
    """Show on real data what cnncomp does here: accuracy, size on disk, and time against torch. Takes some minutes."""
    from cnncomp.demo import PARTS, run

    check_output("--json", json)
    check_output("--plot", plot)
    parts = tuple(PARTS) if only is None else (only,)
    outcome = run(parts, threads=threads, quick=quick, compile=compile, out=out)
    _write_outcome(outcome, json, plot)
    if outcome.missing:
        raise typer.Exit(2)


def _write_outcome(outcome: Outcome, json: Path | None, picture: Path | None) -> None:
    if json is not None:
        json.write_text(outcome.to_json())
    if picture is not None and outcome.reports:
        from cnncomp.demo.plot import plot

        plot(outcome, picture)


@app.command(epilog="Example: cnncomp doctor")
def doctor() -> None:
    """Say what this machine can run, try every kernel once, and what to install for what is missing."""
    from cnncomp.doctor import examine

    findings = examine()
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.topic, finding.value, style="yellow" if finding.advice else "")
    console = Console()
    console.print(table, highlight=False)
    advised = [finding for finding in findings if finding.advice]
    for finding in advised:
        console.print(
            f"- {finding.topic}: {finding.advice}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )
    if not advised:
        console.print("Nothing is missing.", style="green")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _example_shape(model: ConvertedModel) -> tuple[int, ...]:
    shapes = model.conversion.inputs
    if len(shapes) != 1:
        got = f"a network with {len(shapes)} inputs"
        raise ArgumentError("FILE", got, "one input (cnncomp.profile in Python takes any)")
    return tuple(shapes[0][0])


def _finish(network: nn.Module, fast: ConvertedModel, example: Tensor, pictures: Tensor | None, out: Path) -> None:
    """Save, and print the profile and what was gained over ``network``, for the model as it comes back from the file."""
    cnncomp.save(fast, out)
    loaded = cnncomp.load(out, device=example.device, replan=False)
    typer.echo(str(cnncomp.profile(loaded, example)))
    fns = {"torch": lambda: network(example), "cnncomp": lambda: loaded(example)}
    with torch.inference_mode():
        ms = {k: 1e3 * s for k, s in interleaved(fns, min_rounds=9, budget_s=1.0, cuda=example.is_cuda).items()}
    old_mb, new_mb = state_dict_mb(network), out.stat().st_size / 1e6
    ratio = ms["torch"] / ms["cnncomp"]
    typer.echo(f"time    {ms['torch']:.2f} ms in torch, {ms['cnncomp']:.2f} ms converted: {ratio:.2f}×")
    typer.echo(f"size    {old_mb:.2f} MB of weights, {new_mb:.2f} MB in {out}")
    if pictures is not None:
        typer.echo(f"output  {compare(network, loaded, pictures)}")
    if fast.plan.reason:
        typer.echo(f"note    {fast.plan.reason}")


def state_dict_mb(model: nn.Module) -> float:
    """Bytes of all parameters and buffers, in 10⁶."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6


def compare(network: nn.Module, fast: nn.Module, pictures: Tensor) -> str:
    """One line: how the outputs for ``pictures`` (N, C, H, W) agree."""
    same, worst, classes = 0, 0.0, True
    chunks = pictures.split(8)
    with torch.inference_mode(), track("comparing with full precision", len(chunks)) as advance:
        for chunk in chunks:
            expected, got = network(chunk), fast(chunk)
            if not isinstance(expected, Tensor):
                return "not compared: the network does not return a tensor"
            classes = classes and expected.dim() == 2
            if classes:
                same += int((expected.argmax(1) == got.argmax(1)).sum())
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
            advance("")
    agree = f"same class as full precision on {same} of {len(pictures)} images, " if classes else ""
    return f"{agree}largest deviation {worst:.2%} of the largest value"
