"""Generators of the three families, in every layout, against diffusers through files on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.errors import BadInput, DiptychError, UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.text_to_image.schedules import ScheduleConfig
from diptych.weights.diffusion import describe_generator
from diptych.weights.files import verify
from diptych.weights.load_generator import load_generator
from ldm_files import single_file, write_single_file
from tiny_pipelines import FAMILIES, Family, make_pipeline, write_json

TOLERANCE = 1e-4


# Coverage follows sd1 in the tests that ask for no other family.
@pytest.fixture(
    scope="module", params=[pytest.param("sd1", marks=pytest.mark.no_cover), *FAMILIES[1:]]
)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Return folder and pipeline of each family, made once."""
    made: dict[Any, Any] = {}

    class Maker(dict[Any, Any]):
        def __missing__(self, wanted: Family) -> Any:
            folder = tmp_path_factory.mktemp("pipelines") / wanted
            pipeline = make_pipeline(folder, wanted, seed=3, full_vocabulary=True)
            self[wanted] = folder, pipeline
            return self[wanted]

    return Maker(made)


@pytest.fixture(scope="module")
def folder(family: Family, pipelines: dict[Any, Any]) -> Path:
    return pipelines[family][0]


@pytest.fixture(scope="module")
def pipeline(family: Family, pipelines: dict[Any, Any]) -> Any:
    return pipelines[family][1]


def assert_same_outputs(modules: dict[str, nn.Module], pipeline: Any) -> None:
    """Hold every network against that of the pipeline, on the same random inputs."""
    random = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    is_xl = "text_encoder_2" in modules
    latents, pixels = draw(2, pipeline.unet.config.in_channels, 8, 8), draw(1, 3, 32, 32).tanh()
    timestep = torch.tensor([3.0, 721.0])
    hidden = draw(2, 7, pipeline.unet.config.cross_attention_dim)
    added: dict[str, Tensor] = {}
    if is_xl:
        added = {"text_embeds": draw(2, 40), "time_ids": draw(2, 6) * 100}
    with torch.inference_mode():
        theirs = pipeline.unet(latents, timestep, hidden, added_cond_kwargs=added or None).sample
        assert_close(modules["unet"](latents, timestep, hidden, **added), theirs)
        posterior = pipeline.vae.encode(pixels).latent_dist
        mean, _ = modules["vae"].encode(pixels)  # type: ignore[operator]
        assert_close(mean, posterior.mean)
        decoded = modules["vae"].decode(latents[:1, :4])  # type: ignore[operator]
        assert_close(decoded, pipeline.vae.decode(latents[:1, :4]).sample)
        for name in ("text_encoder", "text_encoder_2"):
            if name in modules:
                tower, tokenizer = getattr(pipeline, name), pipeline.tokenizer
                ids = tokenizer(["a cat, 2 dogs!", "x"], padding="max_length", return_tensors="pt")
                theirs = tower(ids.input_ids, output_hidden_states=True)
                ours, pooled = modules[name](ids.input_ids)
                assert_close(ours, theirs.hidden_states[-2] if is_xl else theirs.last_hidden_state)
                assert_close(
                    pooled, theirs.text_embeds if name[-1] == "2" else theirs.pooler_output
                )


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05  # else there would be nothing to tell apart
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def assert_same_weights(ours: dict[str, nn.Module], theirs: dict[str, nn.Module]) -> None:
    assert ours.keys() == theirs.keys()
    for name, module in theirs.items():
        state = ours[name].state_dict()
        assert state.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert torch.equal(state[key], tensor), key


# Parity.


def test_folder(folder: Path, pipeline: Any, family: Family) -> None:
    model = describe_generator(folder, "name", "rev")
    assert (model.family, model.layout, model.name, model.revision) == (
        family,
        "diffusers",
        "name",
        "rev",
    )
    assert model.networks == {} and model.precision is None
    modules = load_generator(model)
    assert all(not module.training for module in modules.values())
    assert_same_outputs(modules, pipeline)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_file(
    folder: Path, pipeline: Any, family: Family, tmp_path: Path, ending: str
) -> None:
    # Its name says nothing.
    path = write_single_file(pipeline, family, tmp_path / f"some.{ending}")
    model = describe_generator(path)
    assert (model.family, model.layout) == (family, "ldm")
    modules = load_generator(model)
    assert_same_weights(modules, load_generator(describe_generator(folder)))
    if ending == "safetensors":
        assert_same_outputs(modules, pipeline)


