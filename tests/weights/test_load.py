"""Parity: their tiny random model → saved to disk → our loader → the same logits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import BadInput, WeightsMismatch
from diptych.weights.files import describe
from diptych.weights.load import load_captioner

TOLERANCE = 1e-5


def largest_difference(theirs: Any, ours: Any) -> float:
    config = theirs.config
    side, channels = config.encoder.image_size, config.encoder.num_channels
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, channels, side, side, generator=generator)
    words = torch.randint(0, config.decoder.vocab_size, (2, 7), generator=generator)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, decoder_input_ids=words).logits
        found = ours(pixels, words)
    assert expected.std() > 0.01
    return float((expected - found).abs().max())


def leftovers(model: Any) -> dict[str, Any]:
    """Return the buffers that transformers wrote before 4.28."""
    found = {}
    for layer in range(model.config.decoder.n_layer):
        for part in ("attn", "crossattention"):
            name = f"decoder.transformer.h.{layer}.{part}"
            found[f"{name}.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.uint8).tril()
            found[f"{name}.masked_bias"] = torch.tensor(-1e4)
    return found


def as_safetensors(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    save(model, folder)


def as_shards(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    save(model, folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").is_file()


def as_bin(model: Any, folder: Path, save: Callable[..., Path], **options: Any) -> None:
    save(model, folder)
    state = OrderedDict(load_file(folder / "model.safetensors"))
    words = "decoder.transformer.wte.weight"
    state.setdefault("decoder.lm_head.weight", state[words])
    (folder / "model.safetensors").unlink()
    torch.save(OrderedDict({**state, **leftovers(model)}), folder / "pytorch_model.bin", **options)


def as_legacy_bin(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    as_bin(model, folder, save, _use_new_zipfile_serialization=False)


def as_shards_of_bin(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    import json

    as_bin(model, folder, save)
    state = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    where = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in names}, folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def as_raw_state(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    """Dump what transformers 5 has in memory, where the encoder's layers have other names."""
    save(model, folder)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    assert "encoder.layers.0.attention.q_proj.weight" in state
    assert hasattr(state, "_metadata")
    torch.save(state, folder / "pytorch_model.bin")


def as_wrapped_state(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    """Dump it as a trainer does whose module was compiled and spread over devices."""
    as_raw_state(model, folder, save)
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "pytorch_model.bin")


