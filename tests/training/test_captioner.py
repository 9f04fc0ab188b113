"""Fine-tuned captioners beside transformers: the same loss, the same steps, files it loads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diptych import Captioner
from diptych.errors import BadInput, UnsupportedModel, WeightsMismatch
from diptych.evaluation.caption_metrics import CiderD, DocumentFrequency
from diptych.training.captioner import CaptionerTask, captioner_defaults, open_captioner
from diptych.training.data import prepare
from diptych.training.finetune import finetune_captioner
from diptych.training.options import CaptionerTrainOptions
from diptych.training.parallel import Workers
from diptych.training.workplace import Workplace
from diptych.weights.files import describe
from diptych.weights.load import load_captioner
from diptych.weights.load_parts import load_parts
from tiny_models import make_tokenizer
from traced import untraced

SMALL: dict[str, Any] = {
    "max_train_steps": 3,
    "train_batch_size": 3,
    "dropout": 0.0,
    "label_smoothing": 0.0,
    "learning_rate": 1e-3,
    "validation_fraction": 0.25,
}


def make_task(model: Path, data: Path, folder: Path, **words: Any) -> CaptionerTask:
    options = CaptionerTrainOptions(**{**SMALL, **words})
    options = options.resolve(captioner_defaults(options, is_new=False))
    dataset = prepare(data, validation_fraction=0.25)
    return CaptionerTask(
        open_captioner(str(model), None, options, device=torch.device("cpu")),
        dataset,
        options,
        Workplace(folder, torch.device("cpu"), Workers.alone()),
    )


@untraced()
def reference(model: Path) -> Any:
    from transformers import VisionEncoderDecoderModel

    return VisionEncoderDecoderModel.from_pretrained(model)


def reference_loss(theirs: Any, task: CaptionerTask, number: int) -> torch.Tensor:
    """Return the loss that transformers computes itself, from labels."""
    draws = task._draws(number)
    longest = max(len(draw.token_ids) for draw in draws) + 1
    labels = torch.full((len(draws), longest), -100)
    for row, draw in enumerate(draws):
        labels[row, : len(draw.token_ids) + 1] = torch.tensor([*draw.token_ids, task._end])
    theirs.config.pad_token_id = task._end
    theirs.config.decoder_start_token_id = task._start
    loss: torch.Tensor = theirs(pixel_values=task._pixels(draws), labels=labels).loss
    return loss


def test_the_loss_is_that_of_transformers(tmp_path: Path, vit_gpt2: Path, pictures: Path) -> None:
    task, theirs = make_task(vit_gpt2, pictures, tmp_path), reference(vit_gpt2).eval()
    for number in range(3):
        with torch.no_grad():
            ours = task.losses(number, slice(None)).sum() / 3
            torch.testing.assert_close(ours, reference_loss(theirs, task, number))


def test_the_loss_is_shared_between_processes(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    task = make_task(vit_gpt2, pictures, tmp_path)
    with torch.no_grad():
        whole = task.losses(1, slice(None)).sum()
        parts = [task.losses(1, slice(rank, None, 2)).sum() for rank in range(2)]
        none = task.losses(1, slice(7, None, 8))
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert none.numel() == 0


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        ("none", ()),
        ("encoder", ("encoder.",)),
        ("decoder", ("decoder.wte", "decoder.h.0.attn", "decoder.ln_f", "decoder.h.1.mlp")),
    ],
)
def test_steps_are_those_of_transformers(
    tmp_path: Path, vit_gpt2: Path, pictures: Path, freeze: str, still: Sequence[str]
) -> None:
    words = {"freeze": freeze, "cache_encoder": False}
    task, theirs = make_task(vit_gpt2, pictures, tmp_path / "probe", **words), reference(vit_gpt2)
    start = {name: each.clone() for name, each in theirs.state_dict().items()}
    theirs.requires_grad_(False)
    for name, each in theirs.named_parameters():
        is_between = "cross" in name or "enc_to_dec_proj" in name
        part = name.split(".")[0]
        each.requires_grad_("pooler" not in name and (part != freeze or is_between))
    learning = [each for each in theirs.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=1e-2)
    theirs.eval()
    for number in range(3):
        optimizer.zero_grad()
        reference_loss(theirs, task, number).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    finished = finetune_captioner(pictures, tmp_path / "run", vit_gpt2, **{**SMALL, **words})
    written = reference(finished.files[0]).state_dict()
    way = gap = 0.0
    for name, each in theirs.state_dict().items():
        if "pooler" in name:
            continue
        gap += float((written[name] - each).square().sum())
        way += float((each - start[name]).square().sum())
    assert way > 0
    assert gap**0.5 < 0.02 * way**0.5
    ours = load_file(finished.files[0] / "model.safetensors")
    before = load_file(vit_gpt2 / "model.safetensors")
    for part in still:
        spelled = part.replace("decoder.", "decoder.transformer.")
        names = [name for name in ours if name.startswith(spelled) and "cross" not in name]
        assert names
        assert all(torch.equal(ours[name], before[name]) for name in names)


def test_it_captions_as_transformers_does_with_its_file(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    from transformers import ViTImageProcessorPil

    finished = finetune_captioner(pictures, tmp_path, vit_gpt2, **{**SMALL, "max_train_steps": 20})
    model = finished.files[0]
    item = prepare(pictures).train[0]
    ours = Captioner.load(model, runtime="torch").caption(item.open(), num_beams=1, max_length=12)
    theirs = reference(model).eval()
    pixels = ViTImageProcessorPil.from_pretrained(model)(
        item.open(), return_tensors="pt"
    ).pixel_values
    ids = theirs.generate(pixels, num_beams=1, max_length=12, do_sample=False)[0].tolist()
    assert ids[1 : 1 + len(ours.token_ids)] == list(ours.token_ids)


def test_a_cached_encoder_changes_little(tmp_path: Path, vit_gpt2: Path, pictures: Path) -> None:
    """What it says is kept in half precision, alike in a run that goes on."""
    cached = make_task(vit_gpt2, pictures, tmp_path, freeze="encoder")
    plain = make_task(vit_gpt2, pictures, tmp_path, freeze="encoder", cache_encoder=False)
    with torch.no_grad():
        first = cached.losses(0, slice(None))
        again = cached.losses(0, slice(None))
        torch.testing.assert_close(first, plain.losses(0, slice(None)), rtol=2e-3, atol=2e-3)
    assert torch.equal(first, again)
    assert list((tmp_path / "cache" / "encoder").rglob("*.safetensors"))


def test_a_cached_encoder_goes_with_bfloat16(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    words = {**SMALL, "freeze": "encoder", "mixed_precision": "bf16"}
    finished = finetune_captioner(pictures, tmp_path / "run", vit_gpt2, **words)
    assert finished.end is not None and math.isfinite(finished.end)


def test_lora_on_the_decoder_is_added_to_its_weights(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    words = {**SMALL, "method": "lora", "rank": 2, "learning_rate": 0.05, "max_train_steps": 6}
    finished = finetune_captioner(pictures, tmp_path, vit_gpt2, **words)
    ours, before = (load_file(path / "model.safetensors") for path in (finished.files[0], vit_gpt2))
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert changed
    assert all("attn" in name or "attention" in name for name in changed)
    assert all(name.startswith("decoder.") for name in changed)
    for name in changed:
        assert int(torch.linalg.matrix_rank(ours[name] - before[name], atol=1e-4)) <= 2
    assert finished.start is not None
    assert finished.end is not None
    assert finished.end != finished.start


@pytest.mark.no_cover  # the lines of a short run, again and again
def test_it_learns_captions_by_heart(tmp_path: Path, vit_gpt2: Path, pictures: Path) -> None:
    words = {**SMALL, "max_train_steps": 150, "train_batch_size": 6, "learning_rate": 3e-3}
    finished = finetune_captioner(pictures, tmp_path, vit_gpt2, **words)
    dataset = prepare(pictures, validation_fraction=0.25)
    captioner = Captioner.load(finished.files[0])
    made = captioner.caption([each.open() for each in dataset.train], num_beams=1, max_length=30)
    right = sum(m.text == each.captions[0] for m, each in zip(made, dataset.train, strict=True))
    assert right >= len(dataset.train) - 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    checked = [row for row in rows if "validation" in row]
    assert set(checked[0]["validation"]) == {"loss", "change", "cider", "bleu_4", "rouge_l"}
    assert checked[0]["captions"][0].keys() == {"file", "caption", "reference"}
    assert "a person" in (tmp_path / "report.html").read_text()


def test_the_default_model_learns_too(tmp_path: Path, pictures: Path) -> None:
    words = {"max_train_steps": 2, "train_batch_size": 2, "num_validation_images": 1}
    finished = finetune_captioner(pictures, tmp_path, **words)
    caption = Captioner.load(finished.files[0]).caption(pictures / "000.png")
    assert caption.text


# --- rewarded by CIDEr ----------------------------------------------------------------------------


def test_rewards_are_cider_against_the_others(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    task = make_task(vit_gpt2, pictures, tmp_path, self_critical_steps=3)
    draws = task._draws(0)
    end = task._end  # the last one was cut before its end
    drawn = [
        [(*draw.token_ids, end), (5, 6, 7, end), (5, 6, end), draw.token_ids[:3]] for draw in draws
    ]
    found = task._rewards(draws, drawn).view(len(draws), -1)
    everything = [[(*task._ids(c), task._end) for c in each.captions] for each in task._train]
    frequency = DocumentFrequency.from_references(everything)
    for index, draw in enumerate(draws):
        scorer = CiderD([[(*task._ids(c), task._end) for c in draw.item.captions]], frequency)
        scores = [scorer.score(0, tokens) for tokens in drawn[index]]
        for place, score in enumerate(scores):
            others = (sum(scores) - score) / 3
            assert float(found[index, place]) == pytest.approx(score - others, abs=1e-5)
        assert float(found[index, 0]) > 0, "the true caption is worth more than the others"


@pytest.mark.no_cover
def test_drawn_captions_follow_the_models_chances(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    task = make_task(vit_gpt2, pictures, tmp_path, max_length=4)  # the first words are counted
    draws = task._draws(0)[:1]
    with torch.no_grad():
        bridged = task._bridged(draws)
        first = torch.full((1, 1), task._start)
        chances = task.module.step(first, bridged)[0].softmax(-1)[0]
        counts = torch.zeros_like(chances)
        for seed in range(40):
            ((one, two, three, four),) = task._drawn_captions(
                bridged, torch.Generator().manual_seed(seed)
            )
            for tokens in (one, two, three, four):
                counts[tokens[0] if tokens else task._end] += 1
    best = int(chances.argmax())
    share = float(counts[best] / counts.sum())
    spread = 5 * float(chances[best] * (1 - chances[best]) / 160) ** 0.5
    assert abs(share - float(chances[best])) < spread + 1e-3


def test_rewarded_steps_raise_cider(tmp_path: Path, vit_gpt2: Path, pictures: Path) -> None:
    """Where one caption is right for every picture, it is said more often."""
    from training_pictures import draw_pictures

    data = draw_pictures(tmp_path / "data", 6, seed=3)
    words: dict[str, Any] = {
        **SMALL,
        "max_train_steps": 60,
        "self_critical_steps": 40,
        "self_critical_learning_rate": 2e-3,
        "learning_rate": 2e-3,
        "train_batch_size": 3,
        "validation_fraction": 0.2,
        "max_length": 16,
        "logging_steps": 5,
    }
    task = make_task(vit_gpt2, data, tmp_path / "probe", **words)
    assert task.rate(19) == 1.0
    assert task.rate(20) == pytest.approx(1.0)
    assert not task._is_rewarded(19)
    assert task._is_rewarded(20)
    finetune_captioner(data, tmp_path / "run", vit_gpt2, **words)
    reward = []
    for name in ("start", "end"):
        model = vit_gpt2 if name == "start" else tmp_path / "run" / "model"
        probe = make_task(model, data, tmp_path / name, **words)
        with torch.no_grad():
            drawn = probe._drawn_captions(
                probe._bridged(probe._draws(0)), torch.Generator().manual_seed(1)
            )
        scores = []
        for draw, each in zip(probe._draws(0), drawn, strict=True):
            everything = [[(*probe._ids(c), 0) for c in e.captions] for e in probe._train]
            frequency = DocumentFrequency.from_references(everything)
            scorer = CiderD([[(*probe._ids(c), 0) for c in draw.item.captions]], frequency)
            scores += [scorer.score(0, (*tokens, 0)) for tokens in each]
        reward.append(np.mean(scores))
    assert reward[1] > reward[0]


# --- a new captioner ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessorPil,
    )

    torch.manual_seed(6)
    vit, gpt2 = (tmp_path_factory.mktemp("parts") / name for name in ("vit", "gpt2"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    ViTForImageClassification(config).save_pretrained(vit)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vit)
    tokenizer = make_tokenizer(gpt2)
    small = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=tokenizer.get_vocab_size(), **small, **ends)
    ).save_pretrained(gpt2)
    return vit, gpt2


def test_parts_are_what_they_were_apart(parts: tuple[Path, Path]) -> None:
    from transformers import GPT2LMHeadModel, ViTModel

    vit, gpt2 = parts
    module, model = load_parts(vit, gpt2, seed=1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 5, 9, 2], [0, 1, 1, 7]])
    with torch.no_grad():
        theirs = ViTModel.from_pretrained(vit).eval()(pixels).last_hidden_state
        torch.testing.assert_close(module.encoder(pixels), theirs, rtol=1e-4, atol=1e-5)
        words = GPT2LMHeadModel.from_pretrained(gpt2).eval()(ids).logits
        ours = module.decoder.logits(module.decoder(ids)[0])
    torch.testing.assert_close(ours, words, rtol=1e-4, atol=1e-5)
    assert model.generation["decoder_start_token_id"] == 0


@pytest.mark.parametrize("bridge", ["cross-attention", "prefix"])
def test_a_new_captioner_learns_and_is_loaded(
    tmp_path: Path, parts: tuple[Path, Path], pictures: Path, bridge: str
) -> None:
    vit, gpt2 = parts
    words = {**SMALL, "max_train_steps": 30, "bridge": bridge, "freeze": "encoder"}
    finished = finetune_captioner(
        pictures, tmp_path, encoder=vit, decoder=gpt2, **{**words, "learning_rate": 3e-3}
    )
    assert finished.change is not None
    assert finished.change < -0.1
    model = finished.files[0]
    assert Captioner.load(model).caption(pictures / "000.png", max_length=8).text
    if bridge == "cross-attention":
        from transformers import ViTImageProcessorPil

        pixels = ViTImageProcessorPil.from_pretrained(model)(
            prepare(pictures).train[0].open(), return_tensors="pt"
        ).pixel_values
        ids = reference(model).generate(pixels, max_length=8, num_beams=1)[0].tolist()
        ours = Captioner.load(model, runtime="torch").caption(
            prepare(pictures).train[0].open(), max_length=8, num_beams=1
        )
        assert ids[1 : 1 + len(ours.token_ids)] == list(ours.token_ids)


@pytest.mark.parametrize("order", ["swapped", "missing"])
def test_parts_of_another_kind_are_refused(
    tmp_path: Path, parts: tuple[Path, Path], order: str
) -> None:
    vit, gpt2 = parts
    if order == "swapped":
        with pytest.raises(UnsupportedModel, match="the encoder is a ViT"):
            load_parts(gpt2, vit)
        return
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    with pytest.raises(WeightsMismatch, match=r"no model\.safetensors"):
        load_parts(vit, tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"bridge": "prefix"}, "is joined by cross-attention"),
        ({"method": "lora", "freeze": "decoder"}, "a LoRA is on the decoder"),
        ({"encoder": "x"}, "both encoder and decoder"),
        ({"max_length": 1000}, "has places for"),
        ({"self_critical_steps": 9}, "self_critical_steps is 9 of 3"),
        ({"lora_layers": "quux", "method": "lora"}, "'quux' names no layer"),
    ],
)
def test_options_that_cannot_be_used(
    tmp_path: Path, vit_gpt2: Path, pictures: Path, words: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        finetune_captioner(pictures, tmp_path, vit_gpt2, **{**SMALL, **words})


def test_no_end_is_learned_that_was_not_drawn(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    task = make_task(vit_gpt2, pictures, tmp_path, max_length=4)
    bridged = task._bridged(task._draws(0)[:2])
    with torch.no_grad():
        drawn = task._drawn_captions(bridged, torch.Generator().manual_seed(3))
    rows = [tokens for each in drawn for tokens in each]
    assert any(row[-1] != task._end for row in rows)
    inputs, targets = task._padded(rows)
    for row, given, wanted in zip(rows, inputs.tolist(), targets.tolist(), strict=True):
        assert tuple(wanted[: len(row)]) == row and set(wanted[len(row) :]) <= {-100}
        assert given[: len(row)] == [task._start, *row[:-1]]


def test_large_seeds_draw_captions_too(tmp_path: Path, vit_gpt2: Path, pictures: Path) -> None:
    task = make_task(vit_gpt2, pictures, tmp_path, self_critical_steps=2, seed=2**63 - 1)
    assert bool(task._rewarded(task._draws(0)[:1], 5).isfinite().all())


def test_validation_looks_at_the_likeliest_caption_alone(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    """Whatever the model's own settings say of sampling, numbers and lengths."""
    import dataclasses

    task = make_task(vit_gpt2, pictures, tmp_path)
    with torch.no_grad():
        plain = task.validate()
    generation = {"do_sample": True, "num_return_sequences": 2, "min_length": 70, "num_beams": 3}
    model = dataclasses.replace(task.model, generation={**task.model.generation, **generation})
    captioner = task._captioner
    task._captioner = Captioner(captioner.networks, task._tokenizer, task._preprocessing, model)
    with torch.no_grad():
        again = task.validate()
    assert plain is not None and again is not None
    assert (again.parts, again.shown) == (plain.parts, plain.shown)


