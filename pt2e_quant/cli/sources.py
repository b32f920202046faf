"""Models and data as a command line names them: files, or functions as module:function.

Python code that is named is run; files are read by torch.export, numpy, safetensors and Pillow, which run nothing.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CalibrationError, CaptureError, FileError, QuantizationError
from ..files import open_file
from ..graph.run import Arguments
from ..lowering.common.entry import quietly
from ..recipes.images import Images
from .images import load_images

__all__ = ["load_data", "load_model"]


def load_model(source: str) -> ExportedProgram:
    """A .pt2 file of torch.export.save; or module:function, which returns an ExportedProgram or (model, inputs).

    Raises:
        CaptureError: there is nothing of the name, it is damaged, or gives something else.
    """
    if ":" in source and not Path(source).exists():
        return _of_function(source)
    try:
        with open_file(source) as file:
            if file.read(2) != b"PK":
                raise CaptureError(f"{source}: this is no file of torch.export.save")
        with quietly():  # torch logs the traceback of a damaged file as a warning
            return torch.export.load(source)
    except FileError as error:
        raise CaptureError(str(error)) from error
    except QuantizationError:
        raise
    except Exception as error:
        raise CaptureError(f"{source}: this file is damaged, or of another torch: {_first_line(error)}") from error


def _of_function(source: str) -> ExportedProgram:
    made = _call(source, CaptureError)
    if isinstance(made, ExportedProgram):
        return made
    if isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], nn.Module):
        model, inputs = made
        if not isinstance(inputs, (tuple, list)):
            raise CaptureError(
                f"{source} returns {type(inputs).__name__} beside the model; example inputs are a tuple: (model, (x,))"
            )
        if model.training:
            raise CaptureError(f"{source} returns a model in training mode: call model.eval() there")
        try:
            with torch.no_grad():
                return torch.export.export(model, tuple(inputs))
        except Exception as error:
            raise CaptureError(f"{source}: torch.export cannot export the model: {_first_line(error)}") from error
    raise CaptureError(f"{source} returns {type(made).__name__}; return an ExportedProgram, or (model, example_inputs)")


def load_data(source: str, exported: ExportedProgram, images: Images | None = None) -> list[Any]:
    """Batches from an .npz or .safetensors file with one array for each input, a folder of images, or module:function.

    An array has the shape of the example input, or more of them along its first dimension, or one dimension more in
    front, which counts batches. What is no tensor in the example inputs stays as it is there. Of one array for one
    input the name does not matter.

    Args:
        source: as the command line names it.
        exported: the model that the data is for.
        images: how files of images become inputs.

    Raises:
        CalibrationError: there is nothing of the name, it is damaged, or does not fit the inputs of the model.
    """
    if ":" in source and not Path(source).exists():
        made = _call(source, CalibrationError)
        if isinstance(made, (Tensor, str)) or not isinstance(made, Iterable):
            raise CalibrationError(f"{source} returns {type(made).__name__}; return batches, such as [(x,), (x,)]")
        with _running(source, CalibrationError):
            return list(made)
    return [_arguments(exported, batch) for batch in _from_disk(source, _inputs(exported), images or Images())]


def _from_disk(source: str, inputs: dict[str, Tensor], images: Images) -> list[dict[str, Tensor]]:
    """Batches, as tensors by the name of the input."""
    if Path(source).is_dir():
        return load_images(source, inputs, images)
    arrays = _arrays(source)
    unknown = ", ".join(sorted(set(arrays) - set(inputs)))
    missing = ", ".join(name for name in inputs if name not in arrays)
    if unknown or missing:
        unnamed = len(inputs) == 1 or all(name.startswith("arr_") for name in arrays)
        if len(arrays) != len(inputs) or not unnamed:
            raise CalibrationError(
                f"{source} has {', '.join(arrays)}; the model takes {', '.join(inputs)}. Name the arrays like these"
            )
        arrays = dict(zip(inputs, (arrays[name] for name in sorted(arrays)), strict=True))
    return _batches(source, arrays, inputs)


def _batches(source: str, arrays: dict[str, Tensor], inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    split = {name: _split(source, name, arrays[name], example) for name, example in inputs.items()}
    counts = {name: len(parts) for name, parts in split.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise CalibrationError(f"{source} has different numbers of batches: {listed}")
    return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]


def _split(source: str, name: str, array: Tensor, example: Tensor) -> list[Tensor]:
    dtype, shape = example.dtype, tuple(example.shape)
    if array.dtype is not dtype:
        raise CalibrationError(f"{source}: {name} is {_words(array)}, the model takes {_words(example)}")
    if array.dim() == len(shape) + 1 and tuple(array.shape[1:]) == shape:
        return list(array)
    if array.dim() == len(shape) and shape and tuple(array.shape[1:]) == shape[1:] and array.shape[0] % shape[0] == 0:
        return list(array.split(shape[0]))
    if tuple(array.shape) == shape:
        return [array]
    raise CalibrationError(f"{source}: {name} is {_words(array)}, the model takes {_words(example)}, or more of them")


def _inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """The example of each input, by name; sizes that vary are those of the export."""
    return {name: value for name, value in _examples(exported) if isinstance(value, Tensor)}


def _examples(exported: ExportedProgram) -> list[tuple[str, Any]]:
    """Every input with its name, flat, in the order of the graph; constants too."""
    signature = exported.graph_signature.user_inputs
    nodes = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
    held: list[Any] = pytree.tree_leaves(exported.example_inputs)
    examples = held if len(held) == len(signature) else [nodes.get(str(name), name) for name in signature]
    return [(str(name), value) for name, value in zip(signature, examples, strict=True)]


def _arguments(exported: ExportedProgram, batch: dict[str, Tensor]) -> Arguments:
    """A batch in the form in which the model takes it: nested, by position or by keyword."""
    leaves = [batch.get(name, example) for name, example in _examples(exported)]
    return Arguments(*pytree.tree_unflatten(leaves, exported.call_spec.in_spec))


def _arrays(source: str) -> dict[str, Tensor]:
    readers: dict[str, Callable[[bytes], dict[str, Tensor]]] = {".npz": _npz, ".safetensors": _safetensors}
    reader = readers.get(Path(source).suffix)
    if reader is None:
        raise CalibrationError(
            f"{source}: data is an .npz or .safetensors file, a folder of images, or module:function"
        )
    try:
        with open_file(source) as file:
            return reader(file.read())
    except FileError as error:
        raise CalibrationError(str(error)) from error
    except Exception as error:
        raise CalibrationError(f"{source}: this file is damaged: {_first_line(error)}") from error


def _npz(content: bytes) -> dict[str, Tensor]:
    import numpy

    with numpy.load(io.BytesIO(content), allow_pickle=False) as held:
        return {name: torch.from_numpy(held[name]) for name in held.files}


def _safetensors(content: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    return dict(load(content))


def _call(source: str, error: type[QuantizationError]) -> Any:
    module, _, name = source.rpartition(":")
    sys.path.insert(0, "")  # the folder that the command runs in
    try:
        with _running(source, error):
            return getattr(importlib.import_module(module), name)()
    finally:
        sys.path.remove("")


@contextmanager
def _running(source: str, error: type[QuantizationError]) -> Iterator[None]:
    """Around code of the user: whatever it raises becomes one line with the place."""
    try:
        yield
    except (Exception, SystemExit) as failure:
        raise error(f"{source}{_place(source, failure)}: {type(failure).__name__}: {_first_line(failure)}") from failure


def _place(source: str, failure: BaseException) -> str:
    """', line 3' of the named module, the last one that ran; '' when none did."""
    file = os.path.join(*source.rpartition(":")[0].split(".")) + ".py"
    lines = [one.lineno for one in traceback.extract_tb(failure.__traceback__) if one.filename.endswith(file)]
    return f", line {lines[-1]}" if lines else ""


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