def as_parameters(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    """Dump parameters instead of tensors, some of them with strides of their own."""
    as_raw_state(model, folder, save)
    state = {
        name: torch.nn.Parameter(value.t().contiguous().t() if value.ndim == 2 else value)
        for name, value in model.state_dict().items()
    }
    torch.save(state, folder / "pytorch_model.bin")


def as_misnamed_safetensors(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    save(model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def as_misnamed_bin(model: Any, folder: Path, save: Callable[..., Path]) -> None:
    as_bin(model, folder, save)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


LAYOUTS = [
    as_safetensors,
    as_shards,
    as_bin,
    as_legacy_bin,
    as_shards_of_bin,
    as_raw_state,
    as_wrapped_state,
    as_parameters,
    as_misnamed_safetensors,
    as_misnamed_bin,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_every_layout_gives_the_same_logits(
    tmp_path: Path,
    reference: Callable[..., Any],
    save_reference: Callable[..., Path],
    layout: Callable[..., None],
    seed: int,
) -> None:
    theirs = reference(seed)
    layout(theirs, tmp_path, save_reference)
    ours = load_captioner(describe(tmp_path))
    assert not ours.training
    assert largest_difference(theirs, ours) < TOLERANCE


@pytest.mark.parametrize("seed", range(100, 116))
def test_random_configs_give_the_same_logits(
    tmp_path: Path, reference: Callable[..., Any], save_reference: Callable[..., Path], seed: int
) -> None:
    theirs = reference(seed)
    save_reference(theirs, tmp_path)
    ours = load_captioner(describe(tmp_path))
    assert largest_difference(theirs, ours) < TOLERANCE
    assert (ours.decoder.lm_head is None) == theirs.config.decoder.tie_word_embeddings
    assert all(parameter.is_contiguous() for parameter in ours.parameters())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert not any(tensor.is_meta for tensor in ours.state_dict().values())


# The head.


def test_head_that_differs_is_kept_apart_and_told(
    tmp_path: Path,
    reference: Callable[..., Any],
    save_reference: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    transformers: Any,
) -> None:
    theirs = reference(3, tied=True)
    save_reference(theirs, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    words = state["decoder.transformer.wte.weight"]
    state["decoder.lm_head.weight"] = words + torch.randn_like(words)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING, "diptych"):
        ours = load_captioner(describe(tmp_path))
    assert "the two differ: kept apart" in caplog.text
    assert not ours.config.decoder.tie_word_embeddings
    # transformers 5 decides the same.
    theirs = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert largest_difference(theirs, ours) < TOLERANCE


def test_one_matrix_under_the_name_of_the_head_fills_both(
    tmp_path: Path, reference: Callable[..., Any], save_reference: Callable[..., Path]
) -> None:
    theirs = reference(3, tied=True)
    save_reference(theirs, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["decoder.lm_head.weight"] = state.pop("decoder.transformer.wte.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert largest_difference(theirs, load_captioner(describe(tmp_path))) < TOLERANCE


def test_missing_head_of_an_untied_config_is_missing(
    tmp_path: Path, reference: Callable[..., Any], save_reference: Callable[..., Path]
) -> None:
    save_reference(reference(3, tied=False), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["decoder.lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"1 missing: decoder\.lm_head\.weight"):
        load_captioner(describe(tmp_path))


def test_dropped_tensors_are_named(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "diptych"):
        load_captioner(describe(checkpoint))
    assert "dropped: encoder.pooler.dense.bias, encoder.pooler.dense.weight" in caplog.text


# Types.


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_halves_become_float32_on_a_cpu(checkpoint: Path, stored: torch.dtype) -> None:
    path = checkpoint / "model.safetensors"
    state = {name: value.to(stored) for name, value in load_file(path).items()}
    save_file(state, path)
    ours = load_captioner(describe(checkpoint))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    expected = state["decoder.transformer.h.0.attn.c_attn.weight"].float().t()
    assert torch.equal(ours.decoder.h[0].attn.c_attn.weight, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16, torch.float32])
def test_dtype_is_what_is_asked_for(checkpoint: Path, dtype: Any) -> None:
    ours = load_captioner(describe(checkpoint), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in ours.parameters()} == {wanted}


@pytest.mark.parametrize("dtype", ["int8", "float", torch.int8, 7])
def test_other_dtypes_are_bad_input(checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(BadInput, match=r"dtype is .*give float32, float16, bfloat16"):
        load_captioner(describe(checkpoint), dtype=dtype)


@pytest.mark.parametrize("device", ["tpu9", "", "xla"])
def test_device_that_is_not_there_is_bad_input(checkpoint: Path, device: str) -> None:
    with pytest.raises(BadInput, match="cannot be used here"):
        load_captioner(describe(checkpoint), device=device)


def test_finite_check_is_for_the_asking(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["decoder.transformer.h.0.ln_1.bias"][0] = torch.nan
    save_file(state, path)
    load_captioner(describe(checkpoint))
    with pytest.raises(WeightsMismatch, match=r"decoder\.h\.0\.ln_1\.bias holds NaN"):
        load_captioner(describe(checkpoint), check_finite=True)


@pytest.mark.gpu
def test_device_and_the_files_dtype(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    ours = load_captioner(describe(checkpoint), device="cuda")
    assert {(p.dtype, p.device.type) for p in ours.parameters()} == {(torch.bfloat16, "cuda")}


# What does not fit.


def test_mismatch_says_what_where_and_what_to_do(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    for name in sorted(state)[:7]:
        del state[name]
    state["decoder.transformer.ln_f.weight"] = torch.zeros(25)
    state["decoder.transformer.ln_f.bias"] = torch.zeros(24, dtype=torch.int64)
    for number in range(6):
        state[f"surprise.{number}"] = torch.zeros(1)
    save_file(state, path)
    with pytest.raises(WeightsMismatch) as caught:
        load_captioner(describe(checkpoint, name="my model"))
    text = str(caught.value)
    assert text.startswith("my model: the tensors in model.safetensors, read as vision-encoder-")
    assert "7 missing: decoder.transformer." in text
    assert text.count("decoder.transformer.h.0") == 5
    assert "6 unexpected: surprise.0, surprise.1, surprise.2, surprise.3, surprise.4, …" in text
    assert "ln_f.weight is [25] instead of [24]" in text
    assert "ln_f.bias is int64" in text
    assert text.endswith("fetch or save the model anew.")


def test_transposed_square_matrix_cannot_be_seen_but_other_shapes_can(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    name = "decoder.transformer.h.0.attn.c_attn.weight"
    state[name] = state[name].t().contiguous()
    save_file(state, path)
    with pytest.raises(WeightsMismatch, match=r"is \[72, 24\] instead of \[24, 72\]"):
        load_captioner(describe(checkpoint))


def test_two_tensors_for_one_place(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["encoder.layers.0.mlp.fc1.bias"] = state[
        "encoder.encoder.layer.0.intermediate.dense.bias"
    ]
    save_file({name: value.clone() for name, value in state.items()}, path)
    with pytest.raises(WeightsMismatch, match="1 for the same place: encoder"):
        load_captioner(describe(checkpoint))


def test_weights_of_another_model_are_recognised(checkpoint: Path) -> None:
    save_file({"transformer.h.0.ln_1.bias": torch.zeros(3)}, checkpoint / "model.safetensors")
    with pytest.raises(WeightsMismatch, match=r"has no encoder\.embeddings\.cls_token"):
        load_captioner(describe(checkpoint))


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "tf_model.h5")
    with pytest.raises(WeightsMismatch, match=r"has no model\.safetensors .*tf_model\.h5"):
        load_captioner(describe(checkpoint))


def test_a_name_in_two_shards_is_refused(
    tmp_path: Path, reference: Callable[..., Any], save_reference: Callable[..., Path]
) -> None:
    as_shards(reference(3), tmp_path, save_reference)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value}, second)
    with pytest.raises(WeightsMismatch, match=f"is both in {first.name} and in {second.name}"):
        load_captioner(describe(tmp_path))


def test_the_file_may_change_once_it_is_loaded(checkpoint: Path) -> None:
    ours = load_captioner(describe(checkpoint))
    before = ours.decoder.wte.weight.detach().clone()
    path = checkpoint / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(ours.decoder.wte.weight, before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_the_weights(
    tmp_path: Path, reference: Callable[..., Any], save_reference: Callable[..., Path]
) -> None:
    wide = {"hidden_size": 256, "num_attention_heads": 4}
    decoder = {"n_embd": 768, "n_head": 4, "n_layer": 2, "n_inner": None, "vocab_size": 5000}
    as_bin(reference(3, tied=True, encoder=wide, decoder=decoder), tmp_path, save_reference)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    script = """
        import sys
        from diptych.weights.files import describe
        from diptych.weights.load import load_captioner
        def read(word):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(word))
        model = describe(sys.argv[1])
        open("/proc/self/clear_refs", "w").write("5")
        before = read("VmRSS")
        captioner = load_captioner(model)
        print(read("VmHWM") - before, read("VmRSS") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, kept = map(int, done.stdout.split())
    largest = 4 * 4 * 768 * 768  # one matrix of the MLP, read and then transposed
    assert size > 90e6
    assert kept < size * 1.05 + 4e6
    assert peak < size + largest + 16e6
