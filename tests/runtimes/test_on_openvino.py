"""The same ONNX files in OpenVINO: what torch and ONNX Runtime give, and nothing hostile."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import nn

import diptych
from diptych import Captioner, ImageGenerator
from diptych.errors import BadInput, MissingExtra, UnsupportedModel
from diptych.models import unet
from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.runtimes import network, on_onnxruntime, on_openvino
from diptych.runtimes.agreement import compare_tensors, compare_tokens, greedy_tokens, pictures_for
from diptych.runtimes.export_generator import write_networks
from diptych.runtimes.network import STYLE_INPUTS, open_networks
from diptych.runtimes.on_openvino import OpenVinoSession, check_dtype
from diptych.runtimes.on_torch import torch_networks
from diptych.runtimes.on_torch_generator import generator_networks
from diptych.weights.files import describe
from tiny_models import make_captioner, make_photo
from tiny_pipelines import FAMILIES, make_pipeline

Make = Callable[..., Any]

EMBEDDED = Path(diptych.__file__).parent / "weights" / "embedded"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # What diffusers 0.42 makes NumPy say.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a captioner that transformers saved, and that of its ONNX files."""
    home = tmp_path_factory.mktemp("captioner")
    make_captioner(home / "checkpoint", 3)
    diptych.export(home / "checkpoint", home / "artifact", measure=False)
    return home / "checkpoint", home / "artifact"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a finder: the folder that diffusers saved, and that of its ONNX files."""
    home = tmp_path_factory.mktemp("pipelines")

    def find(family: str) -> tuple[Path, Path]:
        checkpoint, artifact = home / family, home / f"{family}-onnx"
        if not artifact.exists():
            make_pipeline(checkpoint, family, FAMILIES.index(family))  # type: ignore[arg-type]
            diptych.export(checkpoint, artifact, measure=False)
        return checkpoint, artifact

    return find


def open_file(path: Path, needed: str = "pixel_values") -> OpenVinoSession:
    return OpenVinoSession(path, needed, memory="in pieces", dtype="float32")


def make_modules(kind: str) -> dict[str, nn.Module]:
    torch.manual_seed(5)
    sdxl = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8}
    changes: dict[str, Any] = {"plain": {}, "sdxl": sdxl, "lcm": {"time_cond_proj_dim": 12}}[kind]
    # Wide enough that weights are stored smaller where they are to be.
    wide = {"block_out_channels": (64, 96), "norm_num_groups": 32}
    made: dict[str, nn.Module] = {
        "text_encoder": ClipText(ClipTextConfig.tiny()),
        "unet": UNet(dataclasses.replace(UNetConfig.tiny(), **wide, **changes)),
        "vae": Vae(VaeConfig.tiny()),
    }
    for module in made.values():
        for parameter in module.eval().parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def unet_arrays(
    config: UNetConfig, rows: int, size: tuple[int, int], length: int
) -> dict[str, Any]:
    given = {
        "latents": noise(rows, config.in_channels, *size),
        "timestep": np.linspace(0, 999, rows).astype(np.float32),
        "encoder_hidden_states": noise(rows, length, config.cross_attention_dim),
        "text_embeds": noise(rows, 24),
        "time_ids": np.array([[1024, 768, 0, 16, 1024, 1000]] * rows, np.float32),
        "timestep_cond": noise(rows, 12),
    }
    return {name: given[name] for name in config.inputs}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.square(one.astype(float) - other.astype(float)).mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


# --- captioners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["cross-attention", "prefix", "stem", "odd"])
def test_captioners_compute_what_the_modules_compute(
    artifacts: Make, module: Make, pictures: Make, variant: str
) -> None:
    """Encoder, prefill, a step with the cache, and the attention to the picture."""
    model = describe(artifacts(variant) / "fp32")
    opened = open_networks(model, "openvino")
    picture = pictures(1)[0]
    for expected in (torch_networks(module(variant)), open_networks(model, "onnxruntime")):
        found = compare_tensors(expected, opened, picture, model.config, model.generation)
        worst = {name: value for each in found.values() for name, value in each.items()}
        assert worst.pop("image_attention") < 1e-5
        assert max(worst.values()) < 2e-4, worst
    for name, each in open_networks(model, "onnxruntime").items():
        assert (opened[name].inputs, opened[name].outputs) == (each.inputs, each.outputs)


def test_bytes_give_the_words_of_onnxruntime() -> None:
    """The default captioner is in int8: ONNX Runtime rounds what it multiplies, too."""
    model = describe(EMBEDDED / "captioner")
    assert model.precision == "int8"
    images = pictures_for(model.config, model.preprocessing, None, 40)
    captions = [
        greedy_tokens(open_networks(model, runtime), images, model.config, model.generation)
        for runtime in ("onnxruntime", "openvino")
    ]
    agreement = compare_tokens(*captions)
    assert agreement["identical"] >= 36, agreement  # seen: 94 of 100


def test_words_and_places_are_counted_in_files_of_any_precision(artifacts: Make) -> None:
    for precision in ("fp32", "int8"):
        for variant in ("cross-attention", "prefix"):
            session = open_file(artifacts(variant) / precision / "decoder.onnx", "input_ids")
            assert (session._words, session._places) == (400, 64)
    session = open_file(EMBEDDED / "captioner" / "decoder.onnx", "input_ids")
    decoder = json.loads((EMBEDDED / "captioner" / "config.json").read_text())["decoder"]
    counts = (decoder["vocab_size"], decoder["n_positions"])
    assert (session._words, session._places) == counts


def test_captions_are_those_of_torch_and_onnxruntime(captioner: tuple[Path, Path]) -> None:
    checkpoint, artifact = captioner
    photos = [make_photo(seed) for seed in range(6)]
    expected = Captioner.load(checkpoint, runtime="torch", device="cpu")
    others = [Captioner.load(artifact, runtime=runtime) for runtime in ("onnxruntime", "openvino")]
    for num_beams in (1, 3):
        wanted = expected.caption(photos, num_beams=num_beams)
        assert len({each.token_ids for each in wanted}) > 1
        for other in others:
            found = other.caption(photos, num_beams=num_beams)
            assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
            scores = [each.score for each in found]
            assert scores == pytest.approx([each.score for each in wanted], abs=1e-4)


def test_results_are_the_callers(artifacts: Make, pictures: Make) -> None:
    """No call may change what an earlier one returned, whatever it asks for."""
    opened = open_networks(describe(artifacts("prefix") / "fp32"), "openvino")
    (first,) = opened["encoder"](pixel_values=pictures(2))
    kept = first.copy()
    opened["encoder"](pixel_values=pictures(2, seed=9))
    assert np.array_equal(first, kept)
    decoder = opened["decoder"]
    logits, past = decoder(input_ids=np.array([[1], [2]]), prefix_embeds=first)
    copies = logits.copy(), past.copy()
    (again,) = decoder(("logits",), input_ids=np.array([[3], [4]]), prefix_embeds=first)
    decoder(("logits", "image_attention"), input_ids=np.array([[3], [4]]), prefix_embeds=first)
    decoder(input_ids=np.array([[3], [4]]), past_key_values=past)
    assert np.array_equal(logits, copies[0]) and np.array_equal(past, copies[1])
    assert not np.array_equal(again, logits)


def test_threads_do_not_disturb_one_another(artifacts: Make, pictures: Make) -> None:
    encoder = open_networks(describe(artifacts("prefix") / "fp32"), "openvino")["encoder"]
    given = [pictures(1, seed) for seed in range(4)]
    expected = [encoder(pixel_values=each)[0] for each in given]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        for _ in range(10):
            found[index] = encoder(pixel_values=given[index])[0]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(found[index], each) for index, each in enumerate(expected))


def test_wrong_shapes_and_words_are_told(artifacts: Make, pictures: Make) -> None:
    opened = open_networks(describe(artifacts("cross-attention") / "fp32"), "openvino")
    with pytest.raises(BadInput, match=r"encoder\.onnx cannot be run on pixel_values \[1, 3, 32"):
        opened["encoder"](pixel_values=pictures(1)[..., :16])
    (bridged,) = opened["encoder"](pixel_values=pictures(2))
    with pytest.raises(BadInput, match=r"decoder\.onnx cannot be run"):
        opened["decoder"](input_ids=np.zeros((3, 1), np.int64), cross_key_values=bridged)
    with pytest.raises(BadInput, match=r"input_ids are 0 to 400, of 400 words") as told:
        opened["decoder"](input_ids=np.array([[400], [0]]), cross_key_values=bridged)
    assert "\n" not in str(told.value)
    too_long = np.zeros((2, 65), np.int64)  # of 64 positions
    with pytest.raises(BadInput, match=r"decoder\.onnx cannot be run"):
        opened["decoder"](input_ids=too_long, cross_key_values=bridged)


# --- generators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["sd1", *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES[1:])]
)
def test_pictures_are_those_of_torch_and_onnxruntime(
    pipeline: Callable[[str], tuple[Path, Path]], family: str
) -> None:
    checkpoint, artifact = pipeline(family)
    runs = ((checkpoint, "torch"), (artifact, "onnxruntime"), (artifact, "openvino"))
    drawn = []
    for folder, runtime in runs:
        generator = ImageGenerator.load(folder, runtime=runtime, device="cpu")
        assert generator.networks.runtime == runtime
        made = generator.generate(
            "a red fox, jumping over the lazy dog",
            num_images_per_prompt=2,
            num_inference_steps=3,
            height=64,
            width=96,
            seed=3,
        )
        drawn.append(np.stack([np.asarray(each.image) for each in made]))
    assert drawn[0].shape == (2, 64, 96, 3) and drawn[0].std() > 5
    assert psnr(drawn[0], drawn[2]) >= 40
    assert psnr(drawn[1], drawn[2]) >= 40


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("plain", "fp32"), ("plain", "fp16"), ("plain", "int8"), ("sdxl", "fp32"), ("lcm", "fp32")],
)
def test_networks_give_what_onnxruntime_gives(kind: str, precision: str, tmp_path: Path) -> None:
    """Sizes that are no powers of two, several rows, words of any length, weights of any kind."""
    modules = make_modules(kind)
    files = write_networks(modules, tmp_path, precision=precision)
    config = dataclasses.asdict(modules["unet"].config)
    expected = on_onnxruntime.open_generator_files(files, config)
    found = on_openvino.open_generator_files(files, config, "float32")
    words = np.array([[5, 7, 999, 3], [8, 999, 999, 2]])
    given: dict[str, dict[str, Any]] = {
        "text_encoder": {"input_ids": words, "clip_skip": 1},
        "vae_encoder": {"pixel_values": noise(2, 3, 6, 10)},
        "vae_decoder": {"latents": noise(2, 4, 5, 7)},
        "unet": unet_arrays(modules["unet"].config, 3, (7, 10), 5),
    }
    deep = {"deep_features": expected["unet"](["deep_features"], **given["unet"])[0]}
    given["unet_shallow"] = {**given["unet"], **deep}
    assert given.keys() == found.keys()
    for name, arrays in given.items():
        for one, other in zip(expected[name](**arrays), found[name](**arrays), strict=True):
            assert one.shape == other.shape and other.dtype == np.float32
            assert np.abs(one - other).max() < 2e-5 * max(1, np.abs(one).max()), name
    if precision == "fp32":
        torch_made = generator_networks(modules)["unet"](
            **{name: torch.from_numpy(each) for name, each in given["unet"].items()}
        )[0]
        assert np.abs(torch_made.numpy() - found["unet"](**given["unet"])[0]).max() < 1e-4


def test_style_rows(tmp_path: Path) -> None:
    """The inputs that may be left out: read as given, and as nothing before and after."""
    modules = make_modules("plain")
    files = write_networks(modules, tmp_path, precision="fp32")
    config = modules["unet"].config
    expected = on_onnxruntime.open_generator_files(files, dataclasses.asdict(config))["unet"]
    found = on_openvino.open_generator_files(files, dataclasses.asdict(config), "float32")["unet"]
    plain = unet_arrays(config, 3, (8, 8), 5)
    layers = sum(config.up_attention or config.down_attention) * (config.layers_per_block + 1)
    random = np.random.default_rng(1)
    styled = {
        "key_rows": np.array([[0, 1, 1]] * layers),
        "query_rows": np.array([0, 1, 0]),
        "query_preservation": random.random((layers, 3), np.float32),
        "attention_temperature": 1 + random.random((layers, 3), np.float32),
    }
    (before,) = found(**plain)
    (given,) = found(**plain, **styled)
    (after,) = found(**plain)
    assert np.array_equal(before, after)
    assert np.abs(given - expected(**plain, **styled)[0]).max() < 2e-5
    assert np.abs(given - before).max() > 1e-3
    assert set(STYLE_INPUTS) == styled.keys() == unet.STYLE_INPUTS.keys()
    with pytest.raises(
        BadInput, match=r"unet\.onnx cannot be run .*key_rows is not for the 3 rows"
    ):
        found(**plain, **{**styled, "key_rows": styled["key_rows"][:, :2]})


def test_what_a_generator_cannot_take_is_told(tmp_path: Path) -> None:
    files = write_networks(make_modules("plain"), tmp_path, precision="fp32")
    config = dataclasses.asdict(UNetConfig.tiny())
    networks = on_openvino.open_generator_files(files, config, "float32")
    with pytest.raises(BadInput, match=r"unet\.onnx needs encoder_hidden_states"):
        networks["unet"](latents=noise(1, 4, 8, 8), timestep=noise(1))
    with pytest.raises(BadInput, match=r"latents \[1, 3, 8, 8\]"):
        networks["vae_decoder"](latents=noise(1, 3, 8, 8))
    with pytest.raises(BadInput, match=r"timestep is not for the 2 rows of latents"):
        networks["unet"](**{**unet_arrays(UNetConfig.tiny(), 2, (8, 8), 5), "timestep": noise(1)})
    with pytest.raises(BadInput, match=r"input_ids are 3 to 1000, of 1000 words"):
        networks["text_encoder"](input_ids=np.array([[3, 1000]]))
    with pytest.raises(BadInput, match=r"78 words and image tokens are more than 77 places"):
        networks["text_encoder"](input_ids=np.full((1, 78), 5))


def test_a_file_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    files = write_networks(make_modules("plain"), tmp_path, precision="fp32")
    config = dataclasses.asdict(UNetConfig.tiny())
    networks = on_openvino.open_generator_files(files, config, "float32")
    (tmp_path / "vae_encoder.onnx").write_bytes(b"no graph")
    networks["vae_decoder"](latents=noise(1, 4, 4, 4))
    with pytest.raises(UnsupportedModel, match=r"vae_encoder\.onnx cannot be run"):
        networks["vae_encoder"](pixel_values=noise(1, 3, 8, 8))


# --- what is asked for ----------------------------------------------------------------------------


@pytest.fixture
def with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor say that it computes in bfloat16."""

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "BF16", "INT8"]

    monkeypatch.setattr(on_openvino, "_core", Core)


