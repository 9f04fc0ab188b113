"""How fast is a GPU, and how much of it is needed, beside diffusers and transformers?

    python benchmarks/gpu_speed.py [--parts step vae captions train compiled graphs]
        [--out FILE] [--tiny]

Full-size networks of random weights, made on the GPU: nothing is read or fetched, and no file of a
model is needed. Both sides take turns in one process, in the same type, and wait for the card
before the clock is read. Memory is that of one side alone: weights, and what a call takes beside
them. One part a question, each with a limit of seconds, and none stops the others:

- step: the UNet of SD 1.5 (860 M) on two rows, as a step with guidance at 512 pixels runs it
- vae: latents to a picture of 512 pixels
- captions: ViT-B/16 + GPT-2 (239 M), 20 words of 1 and of 32 pictures, greedy and 4 beams
- train: a step of a LoRA of rank 8 at 512 pixels, 4 rows in bfloat16, by AdamW
- compiled, graphs: the step again after `ImageGenerator.compile`, without and with CUDA graphs

Lines are appended to `--out`, by default `benchmarks/results/gpu_speed.jsonl`, as soon as they are
known. `--tiny` takes small networks and the CPU, to see that all this works.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.image_to_text.decoder_steps import decoder_step
from diptych.image_to_text.decoding import search
from diptych.image_to_text.options import CaptionOptions
from diptych.models.gpt2 import Gpt2Config
from diptych.models.layers import ResnetBlock
from diptych.models.unet import UNet, UNetConfig
from diptych.models.unet_blocks import SpatialTransformer
from diptych.models.vae import Vae, VaeConfig
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.models.vit import ViTConfig
from diptych.runtimes.on_torch import torch_networks
from diptych.runtimes.on_torch_compiled import compile_generator
from diptych.runtimes.on_torch_generator import generator_networks, lay_out
from diptych.training.lora import add_updates, choose_layers, matrices
from diptych.training.memory import checkpoint_blocks
from harness import machine, take_turns

# The longest that each part may take: what compiles comes last.
LIMITS = {"step": 15, "vae": 8, "captions": 25, "train": 40, "compiled": 180, "graphs": 180}
OUT = Path(__file__).parent / "results" / "gpu_speed.jsonl"
WORDS = 20
Row = dict[str, Any]
Case = Callable[[], Any]
Sides = dict[str, tuple[torch.nn.Module, Case]]


@dataclass(frozen=True)
class Setting:
    """Say where, and how large the networks are."""

    device: str
    unet: UNetConfig
    vae: VaeConfig
    captioner: VisionEncoderDecoderConfig
    size: int
    repeats: int
    pictures: tuple[int, ...] = (1, 32)

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"


FULL = Setting("cuda", UNetConfig(), VaeConfig(), VisionEncoderDecoderConfig(), 512, 20)
TINY = Setting(
    "cpu",
    UNetConfig(
        block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, norm_num_groups=8,
        layers_per_block=1,
    ),
    VaeConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
    VisionEncoderDecoderConfig(
        ViTConfig(32, 8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=64),
        Gpt2Config(99, 64, 32, 2, 4, 64),
    ),
    64,
    1,
    (1, 2),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--out", type=Path, default=OUT, help="lines are appended to it")
    parser.add_argument("--tiny", action="store_true", help="small networks, on the CPU")
    options = parser.parse_args(arguments)
    setting = TINY if options.tiny else FULL
    if setting.is_gpu and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: --tiny rehearses without one")
    on = {"device": torch.cuda.get_device_name() if setting.is_gpu else "cpu"}
    measured_on = machine()
    for name in ("diffusers", "transformers", "peft"):
        _module(name)  # before any clock runs
    results: list[Row] = []
    for part in options.parts:
        for result in _within(part, setting):
            row = {"part": part, **result, **on}
            results.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
            print("  ".join(f"{k}={v}" for k, v in results[-1].items()), flush=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**results[-1], "machine": measured_on}) + "\n")
        _forget(setting)
    return results


def _within(part: str, setting: Setting) -> Iterator[Row]:
    """Yield the rows of a part; what goes wrong in it, or takes too long, is its last row."""
    start = time.perf_counter()
    try:
        with _at_most(LIMITS[part] * (1 if setting.is_gpu else 10)):
            yield from PARTS[part](setting)
    except (Exception, OutOfTime) as error:
        traceback.print_exc()
        yield {"error": f"{type(error).__name__}: {error}"[:300]}
    print(f"{part}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


class OutOfTime(BaseException):
    """End a part; no Exception, which compilers would catch and tell as an error of their own."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- pictures -------------------------------------------------------------------------------------


