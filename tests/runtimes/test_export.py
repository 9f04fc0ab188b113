"""The artifact beside the module it came from: tensors, words, files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diptych.errors import BadInput, QualityLoss, UnsupportedModel, WeightsMismatch
from diptych.runtimes.graph import read_network
from diptych.runtimes.network import Network, gather_rows, open_networks
from diptych.runtimes.on_torch import torch_networks
from diptych.weights.files import describe, verify

ALL = ["cross-attention", "prefix", "deit", "enc_to_dec_proj", "stem", "untied", "odd"]
OUTPUTS = ("logits", "present_key_values", "image_attention")
TOLERANCE = 1e-4

Make = Callable[..., Any]


def bridge_of(captioner: Any) -> str:
    return "prefix_embeds" if captioner.config.bridge == "prefix" else "cross_key_values"


def largest(one: Any, other: Any) -> float:
    assert np.asarray(one).shape == np.asarray(other).shape
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.mark.parametrize("variant", ALL)
def test_networks_compute_what_the_modules_do(
    variant: str, module: Make, artifacts: Make, pictures: Make
) -> None:
    """Two pictures, prefill of three words, then single words, two at once, and three beams."""
    captioner = module(variant)
    ours = torch_networks(captioner)
    theirs = open_networks(describe(artifacts(variant) / "fp32"))
    bridge = bridge_of(captioner)
    made = [side["encoder"](pixel_values=pictures(2))[0] for side in (ours, theirs)]
    assert largest(*made) < TOLERANCE
    caches: list[Any] = [None, None]
    random = np.random.default_rng(1)
    for count, beams in ((3, 1), (1, 3), (1, 1), (2, 1)):
        if beams > 1:
            rows = np.repeat(np.arange(2), beams)
            caches = [gather_rows(cache, rows) for cache in caches]
        rows_now = 2 if caches[0] is None else caches[0].shape[2]
        words = random.integers(0, 400, (rows_now, count))
        sides = []
        for side, cache, bridged in zip((ours, theirs), caches, made, strict=True):
            given = {"past_key_values": cache, bridge: bridged}
            sides.append(side["decoder"](OUTPUTS, input_ids=words, **given))
        for name, one, other in zip(OUTPUTS, *sides, strict=True):
            assert largest(one, other) < TOLERANCE, name
        assert float(sides[0][2].std()) > 1e-3  # not a flat map, which any network would match
        caches = [side[1] for side in sides]
        if bridge == "prefix_embeds":
            made = [None, None]


@pytest.mark.parametrize("variant", ["cross-attention", "prefix"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cache_changes_nothing(
    variant: str, precision: str, artifacts: Make, pictures: Make
) -> None:
    """Word by word with a cache, and all words at once without one: the same next words."""
    networks = open_networks(describe(artifacts(variant) / precision))
    bridge = "prefix_embeds" if variant == "prefix" else "cross_key_values"
    (bridged,) = networks["encoder"](pixel_values=pictures(3))
    words, past, given = np.zeros((3, 1), np.int64), None, bridged
    step = words
    for _ in range(8):
        logits, past = networks["decoder"](input_ids=step, past_key_values=past, **{bridge: given})
        whole, cache = networks["decoder"](input_ids=words, **{bridge: bridged})
        assert largest(logits, whole) < (TOLERANCE if precision == "fp32" else 0.2)
        assert largest(past, cache) < (TOLERANCE if precision == "fp32" else 0.2)
        assert (logits.argmax(-1) == whole.argmax(-1)).all()
        step = logits.argmax(-1)[:, None]
        words = np.concatenate([words, step], axis=1)
        given = None if variant == "prefix" else bridged


def test_beams_share_the_pictures_keys(artifacts: Make, pictures: Make) -> None:
    decoder = open_networks(describe(artifacts("cross-attention") / "fp32"))
    (bridged,) = decoder["encoder"](pixel_values=pictures(2))
    words = np.random.default_rng(3).integers(0, 400, (6, 1))
    shared = decoder["decoder"](OUTPUTS, input_ids=words, cross_key_values=bridged)
    repeated = gather_rows(bridged, np.repeat(np.arange(2), 3))
    alone = decoder["decoder"](OUTPUTS, input_ids=words, cross_key_values=repeated)
    for one, other in zip(shared, alone, strict=True):
        assert largest(one, other) < 1e-5


def test_gathered_caches_are_taken_in_any_memory_order(artifacts: Make, pictures: Make) -> None:
    networks = open_networks(describe(artifacts("cross-attention") / "fp32"))
    (bridged,) = networks["encoder"](pixel_values=pictures(3))
    rows = np.array([2, 0])
    words = np.array([[5], [7]])
    _, past = networks["decoder"](
        input_ids=np.array([[5], [6], [7]]), cross_key_values=bridged, past_key_values=None
    )
    straight = [gather_rows(each, rows) for each in (past, bridged)]
    crooked = [each[:, :, rows] for each in (past, bridged)]
    assert not crooked[0].flags.c_contiguous
    found = [
        networks["decoder"](input_ids=words, past_key_values=one, cross_key_values=other)
        for one, other in (straight, crooked, crooked)
    ]
    for logits, present in found[1:]:
        assert largest(logits, found[0][0]) == 0
        assert largest(present, found[0][1]) == 0


@pytest.mark.parametrize("variant", ALL)
def test_words_are_those_of_torch(variant: str, artifacts: Make) -> None:
    report = json.loads((artifacts(variant) / "fp32" / "export.json").read_text())
    tokens = report["fp32"]["tokens"]
    assert (tokens["images"], tokens["identical"]) == (8, 8)
    assert tokens["first_difference"] is None
    assert tokens["tokens"] > 8
    worst = report["fp32"]["networks"]
    assert max(worst["encoder"]["max_abs_difference"].values()) < TOLERANCE
    assert set(worst["decoder"]["max_abs_difference"]) == set(OUTPUTS)
    assert set(report["versions"]) >= {"torch", "onnx", "onnxruntime", "diptych"}


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_are_stored_once(
    variant: str, precision: str, module: Make, artifacts: Make
) -> None:
    """Hold each file against the numbers of the module: no copy, no transpose beside it."""
    folder = artifacts(variant) / precision
    sizes = {name: tensor.numel() for name, tensor in module(variant).state_dict().items()}
    numbers = {
        "decoder": sum(
            size
            for name, size in sizes.items()
            if name.startswith("decoder.") and ".crossattention.c_attn" not in name
        )
    }
    numbers["encoder"] = sum(sizes.values()) - numbers["decoder"]
    for network, count in numbers.items():
        data = (folder / f"{network}.onnx.data").stat().st_size
        pages = 4096 * len(
            onnx.load(folder / f"{network}.onnx", load_external_data=False).graph.initializer
        )
        per_number = 4 if precision == "fp32" else 1.3
        assert data < per_number * count + pages
        whole = [a for a in read_network(folder / f"{network}.onnx")[1].values() if a.ndim > 1]
        words = [a for a in whole if 400 in a.shape]
        tied = network == "decoder" and variant != "untied"
        held = {(a.offset, a.dtype) for a in words if isinstance(a, np.memmap)}
        if tied and precision == "fp32":
            assert len(held) == 1
        if network == "encoder":
            assert not words


def test_head_and_words_share_their_bytes(artifacts: Make) -> None:
    for precision, suffixes in (("fp32", ("",)), ("int8", (".int8",))):
        model = onnx.load(
            artifacts("prefix") / precision / "decoder.onnx", load_external_data=False
        )
        places = {
            tensor.name: [entry.value for entry in tensor.external_data]
            for tensor in model.graph.initializer
        }
        for suffix in suffixes:
            assert places[f"decoder.head.weight{suffix}"] == places[f"decoder.wte.weight{suffix}"]
            assert places[f"decoder.head.weight{suffix}"]


def test_files_are_sound_onnx(artifacts: Make) -> None:
    for precision in ("fp32", "int8"):
        for network in ("encoder", "decoder"):
            path = artifacts("cross-attention") / precision / f"{network}.onnx"
            model = onnx.load(path)
            assert {each.domain for each in model.opset_import} == {"", "com.microsoft"}
            assert model.producer_name == "diptych"
            names = [tensor.name for tensor in model.graph.initializer]
            assert len(names) == len(set(names))


def test_batch_norm_is_folded(artifacts: Make) -> None:
    model = onnx.load(artifacts("stem") / "fp32" / "encoder.onnx", load_external_data=False)
    ops = {node.op_type for node in model.graph.node}
    assert "Conv" in ops
    assert "BatchNormalization" not in ops


def test_folder_holds_what_an_artifact_needs(artifacts: Make) -> None:
    folder = artifacts("cross-attention") / "fp32"
    model = describe(folder)
    verify(model)
    assert (model.precision, model.generation["decoder_start_token_id"]) == ("fp32", 0)
    document = json.loads((folder / "artifact.json").read_text())
    assert document["source"] == {"name": "random", "revision": None}
    for entry in document["networks"].values():
        for each in (entry, entry["data"]):
            found = hashlib.sha256((folder / each["file"]).read_bytes()).hexdigest()
            assert found == each["sha256"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "artifact.json",
        "decoder.onnx",
        "decoder.onnx.data",
        "encoder.onnx",
        "encoder.onnx.data",
        "export.json",
        "tokenizer.json",
    ]


def test_export_leaves_the_module_alone(module: Make, export: Make, tmp_path: Path) -> None:
    captioner = module("stem").train()
    before = {name: tensor.clone() for name, tensor in captioner.state_dict().items()}
    report = export(captioner, tmp_path / "a", images=None)
    assert report["fp32"]["tokens"]["images"] == 32
    assert captioner.training
    after = captioner.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [*before] == [*after]


def test_other_dtypes_are_exported_as_float32(module: Make, export: Make, tmp_path: Path) -> None:
    captioner = module("prefix").to(torch.bfloat16)
    export(captioner, tmp_path / "a")
    assert captioner.decoder.wte.weight.dtype == torch.bfloat16
    _, weights = read_network(tmp_path / "a" / "decoder.onnx")
    assert weights["decoder.wte.weight"].dtype == np.float32


def test_quantized_export_keeps_no_float32(module: Make, export: Make, tmp_path: Path) -> None:
    report = export(module("prefix"), tmp_path / "a", mode="int8", force=True)
    assert set(report) == {"versions", "source", "fp32", "int8"}
    assert describe(tmp_path / "a").precision == "int8"
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and path != tmp_path / "a"]


def test_existing_folder_keeps_its_other_files(module: Make, export: Make, tmp_path: Path) -> None:
    (tmp_path / "model.card").write_text("mine")
    export(module("prefix"), tmp_path)
    export(module("prefix", seed=1), tmp_path)
    assert (tmp_path / "model.card").read_text() == "mine"
    verify(describe(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_what_spoke_of_the_model_before_is_removed(
    module: Make, export: Make, tmp_path: Path, tokenizer: Path
) -> None:
    """A tokenizer.json is read first: it would decode the new model's words."""
    export(module("prefix"), tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").exists()
    own = tmp_path / "own"
    own.mkdir()
    document = json.loads(tokenizer.read_text("utf-8"))["model"]
    (own / "vocab.json").write_text(json.dumps(document["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in document["merges"]]
    (own / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    export(module("prefix", seed=1), tmp_path / "a", tokenizer=own / "vocab.json")
    assert describe(tmp_path / "a").tokenizer.name == "vocab.json"
    (tmp_path / "b" / "encoder.onnx").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"encoder\.onnx is a folder: give another"):
        export(module("prefix"), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize("mode", [None, "fp16", "int8"])
def test_weights_that_are_no_numbers_are_no_export(
    module: Make, export: Make, tmp_path: Path, mode: str | None
) -> None:
    captioner = module("prefix", seed=3)
    with torch.no_grad():
        next(p for n, p in captioner.named_parameters() if "mlp" in n and p.dim() == 2)[0, 0] = (
            float("nan")
        )
    with pytest.raises(UnsupportedModel, match="logits are not finite"):
        export(captioner, tmp_path / "a", mode=mode, force=True)
    assert list(tmp_path.iterdir()) == []


def test_edge_never_exceeds_its_size_in_silence(
    module: Make, export: Make, tmp_path: Path, pictures: Make
) -> None:
    words = {"mode": "int8", "calibration": list(pictures(2)), "most_bytes": 1000}
    with pytest.raises(QualityLoss, match=r"MB as int8, and 0\.0 are allowed"):
        export(module("cross-attention"), tmp_path / "a", images=None, **words)
    export(module("cross-attention"), tmp_path / "a", images=None, force=True, **words)


def test_cut_weights_are_told_by_their_size(own: Path, tmp_path: Path) -> None:
    data = own / "encoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(WeightsMismatch, match=r"encoder\.onnx\.data has \d+ bytes and not \d+"):
        describe(own)


def test_failed_export_leaves_nothing(
    module: Make, export: Make, tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        export(module("prefix"), tmp_path / "a", tokenizer=tokenizer.with_name("gone.json"))
    with pytest.raises(BadInput, match="is a file"):
        export(module("prefix"), tokenizer)
    with pytest.raises(BadInput, match="quantize is 'int3': give fp16, int8 or int4"):
        export(module("prefix"), tmp_path / "a", mode="int3")
    with pytest.raises(BadInput, match="list of images to compare on is empty"):
        export(module("prefix"), tmp_path / "a", images=[])
    assert list(tmp_path.iterdir()) == []


def test_unknown_activation_is_refused(module: Make, export: Make, tmp_path: Path) -> None:
    from diptych.models import layers

    captioner = module("prefix")
    config = captioner.config
    object.__setattr__(config.decoder, "hidden_act", "mish")
    layers.ACTIVATIONS["mish"] = torch.nn.functional.mish
    try:
        with pytest.raises((UnsupportedModel, BadInput)):
            export(captioner, tmp_path / "a")
    finally:
        del layers.ACTIVATIONS["mish"]


def test_differences_are_reported(
    module: Make, export: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An artifact that says something else must not pass silently."""
    from diptych.runtimes import agreement

    expected, found = [[1, 2, 3], [4, 5], [6]], [[1, 2, 3], [4, 9], [6, 7]]
    assert agreement.compare_tokens(expected, found) == {
        "images": 3,
        "identical": 1,
        "tokens": 6,
        "agreeing": 5,
        "first_difference": {"image": 1, "position": 1},
    }
    shorter = agreement.compare_tokens([[6, 7]], [[6]])
    assert shorter["first_difference"] == {"image": 0, "position": 1}


def test_seeded_pictures_look_like_pictures() -> None:
    from diptych.runtimes.agreement import pictures_for

    config = {"encoder": {"num_channels": 3, "image_size": 64}}
    drawn = pictures_for(config, {}, None, 4)
    assert all(
        np.array_equal(a, b) for a, b in zip(drawn, pictures_for(config, {}, None, 4), strict=True)
    )
    for picture in drawn:
        assert picture.shape == (3, 64, 64)
        assert -1 <= picture.min() < picture.max() <= 1
        # Neighbours resemble each other, as in photographs.
        assert np.corrcoef(picture[0, :, :-1].ravel(), picture[0, :, 1:].ravel())[0, 1] > 0.8


class Flipped:
    """A network whose logits are off."""

    def __init__(self, network: Network) -> None:
        self.network, self.inputs, self.outputs = network, network.inputs, network.outputs

    def __call__(self, wanted: Any = None, /, **arrays: Any) -> tuple[Any, ...]:
        logits, *rest = self.network(wanted, **arrays)
        return (-logits, *rest)


def test_drift_is_found(artifacts: Make, pictures: Make) -> None:
    from diptych.runtimes.agreement import compare_tensors, compare_tokens, greedy_tokens

    model = describe(artifacts("prefix") / "fp32")
    good = open_networks(model)
    bad = {"encoder": good["encoder"], "decoder": Flipped(good["decoder"])}
    given = (pictures(4), model.config, model.generation)
    compared = compare_tokens(greedy_tokens(good, *given), greedy_tokens(bad, *given))
    assert compared["identical"] < 4
    worst = compare_tensors(good, bad, pictures(1)[0], model.config, model.generation)
    assert worst["decoder"]["logits"] > 0.1
    assert worst["encoder"]["prefix_embeds"] == 0