@pytest.mark.parametrize("bridge", ["cross-attention", "prefix"])
def test_a_new_bridge_learns_beside_a_lora(
    tmp_path: Path, parts: tuple[Path, Path], pictures: Path, bridge: str
) -> None:
    vit, gpt2 = parts
    before, _ = load_parts(vit, gpt2, bridge=bridge, seed=SMALL.get("seed", 0))
    finished = finetune_captioner(
        pictures,
        tmp_path,
        encoder=vit,
        decoder=gpt2,
        **{**SMALL, "max_train_steps": 3, "bridge": bridge, "method": "lora"},
    )
    after = load_captioner(describe(finished.files[0]), device="cpu", dtype="float32").state_dict()
    drawn = {n: e for n, e in before.named_parameters() if n.startswith("bridge.") or "cross" in n}
    assert drawn
    for name, parameter in drawn.items():
        if parameter.ndim > 1:
            assert not torch.equal(after[name], parameter), name
    assert torch.equal(after["decoder.wte.weight"], before.decoder.wte.weight)


def test_weights_of_the_same_size_are_told_apart(tmp_path: Path) -> None:
    from diptych.training.cache import file_mark

    random = np.random.default_rng(1)
    first, second = (random.bytes(9_000_000) for _ in range(2))
    paths = [tmp_path / name for name in ("a", "b", "c", "small", "none")]
    for path, content in zip(paths, (first, second, first, b"x", b""), strict=True):
        path.write_bytes(content)
    marks = [file_mark(path) for path in paths]
    assert marks[0] == marks[2] and len(set(marks)) == 4