def step(setting: Setting) -> Iterator[Row]:
    """Measure a step with guidance in both 16-bit types."""
    for dtype in (torch.float16, torch.bfloat16):
        yield from _step_in(setting, dtype)
        _forget(setting)


def _step_in(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    """Measure it beside diffusers as it is, then with its kernels laid out as ours are."""
    networks, given = _ours(setting, dtype), _inputs(setting, 2)
    task = "step of 2 rows, as one CUDA graph"
    module, theirs = networks.modules["unet"], _their_unet(setting, dtype)
    recorded = generator_networks(networks.modules, setting.device, record=setting.is_gpu)
    sides: Sides = {
        "ours": (module, lambda: recorded["unet"](**given)[0]),
        "ours, not recorded": (module, lambda: networks["unet"](**given)[0]),
    }
    if theirs is not None:
        _same_weights(module, theirs)
        sides["diffusers"] = (theirs, lambda: _their_step(theirs, given, dtype))
    yield from _compared(task, sides, setting, dtype)
    if theirs is not None:
        theirs.to(memory_format=torch.channels_last)
        sides["diffusers channels-last"] = sides.pop("diffusers")
        yield from _compared(task, sides, setting, dtype)


def vae(setting: Setting) -> Iterator[Row]:
    """Measure the decoder."""
    dtype = torch.float16 if setting.is_gpu else torch.bfloat16
    networks = _ours(setting, dtype, with_unet=False)
    latents = _inputs(setting, 1)["latents"]
    module = networks.modules["vae"]
    sides = {"ours": (module, lambda: networks["vae_decoder"](latents=latents)[0])}
    if (theirs := _their_vae(setting, dtype)) is not None:
        _same_weights(module, theirs)
        sides["diffusers"] = (theirs, lambda: theirs.decode(latents.to(dtype)).sample)
    yield from _compared("decode 1", sides, setting, dtype)


def compiled(setting: Setting, mode: str | None = None) -> Iterator[Row]:
    """Measure the step after its blocks were compiled, beside the same weights as they are."""
    dtype = torch.float16 if setting.is_gpu else torch.float32
    torch._dynamo.reset()
    plain, networks = (_ours(setting, dtype) for _ in range(2))
    networks.modules["unet"].load_state_dict(plain.modules["unet"].state_dict())
    compile_generator(networks.modules, mode=mode)
    given = _inputs(setting, 2)
    start = time.perf_counter()
    networks["unet"](**given)
    _wait(setting)
    first = time.perf_counter() - start
    yield {"task": "first call", "side": "ours compiled", "mode": mode or "default", "s": first}
    sides = {
        "ours compiled": (networks.modules["unet"], lambda: networks["unet"](**given)[0]),
        "ours": (plain.modules["unet"], lambda: plain["unet"](**given)[0]),
    }
    if (theirs := _their_unet(setting, dtype)) is not None:
        theirs.to(memory_format=torch.channels_last)
        _same_weights(plain.modules["unet"], theirs)
        sides["diffusers"] = (theirs, lambda: _their_step(theirs, given, dtype))
    task = "step of 2 rows" if mode is None else "step of 2 rows, CUDA graphs"
    yield from _compared(task, sides, setting, dtype)


def graphs(setting: Setting) -> Iterator[Row]:
    """Measure the same with CUDA graphs."""
    return compiled(setting, "reduce-overhead")


def _ours(setting: Setting, dtype: torch.dtype, *, with_unet: bool = True) -> Any:
    """Return the networks as `ImageGenerator` opens them."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        whole = UNet(setting.unet if with_unet else UNetConfig.tiny())
        modules = {"unet": whole, "vae": Vae(setting.vae)}
    for module in modules.values():
        module.eval().requires_grad_(False).to(dtype)
    lay_out(modules, setting.device)
    return generator_networks(modules, setting.device)


def _inputs(setting: Setting, rows: int) -> dict[str, torch.Tensor]:
    side, width = setting.size // 8, setting.unet.cross_attention_dim
    torch.manual_seed(1)
    on: dict[str, Any] = {"device": setting.device}
    return {
        "latents": torch.randn(rows, 4, side, side, **on),
        "timestep": torch.full((rows,), 501.0, **on),
        "encoder_hidden_states": torch.randn(rows, 77, width, **on),
    }


def _their_unet(setting: Setting, dtype: torch.dtype) -> Any:
    diffusers = _module("diffusers")
    if diffusers is None:
        return None
    config = setting.unet
    with torch.device(setting.device):
        unet = diffusers.UNet2DConditionModel(
            sample_size=64,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            cross_attention_dim=config.cross_attention_dim,
            norm_num_groups=config.norm_num_groups,
            attention_head_dim=8,
        )
    return unet.eval().requires_grad_(False).to(dtype)


def _their_vae(setting: Setting, dtype: torch.dtype) -> Any:
    diffusers = _module("diffusers")
    if diffusers is None:
        return None
    config = setting.vae
    levels = len(config.block_out_channels)
    with torch.device(setting.device):
        vae = diffusers.AutoencoderKL(
            block_out_channels=config.block_out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            latent_channels=4,
        )
    return vae.eval().requires_grad_(False).to(dtype)


def _their_step(unet: Any, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    with torch.inference_mode():
        return unet(
            given["latents"].to(dtype),
            given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"].to(dtype),
        ).sample


def _same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copy our numbers into the reference, whose names are ours."""
    theirs.load_state_dict(ours.state_dict())


# --- words ----------------------------------------------------------------------------------------


def captions(setting: Setting) -> Iterator[Row]:
    """Measure from pixels in main memory to token ids."""
    dtype = torch.float16 if setting.is_gpu else torch.float32
    torch.manual_seed(0)
    with torch.device(setting.device):
        module = VisionEncoderDecoder(setting.captioner).eval().requires_grad_(False).to(dtype)
    networks, theirs = torch_networks(module), _their_captioner(setting, dtype)
    side = setting.captioner.encoder.image_size
    for pictures in setting.pictures:
        pixels = np.random.default_rng(0).standard_normal((pictures, 3, side, side), np.float32)
        for beams in (1, 4):

            def caption(pixels: Any = pixels, beams: int = beams) -> Any:
                options = CaptionOptions(num_beams=beams, max_new_tokens=WORDS).for_search(1)
                (bridged,) = networks["encoder"](pixel_values=pixels)
                step = decoder_step(networks["decoder"], "cross-attention", bridged)
                return search(step, num_images=len(pixels), prompt_ids=(0,), options=options,
                              eos_token_ids=())  # fmt: skip

            sides = {"ours": (module, caption)}
            if theirs is not None:
                sides["transformers"] = (
                    theirs,
                    lambda p=pixels, b=beams: theirs.generate(
                        pixel_values=torch.from_numpy(p).to(setting.device, dtype),
                        num_beams=b, do_sample=False, max_new_tokens=WORDS, min_new_tokens=WORDS,
                    ),
                )  # fmt: skip
            task = f"{WORDS} words, {'greedy' if beams == 1 else '4 beams'}"
            rows = _compared(task, sides, setting, dtype, repeats=min(3, setting.repeats))
            yield from ({**row, "batch": pictures} for row in rows)


def _their_captioner(setting: Setting, dtype: torch.dtype) -> Any:
    transformers = _module("transformers")
    if transformers is None:
        return None
    encoder, decoder = setting.captioner.encoder, setting.captioner.decoder
    with torch.device(setting.device):
        model = transformers.VisionEncoderDecoderModel(
            encoder=transformers.ViTModel(
                transformers.ViTConfig(
                    image_size=encoder.image_size,
                    patch_size=encoder.patch_size,
                    hidden_size=encoder.hidden_size,
                    num_hidden_layers=encoder.num_hidden_layers,
                    num_attention_heads=encoder.num_attention_heads,
                    intermediate_size=encoder.intermediate_size,
                ),
                add_pooling_layer=False,
            ),
            decoder=transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=decoder.vocab_size,
                    n_positions=decoder.max_position_embeddings,
                    n_embd=decoder.hidden_size,
                    n_layer=decoder.num_hidden_layers,
                    n_head=decoder.num_attention_heads,
                    add_cross_attention=True,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            ),
        )
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.eos_token_id = config.pad_token_id = 0
    return model.eval().requires_grad_(False).to(dtype)


