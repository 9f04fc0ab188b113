"""Training on a GPU: losses fall, in half precision too, and a run that stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training_pictures import draw_pictures

torch = pytest.importorskip("torch")
from diptych.text_to_image.generator import ImageGenerator  # noqa: E402
from diptych.training.finetune import finetune_captioner, finetune_generator  # noqa: E402

OF_GENERATOR: dict[str, Any] = {
    "resolution": 64,
    "train_batch_size": 4,
    "num_sample_images": 0,
    "logging_steps": 1,
    "validation_fraction": 0.25,
    "validation_steps": 100,
    "caption_dropout": 0.0,
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures", 12, seed=1)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("no", {}),
        ("bf16", {"gradient_checkpointing": True, "ema_decay": 0.9}),
        ("fp16", {"cache_latents": False, "random_flip": True}),
    ],
    ids=["no", "bf16", "fp16"],
)
def test_a_lora_learns_and_goes_on(
    precision: str,
    words: dict[str, Any],
    small_generator: Path,
    pictures: Path,
    tmp_path: Path,
    device: str,
    note: Any,
) -> None:
    folder = tmp_path / "run"
    words = {**OF_GENERATOR, "mixed_precision": precision, "learning_rate": 0.02, **words}
    words |= {"lora_layers": "all", "checkpointing_steps": 20}
    given = pictures, folder, small_generator
    first = finetune_generator(*given, device=device, max_train_steps=24, **words)
    second = finetune_generator(*given, device=device, max_train_steps=30, resume=True, **words)
    found = losses(folder)
    change = second.end / first.start - 1 if second.end and first.start else None
    note(precision=precision, step=second.step, first=found[0], last=found[-1], change=change)
    assert (first.step, second.step) == (24, 30)
    assert change is not None
    assert change < 0
    generator = ImageGenerator.load(small_generator, runtime="torch", device=device)
    before = generator.generate("a boat", seed=1, num_inference_steps=2, width=64, height=64)
    generator.load_lora(second.files[0])
    after = generator.generate("a boat", seed=1, num_inference_steps=2, width=64, height=64)
    assert before.image.tobytes() != after.image.tobytes()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamw_8bit"])
def test_a_run_that_stopped_does_what_it_would_have_done(
    optimizer: str, small_generator: Path, pictures: Path, tmp_path: Path, device: str, note: Any
) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    words = {**OF_GENERATOR, "method": "full", "learning_rate": 1e-4, "optimizer": optimizer}
    words |= {"checkpointing_steps": 4}
    ways = {"whole": (8,), "parts": (4, 8)}
    found = {}
    for name, ends in ways.items():
        for end in ends:
            folder = tmp_path / name
            finetune_generator(
                pictures, folder, small_generator,
                device=device, max_train_steps=end, resume=end == 8, **words,
            )  # fmt: skip
        found[name] = [
            row["loss"] for row in rows(folder) if row.get("step", 0) > 4 and "loss" in row
        ]
    apart = max(abs(a / b - 1) for a, b in zip(*found.values(), strict=True))
    note(optimizer=optimizer, losses_apart=apart)
    assert len(found["whole"]) == 4
    assert apart < 1e-2


def test_samples_words_and_the_class_are_drawn_in_half_precision(
    small_generator: Path, pictures: Path, tmp_path: Path, device: str
) -> None:
    words = {**OF_GENERATOR, "mixed_precision": "fp16", "max_train_steps": 2}
    words |= {"sample_prompts": ("a bird",), "num_sample_images": 1, "validation_fraction": 0.0}
    told = finetune_generator(pictures, tmp_path / "lora", small_generator, device=device, **words)
    assert [*(told.folder / "samples").glob("step-*.png")]
    words |= {"method": "textual-inversion", "placeholder_token": "<thing>"}
    word = finetune_generator(pictures, tmp_path / "word", small_generator, device=device, **words)
    assert word.files[0].name == "learned_embeds.safetensors"
    del words["placeholder_token"]
    words |= {"method": "dreambooth", "instance_prompt": "a sks bird", "class_prompt": "a bird"}
    words |= {"num_class_images": 2, "rank": 2, "train_text_encoder": True}
    bird = finetune_generator(pictures, tmp_path / "bird", small_generator, device=device, **words)
    assert bird.step == 2


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_captioner_learns(
    precision: str, small_captioner: Path, pictures: Path, tmp_path: Path, device: str, note: Any
) -> None:
    told = finetune_captioner(
        pictures,
        tmp_path / "run",
        small_captioner,
        device=device,
        mixed_precision=precision,
        max_train_steps=20,
        self_critical_steps=3,
        self_critical_learning_rate=1e-5,
        learning_rate=3e-3,
        train_batch_size=4,
        validation_fraction=0.25,
        validation_steps=100,
        gradient_checkpointing=precision == "bf16",
        logging_steps=1,
    )
    found = losses(tmp_path / "run")
    note(precision=precision, first=found[0], last=found[16], change=told.change)
    assert found[16] < found[0]
    assert told.step == 20


def test_rewarded_words_reach_the_weights_in_half_precision(device: str, note: Any) -> None:
    """Drawing without gradients must not leave weights behind that have none: some torch might."""
    layer = torch.nn.Linear(8, 8).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        with torch.no_grad():
            layer(torch.randn(2, 8, device=device))
        loss = layer(torch.randn(2, 8, device=device)).float().sum()
    note(torch=torch.__version__, reaches=loss.requires_grad)
    assert loss.requires_grad


def steps_taken(device: str, enabled: bool, make: Any) -> list[torch.Tensor]:
    """Train a small network for 12 steps of two shapes, in two parts that hand on a tensor."""
    from diptych.training.replay import Replay, set_rate

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        # No bias before a norm: its gradient is rounding, of which Adam makes whole steps.
        torch.nn.Conv2d(3, 32, 3, bias=False),
        torch.nn.BatchNorm2d(32),
        torch.nn.GELU(),
        torch.nn.Conv2d(32, 32, 3),
    ).to(device)
    optimizer = make(network, torch.zeros((), device=device))
    seen: list[torch.Tensor] = []

    def look(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen[:] = [network(pixels)]
        return (seen[0].detach().mean((2, 3)),)

    def learn(target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        loss = (seen[0].mean((2, 3)) - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return (loss.detach(),)

    replay = Replay(device, enabled=enabled)
    look, learn = replay(look), replay(learn)
    chance = torch.Generator().manual_seed(1)
    losses = []
    for index in range(12):
        rows = 4 if index % 3 else 6
        set_rate(optimizer, 0.01 * (1 - index / 20))
        (said,) = look(torch.randn(rows, 3, 12, 12, generator=chance).to(device))
        (loss,) = learn(said.clone() * 0.5 + 1)
        losses.append(loss.clone())
    return [torch.stack(losses), *(value.float() for value in network.state_dict().values())]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_recorded_step_is_the_step(name, device, note, monkeypatch):
    from diptych.training.muon import Muon

    def make(network: torch.nn.Module, rate: torch.Tensor) -> torch.optim.Optimizer:
        if name == "muon":
            return Muon(network.named_parameters(), rate)
        on_gpu = device.startswith("cuda")
        return torch.optim.AdamW(network.parameters(), lr=rate, fused=True, capturable=on_gpu)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recorded, plain = (steps_taken(device, enabled, make) for enabled in (True, False))
    apart = max(float((a - b).abs().max()) for a, b in zip(recorded, plain, strict=True))
    moved = float(plain[0][0] - plain[0][-1])
    note(optimizer=name, apart=apart, loss_fell_by=moved)
    assert moved > 0.01
    assert apart < 1e-3
