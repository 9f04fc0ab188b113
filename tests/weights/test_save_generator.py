"""What is written is what was read: by us, and by diffusers."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.errors import BadInput
from diptych.models.fused_projections import fuse_projections
from diptych.weights import save_module
from diptych.weights.diffusion import GeneratorFolder, describe_generator
from diptych.weights.load_generator import load_generator
from diptych.weights.save_generator import save_generator
from ldm_files import write_single_file
from tiny_pipelines import FAMILIES, Family, make_pipeline
from traced import untraced

Loaded = tuple[Any, GeneratorFolder, dict[str, nn.Module]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def loaded(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("made") / family
    pipeline = make_pipeline(folder, family, seed=4, full_vocabulary=True)
    model = describe_generator(folder)
    return pipeline, model, load_generator(model)


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = (
        {n.removeprefix("text_model."): t for n, t in module.state_dict().items()}
        for module in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@untraced()
def quietly_loaded(folder: Path) -> Any:
    """Load a folder with diffusers; what it says about the config is an error."""
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def spread(word: str, value: Any) -> Any:
    """Return one number for all levels as a list of them."""
    if word in ("attention_head_dim", "transformer_layers_per_block") and isinstance(value, int):
        return [value] * 4
    return list(value) if isinstance(value, tuple) else value


# Their Euler sampler hands a tensor to NumPy in a way that NumPy has deprecated.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
def test_diffusers_loads_it(
    loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, model, modules = loaded
    for module in modules.values():
        fuse_projections(module)  # as on a GPU: several parameters in one piece of memory
    save_generator(modules, model, tmp_path / "out")
    theirs = quietly_loaded(tmp_path / "out")
    assert type(theirs) is type(pipeline)
    for name in modules:
        assert_same(getattr(theirs, name), getattr(pipeline, name))
    for part in ("unet", "vae"):
        ours, wanted = getattr(theirs, part).config, getattr(pipeline, part).config
        said = json.loads((tmp_path / "out" / part / "config.json").read_text())
        for word in said:
            if word[0] != "_":
                assert spread(word, ours[word]) == spread(word, wanted[word]), word
    for name in model.tokenizers:
        ours, wanted = getattr(theirs, name), getattr(pipeline, name)
        for text in ("a cat! 漢字", "hello!!!"):
            padded = {"padding": "max_length", "max_length": 77}
            assert ours(text, **padded).input_ids == wanted(text, **padded).input_ids
    assert type(theirs.scheduler) is type(pipeline.scheduler)
    for scheduler in (theirs.scheduler, pipeline.scheduler):
        scheduler.set_timesteps(7)
    assert torch.equal(theirs.scheduler.timesteps, pipeline.scheduler.timesteps)
    assert torch.equal(theirs.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_folder_round_trip(loaded: Loaded, tmp_path: Path) -> None:
    _, model, modules = loaded
    save_generator(modules, model, tmp_path / "out")
    again = describe_generator(tmp_path / "out")
    assert (again.configs, again.schedule, again.defaults) == (
        model.configs,
        model.schedule,
        model.defaults,
    )
    assert again.family == model.family
    assert again.force_zeros_for_empty_prompt == model.force_zeros_for_empty_prompt
    for name, module in load_generator(again).items():
        assert_same(module, modules[name])
    # Over what is there, too.
    save_generator(modules, model, tmp_path / "out", dtype="float16")
    halves = load_generator(describe_generator(tmp_path / "out"), dtype="float16")
    assert all(p.dtype == torch.float16 for p in halves["unet"].parameters())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_single_file_round_trip(loaded: Loaded, family: Family, tmp_path: Path) -> None:
    pipeline, _, _ = loaded
    first = write_single_file(pipeline, family, tmp_path / "first.safetensors")
    model = describe_generator(first)
    modules = load_generator(model)
    save_generator(modules, model, tmp_path / "second.safetensors", layout="ldm")
    again = describe_generator(tmp_path / "second.safetensors")
    assert (again.family, again.configs, again.schedule) == (
        model.family,
        model.configs,
        model.schedule,
    )
    for name, module in load_generator(again).items():
        assert_same(module, modules[name])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_type_survives(
    loaded: Loaded, family: Family, tmp_path: Path, prediction_type: str
) -> None:
    pipeline, _, _ = loaded
    first = write_single_file(pipeline, family, tmp_path / "first.safetensors")
    model = describe_generator(first, prediction_type=prediction_type)
    path = tmp_path / "second.safetensors"
    save_generator(load_generator(model), model, path, layout="ldm")
    assert describe_generator(path).schedule["prediction_type"] == prediction_type


def test_diffusers_converts_our_single_file(loaded: Loaded, family: Family, tmp_path: Path) -> None:
    from diffusers.loaders import single_file_utils as theirs
    from safetensors.torch import load_file

    pipeline, model, modules = loaded
    save_generator(modules, model, tmp_path / "a.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "a.safetensors")
    unet = theirs.convert_ldm_unet_checkpoint(dict(tensors), config=pipeline.unet.config)
    vae = theirs.convert_ldm_vae_checkpoint(dict(tensors), config=pipeline.vae.config)
    texts: dict[str, Any] = {}
    if family != "sd2":
        texts["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    open_name = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}.get(family)
    if open_name:
        prefix = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
        tower = getattr(pipeline, open_name)
        # Theirs splits at the width of the projection, which is that of the tower in their models.
        texts[open_name] = theirs.convert_open_clip_checkpoint(
            tower, without_projection(tensors, prefix[family]), prefix=prefix[family]
        )
    found = {"unet": unet, "vae": vae, **texts}
    for name, converted in found.items():
        wanted = getattr(pipeline, name).state_dict()
        wanted = {n.removeprefix("text_model."): t for n, t in wanted.items()}
        converted = {n.removeprefix("text_model."): t for n, t in converted.items()}
        wanted.pop("text_projection.weight", None)
        assert converted.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(converted[key], tensor), key


def without_projection(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: t for name, t in tensors.items() if name != f"{prefix}text_projection"}


def test_own_family_keeps_its_defaults(loaded: Loaded, family: Family, tmp_path: Path) -> None:
    import dataclasses

    _, model, modules = loaded
    defaults = {**model.defaults, "num_inference_steps": 12, "guidance_scale": 3.0}
    own = dataclasses.replace(model, family="diptych", defaults=defaults)
    save_generator(modules, own, tmp_path / "out")
    again = describe_generator(tmp_path / "out")
    assert (again.family, again.defaults) == ("diptych", defaults)
    quietly_loaded(tmp_path / "out")
    with pytest.raises(BadInput, match="no single file"):
        save_generator(modules, own, tmp_path / "a.safetensors", layout="ldm")


def test_clip_tokenizer_is_written_for_others(
    loaded: Loaded, family: Family, tmp_path: Path
) -> None:
    pipeline, _, _ = loaded
    path = write_single_file(pipeline, family, tmp_path / "a.safetensors")
    model = describe_generator(path)
    save_generator(load_generator(model), model, tmp_path / "out")
    theirs = quietly_loaded(tmp_path / "out")
    for name in model.tokenizers:
        ours = describe_generator(tmp_path / "out").tokenizers[name].open()
        for text in ("a cat, 2 dogs!", "Größe 漢字"):
            padded = {"padding": "max_length", "max_length": 77}
            wanted = getattr(pipeline, name)(text, **padded).input_ids
            assert getattr(theirs, name)(text, **padded).input_ids == wanted
            assert ours.encode(text) == wanted


def test_bad_places(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, modules = loaded
    with pytest.raises(BadInput, match="layout is 'x'"):
        save_generator(modules, model, tmp_path / "out", layout="x")
    with pytest.raises(BadInput, match=r"ends in \.safetensors"):
        save_generator(modules, model, tmp_path / "out", layout="ldm")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        save_generator(modules, model, tmp_path / "file" / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "_bytes", full)
    with pytest.raises(BadInput, match=r"No space left on device.*make room"):
        save_generator(modules, model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