# --- training -------------------------------------------------------------------------------------


def train(setting: Setting) -> Iterator[Row]:
    """Measure steps of a LoRA on the attentions, with and without activations computed twice."""
    for way in ("plain", "gradient checkpointing"):
        sides = {"ours": _our_training(setting, way)}
        if _module("diffusers") is not None and _module("peft") is not None:
            sides["diffusers + peft"] = _their_training(setting, way)
        rows = _compared("LoRA step of 4 rows", sides, setting, torch.bfloat16,
                         repeats=min(5, setting.repeats))  # fmt: skip
        yield from ({**row, "way": way} for row in rows)
        del sides
        _forget(setting)


def _our_training(setting: Setting, way: str) -> tuple[torch.nn.Module, Case]:
    with torch.device(setting.device):
        unet = UNet(setting.unet)
    unet.requires_grad_(False).to(torch.bfloat16, memory_format=torch.channels_last)
    updates = add_updates(choose_layers({"unet": unet}, "attention"), 8, None, 0)
    if way != "plain":
        checkpoint_blocks(unet, (ResnetBlock, SpatialTransformer))
    given = _inputs(setting, 4)
    told = [given[name] for name in ("timestep", "encoder_hidden_states")]
    return unet, _training(
        lambda: unet(given["latents"], *told), [*matrices(updates).values()], given, setting
    )


