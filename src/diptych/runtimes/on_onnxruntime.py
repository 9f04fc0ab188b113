"""Run the ONNX files of an artifact in ONNX Runtime. Knows neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from diptych.errors import UnsupportedModel
from diptych.runtimes import onnx_networks
from diptych.runtimes.cores import available_cores
from diptych.runtimes.network import Network
from diptych.runtimes.onnx_networks import Floats, Memory, explained, unreadable

__all__ = ["OnnxSession", "open_artifact", "open_generator_files"]

_ERRORS_ONLY = 3
_KINDS: Mapping[str, type[np.generic]] = {
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
}


def open_artifact(files: Mapping[str, Path]) -> dict[str, Network]:
    """Open `encoder` and `decoder`; raises `UnsupportedModel` for files that are none of ours."""
    return onnx_networks.open_captioner_files(files, OnnxSession)


def open_generator_files(
    files: Mapping[str, Path], unet_config: Mapping[str, Any]
) -> dict[str, Network]:
    """Prepare the networks of a generator; each file is opened when it is first needed."""
    return onnx_networks.open_generator_files(files, unet_config, OnnxSession)


class OnnxSession:
    """Run one ONNX file in ONNX Runtime, as `Session` says.

    `weights` stand in place of those in the file that have their names.
    """

    def __init__(
        self,
        path: Path,
        needed: str,
        *,
        memory: Memory,
        weights: Mapping[str, Floats] | None = None,
    ) -> None:
        options = _options()
        # The runtime borrows them: they live as long as it does.
        self._weights = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in (weights or {}).items()
        }
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        options.enable_cpu_mem_arena = memory != "in pieces"
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                # Fusing a sum with its norm takes four times as long as the two alone.
                disabled_optimizers=["SkipLayerNormFusion"],
            )
        except Exception as error:  # onnxruntime has a dozen classes for it, under Exception
            raise unreadable(path, error) from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.kinds = {each.name: _kind(each) for each in inputs}
        self.optional = {
            each.name: _kind(each) for each in self._session.get_overridable_initializers()
        }
        self.outputs = tuple(each.name for each in outputs)
        self._shapes = {each.name: tuple(each.shape) for each in (*outputs, *inputs)}
        if needed not in self.kinds:
            raise UnsupportedModel(f"{path} has no input {needed}: it was not exported by diptych")
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = _ERRORS_ONLY
        if memory == "given back":
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._path = path

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the declared shape of an input or output; 0 stands for a size that varies."""
        if name not in self._shapes:
            raise UnsupportedModel(f"{self._path} has no {name}: it was not exported by diptych")
        return tuple(size if isinstance(size, int) else 0 for size in self._shapes[name])

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Floats]) -> None:
        """Compute `outputs` in place; all arrays are in C order."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in outputs.items():
            address = array.ctypes.data
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, address)
        with explained(self._path, inputs):
            self._session.run_with_iobinding(binding, self._run_options)

    def compute(self, inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[Floats, ...]:
        """Return the outputs in `names`, of sizes that only the run tells."""
        with explained(self._path, inputs):
            return tuple(self._session.run([*names], {**inputs}, self._run_options))


def _kind(value: Any) -> type[np.generic]:
    return _KINDS.get(value.type, np.float32)


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = _ERRORS_ONLY
    # A plan of memory for every shape that was ever seen: captions have one for each word.
    options.enable_mem_pattern = False
    # Two sessions take turns: without this, the threads of the one that has just run keep a core
    # busy while the other works (a third of the time of a caption on two cores).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