def test_the_choice_is_told(artifacts: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = describe(artifacts("cross-attention") / "fp32", name="mine")
    with caplog.at_level(logging.INFO, "diptych"):
        opened = open_networks(model, "openvino", "cpu", "float32")
    assert (opened.runtime, opened.device, opened.dtype) == ("openvino", "cpu", "float32")
    assert "mine runs in openvino on cpu as float32: it was asked for" in caplog.messages


@pytest.mark.usefixtures("with_bfloat16")
def test_bfloat16_where_there_is_any() -> None:
    assert [check_dtype(each) for each in ("auto", "bfloat16", "float32")] == [
        "float32",
        "bfloat16",
        "float32",
    ]
    assert on_openvino._settings("bfloat16")["INFERENCE_PRECISION_HINT"] == "bf16"


@pytest.mark.usefixtures("with_bfloat16")
def test_files_in_bfloat16_are_left_to_openvino(
    artifacts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_openvino, "open_artifact", lambda files, dtype: {})
    opened = open_networks(describe(artifacts("cross-attention") / "fp32"), dtype="bfloat16")
    assert (opened.runtime, opened.dtype) == ("openvino", "bfloat16")
    assert opened.reason == "it alone computes in bfloat16 with ONNX networks"


@pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this processor does not compute in bfloat16",
)
def test_bfloat16_is_near_float32(artifacts: Make, pictures: Make) -> None:
    model = describe(artifacts("prefix") / "fp32")
    narrow, wide = (
        open_networks(model, "openvino", dtype=dtype)["encoder"](pixel_values=pictures(2))[0]
        for dtype in ("bfloat16", "auto")
    )
    assert 0 < np.abs(narrow - wide).max() < 0.05 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"dtype": "float16"}, "dtype is 'float16': in OpenVINO give auto, float32 or bfloat16"),
        ({"dtype": "fp16"}, "dtype is 'fp16': give auto, float32, bfloat16 or float16"),
        ({"device": "cuda"}, "mine cannot run in openvino: .* run on the cpu, not on cuda"),
    ],
)
def test_what_cannot_be_is_told(artifacts: Make, given: dict[str, Any], text: str) -> None:
    model = describe(artifacts("cross-attention") / "fp32", name="mine")
    with pytest.raises(BadInput, match=text):
        open_networks(model, "openvino", **given)