def _their_training(setting: Setting, way: str) -> tuple[torch.nn.Module, Case]:
    from peft import LoraConfig

    unet = _their_unet(setting, torch.bfloat16)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=layers))
    parameters = [each for each in unet.parameters() if each.requires_grad]
    for each in parameters:
        each.data = each.data.float()
    if way != "plain":
        unet.enable_gradient_checkpointing()
        unet.train()
    given = _inputs(setting, 4)
    told = [given[name] for name in ("timestep", "encoder_hidden_states")]
    return unet, _training(lambda: unet(given["latents"], *told).sample, parameters, given, setting)


def _training(
    predict: Case, parameters: list[Any], given: Mapping[str, torch.Tensor], setting: Setting
) -> Case:
    """Return one step of training: forwards, backwards, AdamW."""
    assert parameters, "nothing learns"
    for each in parameters:
        each.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> torch.Tensor:
        with torch.enable_grad():
            with torch.autocast(setting.device, torch.bfloat16):
                loss = (predict().float() - given["latents"]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss.detach()

    return run


# --- around them ----------------------------------------------------------------------------------


def _compared(
    task: str,
    sides: Sides,
    setting: Setting,
    dtype: torch.dtype,
    repeats: int | None = None,
) -> Iterator[Row]:
    """Yield a row for each side: medians of turns, ratios, memory, how far the sides are apart."""
    made: dict[str, Any] = {}
    memory = {side: _memory(*pair, setting) for side, pair in sides.items()}

    def waiting(side: str) -> Callable[[], None]:
        def run() -> None:
            made[side] = sides[side][1]()
            _wait(setting)

        return run

    with torch.no_grad():
        turns = {side: waiting(side) for side in sides}
        times = take_turns(turns, repeats or setting.repeats, warmup=3)
    first = next(iter(sides))
    for side, figures in times.items():
        row = {"task": task, "side": side, "dtype": str(dtype).removeprefix("torch."), **figures}
        if side == first:
            for other, each in times.items():
                if other != first:
                    row[f"speed_ratio to {other}"] = each["median_s"] / figures["median_s"]
        elif isinstance(made[first], torch.Tensor) and "LoRA" not in task:
            row["difference"] = _apart(made[side], made[first])
        yield {**row, **memory[side]}


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def _memory(module: torch.nn.Module, case: Case, setting: Setting) -> Row:
    """Return what a side's weights take, and the most that a call takes beside what is there."""
    weights = sum(each.numel() * each.element_size() for each in module.parameters())
    with torch.no_grad():
        case()
        if not setting.is_gpu:
            return {"weights_mib": weights / 2**20}
        _forget(setting)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
    _wait(setting)
    taken = torch.cuda.max_memory_allocated() - before
    return {"weights_mib": weights / 2**20, "beside_mib": taken / 2**20}


def _wait(setting: Setting) -> None:
    if setting.is_gpu:
        torch.cuda.synchronize()


def _forget(setting: Setting) -> None:
    gc.collect()
    if setting.is_gpu:
        torch.cuda.empty_cache()


def _module(name: str) -> Any:
    """Import a reference; None, and a line about it, where that fails."""
    try:
        module = __import__(name)
        return module
    except Exception as error:  # versions that do not fit raise more than ImportError
        print(f"no {name} here: {type(error).__name__}: {error}"[:200], file=sys.stderr, flush=True)
        return None


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "step": step,
    "vae": vae,
    "captions": captions,
    "train": train,
    "compiled": compiled,
    "graphs": graphs,
}


if __name__ == "__main__":
    main()
