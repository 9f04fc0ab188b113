"""The captioner against transformers: files on disk → both → the same words."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych import Caption, Captioner
from diptych.errors import BadImage, BadInput, UnknownModel
from diptych.runtimes.on_torch import ChoosingDecoder
from diptych.runtimes.on_torch_held import HoldingDecoder
from replicas import Replica
from tiny_models import make_captioner, make_photo, write_json
from traced import untraced

VARIANTS: list[dict[str, Any]] = [
    {},
    {"encoder": {"hidden_size": 48, "num_attention_heads": 3}},  # enc_to_dec_proj
    {"encoder_type": "deit"},
    {"decoder": {"n_layer": 1, "n_inner": 80, "activation_function": "relu"}},
    {"decoder": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}},
    {"encoder": {"hidden_act": "gelu_new", "qkv_bias": False}, "decoder": {"n_head": 2}},
]
OPTIONS: list[dict[str, Any]] = [
    {"max_length": 16},
    {"max_length": 16, "num_beams": 4},
    {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.4},
    {"max_length": 14, "num_beams": 2, "early_stopping": True, "no_repeat_ngram_size": 2},
    {"max_length": 12, "num_beams": 5, "early_stopping": "never", "length_penalty": -0.7},
    {"max_length": 18, "repetition_penalty": 1.4, "min_length": 8},
    {"max_length": 18, "repetition_penalty": 0.8, "num_beams": 3, "min_length": 6},
]


@untraced()
def reference_captions(model: Any, folder: Path, photos: list[Image.Image], **options: Any) -> Any:
    """Caption with transformers, picture by picture: [(token_ids, score)] of every sequence."""
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil.from_pretrained(folder)
    results = []
    for photo in photos:
        pixels = processor(photo, return_tensors="pt").pixel_values
        with torch.no_grad():
            out = model.generate(
                pixels, return_dict_in_generate=True, output_scores=True, **options
            )
        rows = []
        for index, sequence in enumerate(out.sequences[:, 1:].tolist()):
            end = sequence.index(0) + 1 if 0 in sequence else len(sequence)
            score = float(out.sequences_scores[index]) if options.get("num_beams", 1) > 1 else None
            rows.append((tuple(sequence[:end]), score))
        results.append(rows)
    return results


@pytest.mark.parametrize("seed", range(6))
def test_tokens_and_scores_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    variant = VARIANTS[seed % len(VARIANTS)]
    model = make_captioner(tmp_path, seed, **variant)
    photos = [make_photo(seed * 100 + index) for index in range(3)]
    captioner = Captioner.load(tmp_path, runtime="torch")
    decoder: Any = captioner.networks["decoder"]
    if seed % 3 == 1:  # as on a GPU that is not NVIDIA's
        captioner.networks["decoder"] = ChoosingDecoder(decoder._module)
    if seed % 3 == 2:  # as on one that is
        captioner.networks["decoder"] = HoldingDecoder(decoder._module, Replica)
    for options in OPTIONS:
        captions = captioner.caption(photos, **options)
        if seed % 3 == 2:  # the cache is held from the second time on
            before, captions = captions, captioner.caption(photos, **options)
            assert [c.token_ids for c in captions] == [c.token_ids for c in before]
        expected = reference_captions(model, tmp_path, photos, **options)
        for caption, rows in zip(captions, expected, strict=True):
            ours = [caption, *caption.alternatives]
            assert [c.token_ids for c in ours] == [ids for ids, _ in rows], options
            for each, (_, score) in zip(ours, rows, strict=True):
                assert score is None or each.score == pytest.approx(score, abs=1e-4)


def test_random_models_do_not_all_say_the_same(tmp_path: Path) -> None:
    """Guard the parity above: captions that never vary would prove nothing."""
    make_captioner(tmp_path, 0)
    captioner = Captioner.load(tmp_path, runtime="torch")
    photos = [make_photo(seed) for seed in range(8)]
    captions = captioner.caption(photos, max_length=16, num_beams=4)
    assert len({caption.token_ids for caption in captions}) >= 4
    assert len({len(caption.token_ids) for caption in captions}) >= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioner")
    make_captioner(path, 3)
    return path


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.load(folder, runtime="torch")


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True, "seed": 5}])
def test_batches_do_not_change_a_caption(captioner: Captioner, options: dict[str, Any]) -> None:
    photos = [make_photo(seed) for seed in range(9)]
    alone = [
        captioner.caption(photo, **{**options, **seeded(options, index)})
        for index, photo in enumerate(photos)
    ]
    for batch_size in (1, 2, 4, 8, 9):
        together = captioner.caption(photos, batch_size=batch_size, **options)
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.text for c in together] == [c.text for c in alone]


def seeded(options: dict[str, Any], index: int) -> dict[str, int]:
    return {"seed": options["seed"] + index} if "seed" in options else {}


def test_unreadable_neighbours_change_nothing(captioner: Captioner) -> None:
    photos: list[Any] = [make_photo(seed) for seed in range(4)]
    for options in ({"num_beams": 2}, {"do_sample": True, "seed": 0}):
        whole = captioner.caption(photos, **options)
        holed = captioner.caption([photos[0], b"nonsense", *photos[2:]], **options)
        assert holed[1].error is not None and holed[1].text == ""
        assert [c.text for c in holed[2:]] == [c.text for c in whole[2:]]


def test_errors_of_pictures(captioner: Captioner, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jpg"
    with pytest.raises(BadImage, match=r"nowhere\.jpg"):
        captioner.caption(missing)
    good = make_photo(1)
    captions = captioner.caption([good, missing, good])
    assert isinstance(captions[1].error, BadImage) and "nowhere.jpg" in str(captions[1].error)
    assert captions[0].text == captions[2].text and captions[0].error is None
    with pytest.raises(BadImage):
        captioner.caption([good, missing], on_error="raise")
    with pytest.raises(BadInput, match="empty"):
        captioner.caption([])
    with pytest.raises(BadInput, match="num_beam"):
        captioner.caption(good, num_beam=3)
    with pytest.raises(BadInput, match="batch_size"):
        captioner.caption([good], batch_size=0)
    with pytest.raises(BadInput, match="max_length"):
        captioner.caption(good, max_length=5000)


def test_one_in_one_out_and_list_in_list_out(captioner: Captioner, tmp_path: Path) -> None:
    photo = make_photo(5)
    photo.save(tmp_path / "photo.png")
    array = np.asarray(photo)
    one = captioner.caption(photo)
    assert isinstance(one, Caption)
    for same in (str(tmp_path / "photo.png"), tmp_path / "photo.png", array):
        assert captioner.caption(same).token_ids == one.token_ids
    assert captioner.caption((tmp_path / "photo.png").read_bytes()) == one
    with (tmp_path / "photo.png").open("rb") as file:
        assert captioner.caption(file) == one
    assert captioner.caption([photo]) == [one]
    # In a batch the last bit of a probability may differ; the words may not.
    for several in ((each for each in (photo, photo)), np.stack([array, array])):
        assert [c.token_ids for c in captioner.caption(several)] == [one.token_ids] * 2


def test_caption_is_plain_data(captioner: Captioner) -> None:
    caption = captioner.caption(make_photo(2), num_beams=2, num_return_sequences=2)
    assert len(caption.token_ids) == len(caption.token_logprobs)
    assert 0 < caption.probability <= 1
    assert caption.probability == pytest.approx(
        math.exp(sum(caption.token_logprobs) / len(caption.token_ids))
    )
    assert caption.score >= caption.alternatives[0].score
    assert pickle.loads(pickle.dumps(caption)) == caption
    assert json.loads(json.dumps(caption.as_dict()))["text"] == caption.text
    with pytest.raises(AttributeError):
        caption.text = "other"  # type: ignore[misc]


def test_prompt_is_continued(captioner: Captioner, folder: Path) -> None:
    photo = make_photo(8)
    free = captioner.caption(photo, max_new_tokens=8)
    led = captioner.caption(photo, prompt="a red bus", max_new_tokens=8)
    assert led.text.startswith("a red bus") and len(led.token_ids) <= 8
    assert led.token_ids != free.token_ids


def test_a_prompt_is_what_the_reference_reads_as_its_first_words(folder: Path) -> None:
    from transformers import VisionEncoderDecoderModel, ViTImageProcessorPil

    reference = VisionEncoderDecoderModel.from_pretrained(folder)
    processor = ViTImageProcessorPil.from_pretrained(folder)
    captioner = Captioner.load(folder, runtime="torch")
    words = [0, *captioner.tokenizer.encode("a red bus")]
    for seed in range(5):
        ids = list(words)
        pixels = processor(make_photo(seed), return_tensors="pt").pixel_values
        while len(ids) < len(words) + 8 and (len(ids) == len(words) or ids[-1] != 0):
            with torch.no_grad():
                logits = reference(pixels, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        led = captioner.caption(make_photo(seed), prompt="a red bus ", max_new_tokens=8)
        assert list(led.token_ids) == ids[len(words) :]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}, {"prompt": "a cat "}]
)
def test_stream_adds_up(captioner: Captioner, options: dict[str, Any]) -> None:
    for seed in range(4):
        photo = make_photo(seed)
        pieces = list(captioner.stream(photo, **options))
        assert "".join(pieces) == captioner.caption(photo, **options).text
        if "num_beams" not in options:
            assert len(pieces) > 1


def test_stream_tells_errors_before_the_first_piece(captioner: Captioner) -> None:
    with pytest.raises(BadImage):
        captioner.stream(b"nonsense")
    with pytest.raises(BadInput, match="num_return_sequences"):
        captioner.stream(make_photo(0), num_beams=2, num_return_sequences=2)


def test_heatmap_is_the_reference_models_cross_attention(folder: Path) -> None:
    from transformers import VisionEncoderDecoderModel, ViTImageProcessorPil

    reference = VisionEncoderDecoderModel.from_pretrained(folder, attn_implementation="eager")
    photo = make_photo(3)
    captioner = Captioner.load(folder, runtime="torch")
    caption = captioner.caption(photo, prompt="a man riding", max_new_tokens=6)
    ids = [*captioner.tokenizer.encode("a man riding"), *caption.token_ids]
    pixels = ViTImageProcessorPil.from_pretrained(folder)(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = reference(
            pixels, decoder_input_ids=torch.tensor([[0, *ids[:-1]]]), output_attentions=True
        )
    looked = torch.stack(out.cross_attentions).mean((0, 2))[0]  # tokens, picture tokens
    spans = captioner.tokenizer.spans(ids)
    text = captioner.tokenizer.decode(ids)
    start = text.index("man")
    tokens = [i for i, (a, b) in enumerate(spans) if a < start + len("man") and start < b]
    expected = looked[tokens].mean(0)[1:].reshape(4, 4)
    np.testing.assert_allclose(caption.heatmap("man"), expected, atol=1e-5)
    np.testing.assert_allclose(caption.heatmap(1), expected, atol=1e-5)
    assert caption.heatmap().shape == (4, 4)
    with pytest.raises(BadInput, match="zebra"):
        caption.heatmap("zebra")
    with pytest.raises(BadInput, match="anew"):
        pickle.loads(pickle.dumps(caption)).heatmap()


def test_checkpoints_generation_config_holds_where_nothing_is_said(tmp_path: Path) -> None:
    make_captioner(tmp_path, 4)
    write_json(tmp_path / "generation_config.json", max_length=7, num_beams=3)
    captioner = Captioner.load(tmp_path, runtime="torch")
    caption = captioner.caption(make_photo(0))
    assert caption.options.num_beams == 3 and len(caption.token_ids) <= 6
    assert captioner.caption(make_photo(0), num_beams=1).options.num_beams == 1


def test_save_and_load_keep_every_word(captioner: Captioner, tmp_path: Path) -> None:
    from transformers import VisionEncoderDecoderModel

    captioner.save(tmp_path / "copy")
    photos = [make_photo(seed) for seed in range(3)]
    copy = Captioner.load(tmp_path / "copy", runtime="torch")
    assert copy.caption(photos, num_beams=2) == captioner.caption(photos, num_beams=2)
    reference = VisionEncoderDecoderModel.from_pretrained(tmp_path / "copy")
    expected = reference_captions(reference, tmp_path / "copy", photos, max_length=16)
    ours = captioner.caption(photos, max_length=16)
    assert [c.token_ids for c in ours] == [rows[0][0] for rows in expected]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_export_says_the_same_without_torch(
    captioner: Captioner, tmp_path: Path, quantize: str | None
) -> None:
    report = captioner.export(tmp_path / "onnx", quantize=quantize)
    assert json.loads((tmp_path / "onnx" / "export.json").read_text()) == report
    photos = [make_photo(seed) for seed in range(5)]
    exported = Captioner.load(tmp_path / "onnx")
    assert exported.networks.runtime == "onnxruntime"
    if quantize is None:
        for options in ({}, {"num_beams": 3}):
            ours, theirs = (c.caption(photos, **options) for c in (captioner, exported))
            assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        heat = exported.caption(photos[0]).heatmap()
        np.testing.assert_allclose(heat, captioner.caption(photos[0]).heatmap(), atol=1e-4)
    paths = []
    for index, photo in enumerate(photos):
        photo.save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from diptych import Captioner\n"
        "captioner = Captioner.load(sys.argv[1])\n"
        "for c in captioner.caption(sys.argv[2:], num_beams=3): print(list(c.token_ids))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "onnx"), *paths],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert run.returncode == 0, run.stderr
    told = [tuple(json.loads(line)) for line in run.stdout.splitlines()]
    assert told == [c.token_ids for c in exported.caption(photos, num_beams=3)]


def test_unknown_model_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no-such-model"):
        Captioner.load("no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownModel, match="empty"):
        Captioner.load(tmp_path / "empty")


@pytest.mark.parametrize(
    "choice",
    [{"runtime": "onnx"}, {"device": "tpu"}, {"dtype": "int3"}, {"runtime": "onnxruntime"}],
)
def test_impossible_choices_are_told(folder: Path, choice: dict[str, str]) -> None:
    with pytest.raises(BadInput, match=next(iter(choice.values()))):
        Captioner.load(folder, **choice)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_length": 16}, {"max_length": 16, "num_beams": 4}])
def test_full_size_model_says_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """239 M random weights through files on disk, at 224 pixels and 50257 words."""
    size = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    model = make_captioner(
        tmp_path,
        0,
        encoder={
            **size,
            "intermediate_size": 3072,
            "image_size": 224,
            "patch_size": 16,
            "initializer_range": 0.06,
        },
        decoder={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "initializer_range": 0.06,
        },
    )
    write_json(tmp_path / "preprocessor_config.json", size={"height": 224, "width": 224})
    rng = random.Random(1)
    photos = [make_photo(rng.randrange(10**6), (640, 480)) for _ in range(2)]
    captions = Captioner.load(tmp_path, runtime="torch").caption(photos, **options)
    expected = reference_captions(model, tmp_path, photos, **options)
    for caption, rows in zip(captions, expected, strict=True):
        assert caption.token_ids == rows[0][0]
        assert rows[0][1] is None or caption.score == pytest.approx(rows[0][1], abs=1e-4)