def test_no_bfloat16_is_told(artifacts: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(on_openvino, "_core", Core)
    with pytest.raises(BadInput, match="this processor does not compute in: give auto"):
        open_networks(describe(artifacts("cross-attention") / "fp32"), "openvino", dtype="bfloat16")


def test_checkpoints_are_told_how_to_export(captioner: tuple[Path, Path]) -> None:
    model = describe(captioner[0], name="mine")
    with pytest.raises(BadInput, match=r"mine cannot run in openvino: .* `diptych export mine"):
        open_networks(model, "openvino")


def test_a_missing_package_is_named(artifacts: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "openvino" else object())
    model = describe(artifacts("cross-attention") / "fp32")
    with pytest.raises(MissingExtra, match=r"in OpenVINO .*pip install 'diptych\[openvino\]'"):
        open_networks(model, "openvino")
    assert open_networks(model).runtime == "onnxruntime"


def test_neither_torch_nor_onnx(artifacts: Make) -> None:
    code = f"""
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript"):
                    raise ImportError(name + " is blocked")

        sys.meta_path.insert(0, Blocked())
        from diptych.runtimes.agreement import greedy_tokens, pictures_for
        from diptych.runtimes.network import open_networks
        from diptych.weights.files import describe

        model = describe({str(artifacts("cross-attention") / "fp32")!r})
        networks = open_networks(model, "openvino")
        images = pictures_for(model.config, model.preprocessing, None, 2)
        assert greedy_tokens(networks, images, model.config, model.generation)[0]
        assert not set(sys.modules) & {{"torch", "transformers", "onnx", "onnxscript"}}
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- hostile files --------------------------------------------------------------------------------


def test_other_files_are_refused_without_noise(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedModel, match=r"has no input input_ids: it was not exported"):
        open_file(own / "encoder.onnx", "input_ids")
    with pytest.raises(UnsupportedModel, match=r"has no input pixel_values"):
        open_file(own / "decoder.onnx")
    data = own / "encoder.onnx.data"
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(UnsupportedModel, match=r"encoder\.onnx cannot be run"):
        open_file(own / "encoder.onnx")
    for content in (b"not a graph", b""):
        (own / "encoder.onnx").write_bytes(content)
        with pytest.raises(UnsupportedModel) as told:
            open_file(own / "encoder.onnx")
        assert "\n" not in str(told.value)
    with pytest.raises(UnsupportedModel):
        open_file(own / "gone.onnx")
    assert capfd.readouterr() == ("", "")


def test_the_hubs_cache_of_links_is_read(own: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in [each for each in own.iterdir() if each.is_file()]:
        (blobs / path.name.upper()).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name.upper())
    networks = open_networks(describe(snapshot), "openvino")
    plain = open_networks(describe(own), "openvino")
    pixels = np.ones((1, *_pixels(own)), np.float32)
    (one,), (other,) = (each["encoder"](pixel_values=pixels) for each in (networks, plain))
    assert np.array_equal(one, other)
    assert sorted(path.name for path in blobs.iterdir()) == sorted(
        path.name.upper() for path in own.iterdir() if path.is_file()
    )


def _pixels(folder: Path) -> tuple[int, int, int]:
    encoder = describe(folder).config["encoder"]
    return encoder["num_channels"], encoder["image_size"], encoder["image_size"]
