"""Run the ONNX files of an artifact in OpenVINO. Knows neither torch nor onnx."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import openvino
from openvino.frontend import FrontEnd, FrontEndManager

from diptych.errors import BadInput, UnsupportedModel
from diptych.runtimes import onnx_networks
from diptych.runtimes.cores import available_cores
from diptych.runtimes.network import STYLE_INPUTS, Network
from diptych.runtimes.onnx_networks import Floats, Memory, explained, unreadable
from diptych.weights.files import is_inside

__all__ = ["OpenVinoSession", "check_dtype", "open_artifact", "open_generator_files"]

_KINDS: Mapping[str, type[np.generic]] = {"boolean": np.bool_, "f32": np.float32, "i64": np.int64}
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


def open_artifact(files: Mapping[str, Path], dtype: str) -> dict[str, Network]:
    """Open `encoder` and `decoder`; raises `UnsupportedModel` for files that are none of ours."""
    return onnx_networks.open_captioner_files(files, partial(OpenVinoSession, dtype=dtype))


def open_generator_files(
    files: Mapping[str, Path], unet_config: Mapping[str, Any], dtype: str
) -> dict[str, Network]:
    """Prepare the networks of a generator; each file is opened when it is first needed."""
    open_session = partial(OpenVinoSession, dtype=dtype)
    return onnx_networks.open_generator_files(files, unet_config, open_session)


def check_dtype(dtype: str) -> str:
    """Return what to compute in: float32 for auto, so that no word depends on the processor.

    OpenVINO itself would take bfloat16 where the processor has it. Raises `BadInput` for bfloat16
    where it has not, and for what OpenVINO does not offer here.
    """
    if dtype == "auto":
        return "float32"
    if dtype not in _HINTS:
        raise BadInput(f"dtype is {dtype!r}: in OpenVINO give auto, float32 or bfloat16")
    capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == "bfloat16" and "BF16" not in capabilities:
        raise BadInput("dtype is 'bfloat16', which this processor does not compute in: give auto")
    return dtype


class OpenVinoSession:
    """Run one ONNX file, as `Session` says.

    The file is compiled when it is opened, and nothing of that is kept on disk. Calls from several
    threads wait for one another.
    """

    def __init__(self, path: Path, needed: str, *, memory: Memory, dtype: str) -> None:
        self._path, self._needed = path, needed
        self._keep_memory, self._dtype = memory == "kept", dtype
        self._lock = Lock()
        model = self._read()
        self.kinds = {each.any_name: _kind(each) for each in model.inputs}
        self.outputs = tuple(each.any_name for each in model.outputs)
        if needed not in self.kinds:
            raise UnsupportedModel(f"{path} has no input {needed}: it was not exported by diptych")
        self._defaults = _free_constants(model)
        self.optional = {name: array.dtype.type for name, array in self._defaults.items()}
        self._words, self._places = _vocabulary_size(model), _position_count(model)
        self._shapes = {each.any_name: _sizes(each) for each in (*model.inputs, *model.outputs)}
        self._runs = {False: self._compile(model, look=False)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the declared shape of an input or output; 0 stands for a size that varies."""
        if name not in self._shapes:
            raise UnsupportedModel(f"{self._path} has no {name}: it was not exported by diptych")
        return self._shapes[name]

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Floats]) -> None:
        """Compute `outputs` in place; all arrays are in C order."""
        with explained(self._path, inputs), self._lock:
            if empty := [name for name, array in outputs.items() if not array.size]:
                raise ValueError(f"{empty[0]} would have no numbers")
            self._infer(inputs, outputs, ())

    def compute(self, inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[Floats, ...]:
        """Return the outputs in `names`, of sizes that only the run tells."""
        with explained(self._path, inputs), self._lock:
            return self._infer(inputs, {}, names)

    def _infer(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Floats], names: Sequence[str]
    ) -> tuple[Floats, ...]:
        self._check_rows(inputs)
        self._check_words(inputs)
        look = bool(inputs.get("look", False))
        if look not in self._runs:
            self._runs[look] = self._compile(self._read(), look=look)
        given = {name: array for name, array in inputs.items() if name != "look"}
        return self._runs[look]({**self._defaults, **given}, outputs, names)

    def _check_rows(self, inputs: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless all inputs are for as many rows, or for pictures of theirs.

        OpenVINO does not compare all shapes, and reads beyond the ends of arrays.
        """
        given = {name: array for name, array in inputs.items() if array.ndim}
        rows = len(given[self._needed])
        for name, array in given.items():
            if name in self._defaults:
                fits = array.shape[-1] in (1, rows)
            elif name.startswith("cross_"):
                fits = len(array) > 0 and rows % len(array) == 0
            else:
                fits = len(array) == rows
            if not fits:
                raise ValueError(f"{name} is not for the {rows} rows of {self._needed}")

    def _check_words(self, inputs: Mapping[str, Any]) -> None:
        """Raise `ValueError` for ids that are no words, and more of them than there are places."""
        ids = inputs.get("input_ids")
        if ids is None or not ids.size:
            return
        if self._words and (ids.min() < -self._words or ids.max() >= self._words):
            raise ValueError(f"input_ids are {ids.min()} to {ids.max()}, of {self._words} words")
        taken = ids.shape[1]
        for name, axis in (("past_key_0", 2), ("prefix_embeds", 1)):
            taken += inputs[name].shape[axis] if name in inputs else 0
        if self._places and taken > self._places:
            raise ValueError(f"{taken} words and image tokens are more than {self._places} places")

    def _read(self) -> openvino.Model:
        try:
            with _without_links(self._path) as path:
                return _reader().convert(_reader().load(str(path)))
        except Exception as error:  # openvino raises RuntimeError, or what its bindings raise
            raise unreadable(self._path, error) from error

    def _compile(self, model: openvino.Model, *, look: bool) -> _Run:
        _decide(model, look=look)
        try:
            compiled = _core().compile_model(model, "CPU", _settings(self._dtype))
        except Exception as error:
            raise unreadable(self._path, error) from error
        return _Run(compiled, keep_memory=self._keep_memory)


@contextmanager
def _without_links(path: Path) -> Iterator[Path]:
    """Give a graph to read; where links lie beside it, as in the Hub's cache, its double of files.

    OpenVINO follows no link to weights. What is mapped stays when the double is gone.
    """
    folder = path.parent
    files = [each for each in folder.rglob("*") if each.is_file()]
    if not any(each.is_symlink() for each in files):
        yield path
        return
    with TemporaryDirectory(prefix=".diptych.", dir=_room_beside(path)) as made:
        for each in files:
            if not is_inside(each, folder):
                continue
            target = Path(made) / each.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.hardlink_to(each.resolve())
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(each, target)
        yield Path(made) / path.name


def _room_beside(path: Path) -> Path | None:
    """Return the folder where the file really lies, None where nothing can be put there."""
    folder = path.resolve().parent
    return folder if os.access(folder, os.W_OK) else None


class _Run:
    """Call a compiled model with the caller's arrays, without copying them."""

    def __init__(self, compiled: openvino.CompiledModel, *, keep_memory: bool) -> None:
        self._compiled, self._keep_memory = compiled, keep_memory
        self._request = compiled.create_infer_request()
        self._bound: frozenset[str] = frozenset()

    def __call__(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Floats], names: Sequence[str]
    ) -> tuple[Floats, ...]:
        """Compute `outputs` in place; return copies of the outputs in `names`."""
        if outputs.keys() != self._bound:
            # A request goes on writing to what it was given, and that is the caller's.
            self._request = self._compiled.create_infer_request()
            self._bound = frozenset(outputs)
        for name, array in {**inputs, **outputs}.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        self._request.infer()
        found = tuple(self._request.get_tensor(name).data.copy() for name in names)
        if not self._keep_memory:
            self._compiled.release_memory()
        return found


