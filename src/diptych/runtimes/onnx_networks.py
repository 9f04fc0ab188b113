"""Make networks of the files of an artifact. What runs a file is a session of some runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput, UnsupportedModel
from diptych.runtimes.network import GENERATOR_NETWORKS, Network, check_wanted, unet_inputs

__all__ = [
    "Floats",
    "OnnxDecoder",
    "OnnxEncoder",
    "OnnxNetwork",
    "OpenSession",
    "Session",
    "explained",
    "open_captioner_files",
    "open_generator_files",
    "unreadable",
]

Floats = NDArray[np.float32]
Kinds = Mapping[str, type[np.generic]]


class Session(Protocol):
    """Run one ONNX file.

    `kinds` are the inputs with the kind of their numbers, `optional` those that may be left out,
    `outputs` the names of what the file gives.
    """

    @property
    def kinds(self) -> Kinds: ...

    @property
    def optional(self) -> Kinds: ...

    @property
    def outputs(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the declared shape of an input or output; 0 stands for a size that varies."""
        ...

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Floats]) -> None:
        """Compute `outputs` in place; all arrays are in C order."""
        ...

    def compute(self, inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[Floats, ...]:
        """Return the outputs in `names`, of sizes that only the run tells."""
        ...


Memory = Literal["kept", "given back", "in pieces"]


class OpenSession(Protocol):
    """Open a file that has the input `needed`.

    What a run works in is `memory`: "kept" for the next, "given back" whole at its end, or taken
    and given back "in pieces" as it goes. Raises `UnsupportedModel` for files that are none of
    ours.
    """

    def __call__(self, path: Path, needed: str, *, memory: Memory) -> Session: ...


def open_captioner_files(
    files: Mapping[str, Path], open_session: OpenSession
) -> dict[str, Network]:
    """Open `encoder` and `decoder`; raises `UnsupportedModel` for files that are none of ours."""
    # The decoder first: loading its head takes room for a moment that the encoder fills for good.
    decoder = OnnxDecoder(open_session(files["decoder"], "input_ids", memory="kept"))
    # It runs once a picture. In pieces, what it works in would never leave the heap.
    encoder = OnnxEncoder(open_session(files["encoder"], "pixel_values", memory="given back"))
    return {"encoder": encoder, "decoder": decoder}


def open_generator_files(
    files: Mapping[str, Path], unet_config: Mapping[str, Any], open_session: OpenSession
) -> dict[str, Network]:
    """Prepare the networks of a generator; each file is opened when it is first needed."""
    networks: dict[str, Network] = {}
    for name, path in files.items():
        inputs, outputs = GENERATOR_NETWORKS[name]
        inputs = {**unet_inputs(unet_config), **inputs} if name.startswith("unet") else inputs
        networks[name] = OnnxNetwork(
            path,
            inputs,
            outputs,
            open_session,
            memory="kept" if name.startswith("unet") else "in pieces",
        )
    return networks


class OnnxEncoder:
    """Turn `pixel_values` [B, C, H, W] into what the decoder takes of the picture."""

    def __init__(self, session: Session) -> None:
        self._session = session
        names = session.outputs
        self.inputs = {"pixel_values": "B C H W"}
        self.outputs = (
            {"prefix_embeds": "B P D"}
            if "prefix_embeds" in names
            else {"cross_key_values": "L 2 B heads P d"}
        )
        self._layers = _count(names, "cross_key_")
        wanted = "prefix_embeds" if "prefix_embeds" in names else "cross_key_0"
        self._shape = self._session.shape(wanted)[1:]

    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        check_wanted(wanted, self.outputs)
        pixels = np.ascontiguousarray(arrays["pixel_values"], np.float32)
        prefix = "prefix_embeds" in self.outputs
        shape = (len(pixels), *self._shape)
        bridged = np.empty(shape if prefix else (self._layers, 2, *shape), np.float32)
        # One by one: a picture is work enough for all cores, and memory does not grow with B.
        for row in range(len(pixels)):
            own = slice(row, row + 1)
            outputs = (
                {"prefix_embeds": bridged[own]}
                if prefix
                else {
                    f"cross_{part}_{layer}": bridged[layer, index, own]
                    for layer in range(self._layers)
                    for index, part in enumerate(("key", "value"))
                }
            )
            self._session.run({"pixel_values": pixels[own]}, outputs)
        return (bridged,)


class OnnxDecoder:
    """Run one step of the decoder; the rows N are B pictures times the beams of each."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._bridge = "prefix_embeds" if "prefix_embeds" in session.kinds else "cross_key_values"
        self.inputs = {
            "input_ids": "N T",
            "past_key_values": "L 2 N heads S d",
            self._bridge: "N P D" if self._bridge == "prefix_embeds" else "L 2 B heads P d",
        }
        self.outputs = {
            "logits": "N V",
            "present_key_values": "L 2 N heads S+T d",
            "image_attention": "N T P",
        }
        self._layers = _count(self._session.outputs, "present_key_")
        _, self._heads, _, self._head_size = self._session.shape("past_key_0")
        self._vocab_size = self._session.shape("logits")[1]
        # Of a picture's keys where there are any: not every runtime infers what is made of them.
        shows = "image_attention" if self._bridge == "prefix_embeds" else "cross_key_0"
        self._image_tokens = self._session.shape(shows)[2]
        self._straight: tuple[Any, Any] = (None, None)

    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        names = check_wanted(wanted, self.outputs)
        input_ids = np.ascontiguousarray(arrays["input_ids"], np.int64)
        rows, words = input_ids.shape
        past = arrays.get("past_key_values")
        if past is None:
            shape = (self._layers, 2, rows, self._heads, 0, self._head_size)
            past = np.empty(shape, np.float32)
        inputs = {"input_ids": input_ids, "look": np.array("image_attention" in names)}
        inputs |= self._split("past", np.ascontiguousarray(past))
        total = past.shape[4] + words
        if self._bridge == "prefix_embeds":
            prefix = arrays.get("prefix_embeds")
            if prefix is None:
                prefix = np.empty((rows, 0, self._heads * self._head_size), np.float32)
            inputs["prefix_embeds"] = np.ascontiguousarray(prefix, np.float32)
            total += prefix.shape[1]
        else:
            inputs |= self._split("cross", self._straighten(arrays["cross_key_values"]))
        shapes = {
            "logits": (rows, self._vocab_size),
            "present_key_values": (self._layers, 2, rows, self._heads, total, self._head_size),
            "image_attention": (rows, words, self._image_tokens),
        }
        made = {name: np.empty(shapes[name], np.float32) for name in names}
        outputs = {name: array for name, array in made.items() if name != "present_key_values"}
        if "present_key_values" in made:
            outputs |= self._split("present", made["present_key_values"])
        self._session.run(inputs, outputs)
        return tuple(made[name] for name in names)

    def _split(self, name: str, whole: Floats) -> dict[str, Floats]:
        """Name the slices of a cache [L, 2, …] as the graph does; nothing is copied."""
        return {
            f"{name}_{part}_{layer}": whole[layer, index]
            for layer in range(self._layers)
            for index, part in enumerate(("key", "value"))
        }

    def _straighten(self, cross: Any) -> Floats:
        """Return `cross_key_values` in C order; gathered pictures come in another one.

        Remembers the last, which is the same array in every step of a caption.
        """
        if cross.flags.c_contiguous:
            straight: Floats = cross
            return straight
        given, straight = self._straight
        if given is not cross:
            straight = np.ascontiguousarray(cross)
            self._straight = (cross, straight)
        return straight


class OnnxNetwork:
    """Run one network of a generator: NumPy float32 in and out, however its weights are stored.

    The file is opened by the first call: who starts from words never waits for the encoder of
    pictures.
    """

    def __init__(
        self,
        path: Path,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        open_session: OpenSession,
        *,
        memory: Memory,
    ) -> None:
        self.inputs, self.outputs = dict(inputs), dict(outputs)
        self._path, self._open_session, self._memory = path, open_session, memory
        self._session: Session | None = None
        self._opening = Lock()

    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        names = check_wanted(wanted, self.outputs)
        session = self._open()
        if missing := [name for name in self.inputs if arrays.get(name) is None]:
            raise BadInput(f"{self._path.name} needs {missing[0]}, which was not given")
        given: dict[str, Any] = {"clip_skip": 0, **arrays}
        if (
            unknown := arrays.keys()
            - session.kinds.keys()
            - session.optional.keys()
            - {"clip_skip"}
        ):
            raise UnsupportedModel(
                f"{self._path} has no input {min(unknown)}: export the model anew, or load it with "
                "runtime='torch'"
            )
        feed = {
            name: np.asarray(given[name], kind, order="C")
            for name, kind in {**session.kinds, **session.optional}.items()
            if name in session.kinds or name in given
        }
        return session.compute(feed, names)

    def _open(self) -> Session:
        with self._opening:
            if self._session is None:
                needed = next(iter(self.inputs))
                self._session = self._open_session(self._path, needed, memory=self._memory)
            return self._session


@contextmanager
def explained(path: Path, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a runtime raises into one sentence with the shapes that were given."""
    try:
        yield
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise BadInput(
            f"{path.name} cannot be run on {shapes[:200]}: {_in_one_line(error)}"
        ) from error


def unreadable(path: Path, error: Exception) -> UnsupportedModel:
    """Return what to raise for a file that a runtime does not open."""
    if isinstance(error, MemoryError) or "bad_alloc" in str(error):
        return UnsupportedModel(f"{path} cannot be run: there is not enough memory to open it")
    return UnsupportedModel(f"{path} cannot be run: {_in_one_line(error)}: export it anew")


def _in_one_line(error: Exception) -> str:
    # OpenVINO tells the places in its own source first, each in a line of its own.
    lines = [line for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return " ".join(" ".join(lines).split())[:300]


def _count(names: Sequence[str], start: str) -> int:
    return sum(name.startswith(start) for name in names)