@pytest.mark.parametrize("wanted", FAMILIES)
def test_nine_channels(wanted: Family, tmp_path: Path) -> None:
    pipeline = make_pipeline(tmp_path / "a", wanted, 1, in_channels=9, full_vocabulary=True)
    modules = load_generator(describe_generator(tmp_path / "a"))
    path = write_single_file(pipeline, wanted, tmp_path / "a.safetensors")
    model = describe_generator(path)
    assert model.configs["unet"]["in_channels"] == 9
    assert model.schedule["prediction_type"] == "epsilon"
    assert_same_weights(load_generator(model), modules)
    assert_same_outputs(modules, pipeline)


def test_configs_of_a_single_file(
    folder: Path, pipeline: Any, family: Family, tmp_path: Path
) -> None:
    path = write_single_file(pipeline, family, tmp_path / "a.safetensors")
    ours, theirs = describe_generator(path).configs, describe_generator(folder).configs
    # What leaves no trace in the tensors, and is that of the published files instead.
    assert ours["unet"]["sample_size"] == {"sd1": 64, "sd2": 96, "sdxl": 128}[family]
    unknown = {"sample_size", "upcast_attention", "eos_token_id"}
    for part, config in theirs.items():
        for word, value in config.items():
            if word not in unknown:
                assert ours[part][word] == value, (part, word)


def test_tokenizer_of_a_single_file(pipeline: Any, family: Family, tmp_path: Path) -> None:
    path = write_single_file(pipeline, family, tmp_path / "a.safetensors")
    tokenizers = describe_generator(path).tokenizers
    for name, files in tokenizers.items():
        theirs = getattr(pipeline, name)
        for text in ("a cat!!", "Ünïcode ünd 漢字 2024", ""):
            wanted = theirs(text, padding="max_length", truncation=True, max_length=77)
            assert files.open().encode(text) == wanted["input_ids"]


def test_schedule_builds(folder: Path, pipeline: Any, family: Family, tmp_path: Path) -> None:
    path = write_single_file(pipeline, family, tmp_path / "a.safetensors")
    ours, theirs = describe_generator(path).schedule, describe_generator(folder).schedule
    assert ScheduleConfig(**ours).prediction_type == ScheduleConfig(**theirs).prediction_type
    assert {**ours, "timestep_spacing": None} == {**theirs, "timestep_spacing": None}
    assert theirs["sampler"] == {"sd1": "pndm", "sd2": "ddim", "sdxl": "euler"}[family]


# The layouts of a folder.


def rewritten(folder: Path, target: Path, change: Any) -> Path:
    """Copy a folder and change its tensors, file by file."""
    shutil.copytree(folder, target)
    for path in target.rglob("*.safetensors"):
        change(path, load_file(path))
    return target


def test_pickles(folder: Path, tmp_path: Path) -> None:
    def to_pickle(path: Path, tensors: dict[str, Tensor]) -> None:
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(tensors, path.with_name(f"{stem}.bin"))
        path.unlink()

    model = describe_generator(rewritten(folder, tmp_path / "a", to_pickle))
    assert {path.suffix for files in model.weights.values() for path in files} == {".bin"}
    assert_same_weights(load_generator(model), load_generator(describe_generator(folder)))