@cache
def _core() -> openvino.Core:
    return openvino.Core()


@cache
def _reader() -> FrontEnd:
    # By itself OpenVINO tries its readers of every other format on a file that is no ONNX.
    return FrontEndManager().load_by_framework("onnx")


def _settings(dtype: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        # float32 means products of float32: activations are not rounded to 8 bits.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": available_cores(),
        "NUM_STREAMS": 1,
        # Threads tied to cores wait for whatever else runs there.
        "ENABLE_CPU_PINNING": False,
    }


def _free_constants(model: openvino.Model) -> dict[str, Any]:
    """Make inputs of the constants in the place of `STYLE_INPUTS`; return their values by name."""
    values = {}
    for constant in model.get_ops():
        name = constant.get_friendly_name()
        if constant.get_type_name() != "Constant" or name not in STYLE_INPUTS:
            continue
        values[name] = np.array(constant.data)
        shape = openvino.PartialShape([*values[name].shape[:-1], -1])
        made = openvino.op.Parameter(constant.get_element_type(), shape)
        made.output(0).set_names({name})
        constant.output(0).replace(made.output(0))
        model.add_parameters([made])
    model.validate_nodes_and_infer_types()
    return values


def _decide(model: openvino.Model, *, look: bool) -> None:
    """Answer the input `look`, if there is one: OpenVINO does not compile the If that asks for it.

    Its branch takes the place of the If, or its output is left out.
    """
    for node in [each for each in model.get_ops() if each.get_type_name() == "If"]:
        if look:
            _inline(node)
            continue
        for result in model.get_results():
            if result.input_value(0).get_node().get_friendly_name() == node.get_friendly_name():
                model.remove_result(result)
    for parameter in model.get_parameters():
        if parameter.output(0).any_name == "look":
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _inline(node: Any) -> None:
    """Put what an If does when it is true in its place."""
    body = node.get_function(0)
    parameters, results = body.get_parameters(), body.get_results()
    for each in node.get_input_descriptions(0):
        outer = node.input_value(each.input_index)
        parameters[each.body_parameter_index].output(0).replace(outer)
    for each in node.get_output_descriptions(0):
        made = results[each.body_value_index].input_value(0)
        node.output(each.output_index).replace(made)


