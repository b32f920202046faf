"""The commands: arguments and help here, what they do in the modules beside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import RecipeError
from ..recipes import find_targets
from ..recipes.targets import load_target
from ..report import Report
from ..testing import check_quantizer
from .bench import bench_files
from .looking import compare_model, rank_layers
from .migrating import migrate_files
from .output import tell
from .quantizing import quantize_model, recipe_of, verify_folder

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, add_completion=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Quantize models for phones, boards and servers, and see what became of each operator.",
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="A .pt2 file of torch.export.save, or module:function.")]
Data = Annotated[
    Optional[str], typer.Option(help="An .npz or .safetensors file, a folder of images, or module:function.")
]
Target = Annotated[Optional[str], typer.Option(help="What for; `pt2e-quant list` names them. Standard: xnnpack.")]
Mode = Annotated[Optional[str], typer.Option(help="static, dynamic, weight_only, or another of the target's.")]
RecipeFile = Annotated[Optional[Path], typer.Option("--recipe", help="A YAML file; options given here override it.")]
Ignore = Annotated[Optional[list[str]], typer.Option(help="A module to leave in float, path or glob. May be repeated.")]
Settings = Annotated[Optional[list[str]], typer.Option("--set", help="name=value, an option of the configuration.")]
Observer = Annotated[Optional[str], typer.Option(help="What watches activations: minmax, histogram, mse, ...")]
Sqnr = Annotated[Optional[float], typer.Option(help="Wanted of the outputs, in dB; the worst operators stay in float.")]
Size = Annotated[Optional[int], typer.Option(help="Bytes of weights at most; each operator gets a format that fits.")]
Latency = Annotated[
    Optional[float], typer.Option(help="Microseconds of a run at most, on this machine; formats are chosen for it.")
]
Seed = Annotated[Optional[int], typer.Option(help="Of torch's random numbers. Standard: 0.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ReportFile = Annotated[Path, typer.Argument(help="A report.json that was saved.")]


@app.command()
def quantize(
    model: Model,
    data: Data = None,
    target: Target = None,
    mode: Mode = None,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("quantized"),
    recipe: RecipeFile = None,
    ignore: Ignore = None,
    set_: Settings = None,
    observer: Observer = None,
    sqnr: Sqnr = None,
    size: Size = None,
    latency: Latency = None,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Quantize a model and write artefact, report, recipe and manifest.

    Example: pt2e-quant quantize model.pt2 --data inputs.npz --target xnnpack
    """
    given = {"target": target, "mode": mode, "ignored": tuple(ignore or ()), "observer": observer}
    budgets = {"sqnr": sqnr, "size": size, "latency": latency}
    quantize_model(model, data, out, recipe_of(recipe, given | budgets | {"seed": seed}, set_ or []), json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="That `quantize` or Quantized.save wrote.")],
    model: Annotated[Optional[str], typer.Option(help="Where the model is now.")] = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """Check that the files of a folder belong together, and make the artefact again: the bytes must be the same.

    Example: pt2e-quant verify quantized
    """
    verify_folder(folder, model, data, json)


@app.command()
def explain(
    report: ReportFile,
    name: Annotated[Optional[str], typer.Argument(help="A node or a module.")] = None,
    json: Json = False,
) -> None:
    """Show a saved report; or say what became of one node, or of all inside one module.

    Example: pt2e-quant explain quantized/report.json layer1.0
    """
    found = Report.load(report)
    if name is not None:
        why = found.why(name)
        tell({"why": why}, why, json)
    elif json:
        tell(found.to_dict(), "", json)
    else:
        found.show()


@app.command()
def compare(
    model: Model,
    data: Data = None,
    target: Target = None,
    mode: Mode = None,
    recipe: RecipeFile = None,
    set_: Settings = None,
    json: Json = False,
) -> None:
    """Quantize a model and hold every tensor against the float model's: own and inherited error, the worst first.

    Example: pt2e-quant compare model.pt2 --data inputs.npz --target x86
    """
    compare_model(model, data, recipe_of(recipe, {"target": target, "mode": mode}, set_ or []), json)


@app.command()
def sensitivity(
    model: Model,
    data: Data = None,
    target: Target = None,
    mode: Mode = None,
    recipe: RecipeFile = None,
    set_: Settings = None,
    json: Json = False,
) -> None:
    """Rank the layers by what quantizing each of them alone does to the outputs, from one backward run.

    Example: pt2e-quant sensitivity model.pt2 --data inputs.npz --target onnx
    """
    rank_layers(model, data, recipe_of(recipe, {"target": target, "mode": mode}, set_ or []), json)


@app.command()
def bench(
    model: Model,
    files: Annotated[list[Path], typer.Argument(help="Artefacts: .pte, .onnx, .pt2.")],
    data: Annotated[str, typer.Option(help="Inputs, as `quantize` takes them; the first batch is timed.")],
    runs: Annotated[int, typer.Option(min=1, help="How often each is run; they take turns.")] = 20,
    recipe: Annotated[Optional[Path], typer.Option(help="How images become inputs, as `quantize` was told.")] = None,
    json: Json = False,
) -> None:
    """Time artefacts beside the float model, on this machine: size, median of runs, speed, agreement.

    Example: pt2e-quant bench model.pt2 quantized/model.pte --data inputs.npz
    """
    images = None if recipe is None else recipe_of(recipe, {}, []).images
    bench_files(model, files, data, runs, images, json)


@app.command("check-quantizer")
def check_quantizer_(
    name: Annotated[str, typer.Argument(help="Of a target, see `pt2e-quant list`.")],
    mode: Annotated[str, typer.Option(help="Of the target.")] = "static",
    json: Json = False,
) -> None:
    """Check that a quantizer keeps the contract, on small models; ends with 1 when it does not.

    Example: pt2e-quant check-quantizer xnnpack --mode dynamic
    """
    target = load_target(name)
    recipe = recipe_of(None, {"target": name, "mode": mode}, [])
    found = check_quantizer(target.quantizer().set_global(recipe.configuration()))
    text = "\n".join(map(str, found)) or f"{name}, {mode}: no rule is broken"
    tell([vars(finding) for finding in found], text, json)
    if found:
        raise typer.Exit(1)


@app.command()
def migrate(
    paths: Annotated[list[Path], typer.Argument(help="Python files, and folders of them.")],
    write: Annotated[bool, typer.Option("--write", help="Write the files after showing the changes.")] = False,
    json: Json = False,
) -> None:
    """Rewrite imports of torch.ao.quantization and the other old roots; ends with 1 when something is left to do.

    Example: pt2e-quant migrate src --write
    """
    if not migrate_files(paths, write, json):
        raise typer.Exit(1)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the targets with their modes, and the quantizer of each.

    Example: pt2e-quant list
    """
    found = {name: {"quantizer": value, "modes": _modes(name)} for name, value in find_targets().items()}
    lines = [f"{name}\t{', '.join(one['modes']) or '-'}\t{one['quantizer']}" for name, one in found.items()]
    tell(found, "\n".join(lines), json)


def _modes(name: str) -> list[str]:
    try:
        return list(load_target(name).modes)
    except RecipeError:  # it has none, so it is configured in Python
        return []