def test_halves(folder: Path, tmp_path: Path) -> None:
    def halve(path: Path, tensors: dict[str, Tensor]) -> None:
        halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
        save_file(halves, path.with_name(f"{path.stem}.fp16.safetensors"))

    both = rewritten(folder, tmp_path / "a", halve)
    assert all(".fp16." not in p.name for f in describe_generator(both).weights.values() for p in f)
    asked = describe_generator(both, variant="fp16")
    assert all(".fp16." in path.name for files in asked.weights.values() for path in files)
    for path in both.rglob("*model.safetensors"):
        path.unlink()
    model = describe_generator(both)
    assert model.weights == asked.weights
    full = load_generator(describe_generator(folder))
    for name, module in load_generator(model).items():
        whole = full[name].state_dict()
        for key, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, whole[key].half().float())
    assert next(load_generator(model, dtype="float16")["unet"].parameters()).dtype == torch.float16


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(folder: Path, tmp_path: Path, variant: str | None) -> None:
    def shard(path: Path, tensors: dict[str, Tensor]) -> None:
        dotted = f".{variant}" if variant else ""
        shards: dict[str, dict[str, Tensor]] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            file = f"{path.stem}{dotted}-0000{1 + number % 2}-of-00002.safetensors"
            shards.setdefault(file, {})[name] = tensor
        for file, content in shards.items():
            save_file(content, path.with_name(file))
        where = {name: file for file, content in shards.items() for name in content}
        index = path.with_name(f"{path.stem}.safetensors.index{dotted}.json")
        index.write_text(json.dumps({"weight_map": where}))
        path.unlink()

    model = describe_generator(rewritten(folder, tmp_path / "a", shard))
    assert all(len(files) == 2 for files in model.weights.values())
    assert_same_weights(load_generator(model), load_generator(describe_generator(folder)))


def test_old_names(folder: Path, tmp_path: Path) -> None:
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(path: Path, tensors: dict[str, Tensor]) -> None:
        if path.parent.name == "vae":
            for new, old in words.items():
                tensors = {
                    name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
                    for name, tensor in tensors.items()
                }
        if path.parent.name == "text_encoder":
            tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(tensors, path)

    old = rewritten(folder, tmp_path / "a", age)
    assert any("query" in name for name in load_file(next(old.glob("vae/*.safetensors"))))
    ours = load_generator(describe_generator(old))
    assert_same_weights(ours, load_generator(describe_generator(folder)))