def _vocabulary_size(model: openvino.Model) -> int:
    """Return the number of rows that `input_ids` are looked up in; 0 where there are none."""
    for node in model.get_ops():
        if node.get_type_name() == "Gather" and _comes_from(node.input_value(1), "input_ids"):
            return _sizes(node.input(0))[0]
    return 0


def _position_count(model: openvino.Model) -> int:
    """Return the rows of the table whose first ones are for words; 0 where there is none."""
    for node in model.get_ops():
        if node.get_type_name() != "Slice":
            continue
        table = node.input_value(0)
        if table.get_node().get_type_name() in ("Constant", "Convert"):
            return _sizes(table)[0]
    return 0


def _comes_from(value: openvino.Output, name: str) -> bool:
    node = value.get_node()
    if node.get_type_name() == "Convert":
        return _comes_from(node.input_value(0), name)
    return node.get_type_name() == "Parameter" and name in value.get_names()


def _kind(port: openvino.Output) -> type[np.generic]:
    return _KINDS.get(port.element_type.get_type_name(), np.float32)


def _sizes(port: openvino.Output | openvino.Input) -> tuple[int, ...]:
    """Return the sizes of a shape; 0 for what varies without end."""
    node = port.get_node()
    if node.get_type_name() == "Result" and node.input_value(0).get_node().get_type_name() == "If":
        # The branch in which there is nothing has another rank.
        port = node.input_value(0).get_node().get_function(0).get_results()[0].input_value(0)
    return tuple(max(0, size.get_max_length()) for size in port.get_partial_shape())