def test_tokenizer_as_two_files(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "a")
    document = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())
    (copy / "tokenizer" / "tokenizer.json").unlink()
    vocab = {
        **document["model"]["vocab"],
        **{t["content"]: t["id"] for t in document["added_tokens"]},
    }
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    (copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    ours = describe_generator(copy).tokenizers["tokenizer"]
    theirs = describe_generator(folder).tokenizers["tokenizer"]
    assert ours.path.name == "vocab.json"
    assert ours.open().encode("a cat, a dog!") == theirs.open().encode("a cat, a dog!")


# What a single file does not say.


@pytest.fixture(scope="module")
def sd2_tensors(pipelines: dict[Any, Any]) -> dict[str, Tensor]:
    return {name: t.contiguous() for name, t in single_file(pipelines["sd2"][1], "sd2").items()}


@pytest.mark.parametrize(
    ("extra", "asked", "wanted"),
    [
        ({}, None, "v_prediction"),
        ({"global_step": torch.tensor(875000)}, None, "epsilon"),
        ({"global_step": torch.tensor(110000)}, None, "v_prediction"),
        ({}, "epsilon", "epsilon"),
        ({"global_step": torch.tensor(875000)}, "v_prediction", "v_prediction"),
    ],
)
def test_prediction_type_of_sd2(
    sd2_tensors: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    extra: dict[str, Tensor],
    asked: str | None,
    wanted: str,
) -> None:
    save_file({**sd2_tensors, **extra}, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING, "diptych"):
        model = describe_generator(tmp_path / "a.safetensors", prediction_type=asked)
    assert model.schedule["prediction_type"] == wanted
    assert ("nothing in the file says what its UNet predicts" in caplog.text) == (asked is None)
    assert model.defaults["width"] == (768 if wanted == "v_prediction" else 512)


def test_marks_of_sdxl(pipelines: dict[Any, Any], tmp_path: Path) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = write_single_file(pipelines["sdxl"][1], "sdxl", tmp_path / "a.safetensors", **marks)
    schedule = describe_generator(path).schedule
    assert (schedule["prediction_type"], schedule["rescale_betas_zero_snr"]) == (
        "v_prediction",
        True,
    )
    load_generator(describe_generator(path))


def test_steps_of_a_ckpt_count(pipelines: dict[Any, Any], tmp_path: Path) -> None:
    path = write_single_file(pipelines["sd2"][1], "sd2", tmp_path / "a.ckpt")
    found = torch.load(path)
    torch.save({**found, "global_step": 875000}, path)
    assert describe_generator(path).schedule["prediction_type"] == "epsilon"


def test_tower_that_was_cut_already(sd2_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    spare = ("resblocks.3.", "text_projection", "logit_scale")
    cut = {n: t for n, t in sd2_tensors.items() if not any(word in n for word in spare)}
    save_file(sd2_tensors, tmp_path / "whole.safetensors")
    save_file(cut, tmp_path / "cut.safetensors")
    whole, less = (
        load_generator(describe_generator(tmp_path / f"{name}.safetensors"))
        for name in ("whole", "cut")
    )
    assert_same_weights(less, whole)


def test_heads_can_be_said(sd2_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(sd2_tensors, tmp_path / "a.safetensors")
    model = describe_generator(tmp_path / "a.safetensors", num_attention_heads=(2, 2, 4, 4))
    assert model.configs["unet"]["num_attention_heads"] == (2, 2, 4, 4)


# What is wrong is told.


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name not in names}


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


OUT = "model.diffusion_model.out.2.bias"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: without(t, OUT), rf"ldm UNet.* 1 missing: {OUT}\."),
        (
            lambda t: {**t, "model.diffusion_model.extra.weight": torch.zeros(1)},
            r"1 unexpected: model\.diffusion_model\.extra\.weight",
        ),
        (lambda t: {**t, "spare.weight": torch.zeros(1)}, r"unexpected: spare\.weight\."),
        (lambda t: {**t, OUT: torch.zeros(5)}, rf"{OUT} is \[5\] instead of \[4\]"),
        (
            lambda t: {f"model.diffusion_model.{n}": v for n, v in t.items()},
            "no text encoder that diptych knows",
        ),
        (
            lambda t: {n: v for n, v in t.items() if "first_stage" not in n},
            r"no autoencoder \(VAE\): give the full checkpoint",
        ),
        (
            lambda t: {
                n.replace("cond_stage_model", "conditioner.embedders.0"): v for n, v in t.items()
            },
            "refiner of Stable Diffusion XL, which diptych does not run: give the base",
        ),
        (lambda t: {**t, "edm_mean": torch.zeros(1)}, "EDM"),
        (
            lambda t: {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(1)},
            "no checkpoint of Stable Diffusion but a LoRA: load it with load_lora",
        ),
        (lambda t: {"emb_params": torch.zeros(1)}, "but an embedding"),
        (
            lambda t: {"conv.weight": torch.zeros(1)},
            r"but a file of other tensors \(conv\.weight\)",
        ),
        (
            lambda t: {
                **t,
                "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3),
            },
            "takes 8 channels; diptych runs those of 4 and 9",
        ),
        (
            lambda t: {
                **t,
                "cond_stage_model.model.token_embedding.weight": torch.zeros(1000, 48),
            },
            "knows 1000 tokens, fewer than CLIP's 49408",
        ),
        (
            lambda t: without(t, "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"),
            r"input_blocks\.1 is missing",
        ),
    ],
)
def test_single_file_that_does_not_fit(
    sd2_tensors: dict[str, Tensor], tmp_path: Path, change: Any, told: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(change(sd2_tensors), path)
    with pytest.raises((UnsupportedModel, WeightsMismatch), match=told) as caught:
        load_generator(describe_generator(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_truncated(pipelines: dict[Any, Any], tmp_path: Path, ending: str, part: float) -> None:
    path = write_single_file(pipelines["sd1"][1], "sd1", tmp_path / f"a.{ending}")
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * part))
    with pytest.raises(WeightsMismatch) as caught:
        load_generator(describe_generator(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_hostile_ckpt(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(UnsupportedModel, match=r"refuses to run (posix|nt|os)\.mkdir"):
        describe_generator(tmp_path / "a.ckpt")
    assert not (tmp_path / "run").exists()


def test_what_a_training_leaves_is_passed_over(pipelines: dict[Any, Any], tmp_path: Path) -> None:
    import collections

    import numpy as np

    path = write_single_file(pipelines["sd1"][1], "sd1", tmp_path / "a.ckpt")
    found = torch.load(path)
    found |= {
        "callbacks": {"best": np.float64(0.5), "names": {1, 2}},
        "lr_schedulers": [{"_step_count": 3, "base_lrs": [1e-4]}],
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}}],
        "loops": collections.OrderedDict(a=None),
    }
    torch.save(found, path)
    assert describe_generator(path).family == "sd1"


def test_folder_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "a")
    path = next(copy.glob("unet/*.safetensors"))
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    tensors["conv_extra.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(WeightsMismatch) as caught:
        load_generator(describe_generator(copy, "mine"))
    message = str(caught.value)
    assert message.startswith("mine: ") and "read as diffusers UNet" in message
    assert "1 missing: conv_out.bias. 1 unexpected: conv_extra.bias." in message


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("unet", {"_class_name": "UNet3DConditionModel"}, "it is a 'UNet3DConditionModel'"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet", {"block_out_channels": [33, 32, 32, 64]}, "33 channels do not divide"),
        ("unet", {"block_out_channels": "x"}, "block_out_channels is 'x'"),
        ("unet", {"block_out_channels": [1 << 30]}, "not a list of 1"),
        ("unet", {"cross_attention_dim": 31}, "text encoders give"),
        ("unet", {"layers_per_block": [1, 2, 1, 1]}, "layers_per_block"),
        ("unet", {"in_channels": -4}, "in_channels is -4"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "it is a 'AutoencoderTiny'"),
        ("vae", {"scaling_factor": "big"}, "scaling_factor is 'big'"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean is set"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "it is a 'T5EncoderModel'"),
        ("text_encoder", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ("scheduler", {"beta_start": float("nan")}, "NaN is out of range"),
        ("scheduler", {"beta_start": float("-inf")}, "beta_start is -inf"),
        ("unet", {"mid_block_type": None}, "mid_block_type is null"),
        ("unet", {"out_channels": 8}, "gives 8 channels, and its autoencoder has 4"),
    ],
)
def test_config_that_is_not_built(
    pipelines: dict[Any, Any], tmp_path: Path, part: str, changes: dict[str, Any], told: str
) -> None:
    copy = shutil.copytree(
        pipelines["sd1"][0], tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors")
    )
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    write_json(copy / part / name, **changes)
    with pytest.raises(UnsupportedModel, match=told) as caught:
        describe_generator(copy, "mine")
    assert str(caught.value).startswith("mine: ")


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "SASolver"])
def test_scheduler_as_diffusers_writes_it(
    pipelines: dict[Any, Any], tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(pipelines["sd1"][0], tmp_path / "a")
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.save_pretrained(copy / "scheduler")
    assert "-Infinity" in (copy / "scheduler" / "scheduler_config.json").read_text()
    assert describe_generator(copy).schedule["sampler"].startswith("dpmpp_2m")


@pytest.mark.parametrize("variant", ["bf16", "ema"])
def test_the_only_variant_is_taken(pipelines: dict[Any, Any], tmp_path: Path, variant: str) -> None:
    copy = shutil.copytree(pipelines["sd1"][0], tmp_path / "a")
    for path in copy.glob("*/*.safetensors"):
        path.rename(path.with_suffix(f".{variant}.safetensors"))
    assert sorted(load_generator(describe_generator(copy))) == ["text_encoder", "unet", "vae"]


def test_folder_without_weights_is_described(pipelines: dict[Any, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(
        pipelines["sd1"][0], tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors")
    )
    model = describe_generator(copy)
    assert model.weights == {}
    with pytest.raises(WeightsMismatch, match="has no PyTorch weights"):
        load_generator(model)


@pytest.mark.parametrize(
    ("gone", "error", "told"),
    [
        ("unet/diffusion_pytorch_model.safetensors", WeightsMismatch, r"unet/ has no weights"),
        ("vae/config.json", WeightsMismatch, r"no vae/config\.json"),
        ("tokenizer/tokenizer.json", UnsupportedModel, r"tokenizer/ has no tokenizer"),
        ("scheduler/scheduler_config.json", UnsupportedModel, r"scheduler_config\.json"),
    ],
)
def test_file_that_is_missing(
    pipelines: dict[Any, Any], tmp_path: Path, gone: str, error: type[DiptychError], told: str
) -> None:
    copy = shutil.copytree(pipelines["sd1"][0], tmp_path / "a")
    (copy / gone).unlink()
    with pytest.raises(error, match=told):
        describe_generator(copy)


def test_refiner_folder(pipelines: dict[Any, Any], tmp_path: Path) -> None:
    copy = shutil.copytree(pipelines["sdxl"][0], tmp_path / "a")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(UnsupportedModel, match="refiner"):
        describe_generator(copy)
    write_json(copy / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(UnsupportedModel, match="refiner"):
        describe_generator(copy)


def test_places_without_a_generator(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="does not exist"):
        describe_generator(tmp_path / "gone")
    with pytest.raises(UnknownModel, match=r"has no model_index\.json"):
        describe_generator(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="a single network or a captioner"):
        describe_generator(tmp_path)
    with pytest.raises(BadInput, match="prediction_type is 'x'"):
        describe_generator(tmp_path, prediction_type="x")
    with pytest.raises(BadInput, match="variant is"):
        describe_generator(tmp_path, variant="../x")


# Artifacts.


@pytest.fixture
def artifact(pipelines: dict[Any, Any], tmp_path: Path) -> Path:
    model = describe_generator(pipelines["sd1"][0])
    target = tmp_path / "artifact"
    shutil.copytree(model.path / "tokenizer", target / "tokenizer")
    networks = {}
    for name in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        (target / f"{name}.onnx").write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        networks[name] = {"file": f"{name}.onnx", "sha256": digest}
    document = {
        "format": "diptych-artifact",
        "version": 1,
        "task": "text-to-image",
        "precision": "fp16",
        "family": "diptych",
        "configs": model.configs,
        "schedule": model.schedule,
        "defaults": {"num_inference_steps": 12},
        "networks": networks,
    }
    (target / "artifact.json").write_text(json.dumps(document))
    return target


def test_artifact(artifact: Path, pipelines: dict[Any, Any]) -> None:
    model, source = describe_generator(artifact), describe_generator(pipelines["sd1"][0])
    assert (model.family, model.precision, model.weights) == ("diptych", "fp16", {})
    assert (model.configs, model.schedule) == (source.configs, source.schedule)
    assert model.defaults == {"width": 64, "height": 64, "num_inference_steps": 12}
    assert set(model.networks) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    verify(model)
    (artifact / "unet.onnx").write_bytes(b"another")
    with pytest.raises(WeightsMismatch, match=r"unet\.onnx is not the file"):
        verify(model)
    with pytest.raises(WeightsMismatch, match="has no PyTorch weights"):
        load_generator(model)


def test_artifact_with_a_checkpoint(artifact: Path, pipelines: dict[Any, Any]) -> None:
    source = pipelines["sd1"][0]
    for part in ("unet", "vae", "text_encoder"):
        shutil.copytree(source / part, artifact / part)
    model = describe_generator(artifact)
    assert model.networks
    assert_same_weights(load_generator(model), load_generator(describe_generator(source)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "is of version 2"),
        ({"task": "image-to-text"}, "is for 'image-to-text', not text-to-image"),
        ({"configs": {}}, "does not describe a text encoder"),
        ({"networks": {}}, "does not name"),
        ({"schedule": {"sampler": "x"}}, "sampler is 'x'"),
        ({"family": "sd9"}, "of the family 'sd9'"),
        ({"precision": None}, "states no precision"),
    ],
)
def test_artifact_that_is_not_read(artifact: Path, changes: dict[str, Any], told: str) -> None:
    write_json(artifact / "artifact.json", **changes)
    with pytest.raises(UnsupportedModel, match=told):
        describe_generator(artifact)
