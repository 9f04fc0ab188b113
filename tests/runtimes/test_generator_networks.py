"""The modules of a generator as networks: where they run, in which numbers, and what is guarded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.runtimes import on_torch_generator
from diptych.runtimes.on_torch_generator import generator_networks, lay_out, layout

pytestmark = pytest.mark.usefixtures("one_thread")

WARNING = "the VAE overflows in float16: it runs in float32 from here on"


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "text_encoder": ClipText(ClipTextConfig.tiny()).eval(),
        "unet": UNet(UNetConfig.tiny()).eval(),
        "vae": Vae(VaeConfig.tiny()).eval(),
    }


@pytest.fixture
def in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in 16 bits even where the processor is slow at it."""
    monkeypatch.setattr(on_torch_generator, "computed_in", lambda dtype, device: dtype)


def test_maps_of_a_vae_on_cuda_are_channels_first(modules: dict[str, nn.Module]) -> None:
    """The CUDA norm of groups gives no other order, so each of them would be turned twice."""
    for device, expected in (("cuda", torch.contiguous_format), ("cpu", torch.channels_last)):
        moved = {name: copy.deepcopy(module) for name, module in modules.items()}
        lay_out(moved, device)
        found: Any = moved
        assert found["unet"].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert found["vae"].decoder.conv_in.weight.is_contiguous(memory_format=expected)
        assert layout("vae", torch.device(device)) == expected


def overflowing(vae: nn.Module) -> Vae:
    """Return a twin whose latents are far beyond 65504 on the way, and whose pictures are not."""
    twin: Any = copy.deepcopy(vae)
    twin.decoder.conv_in.weight.data *= 3e5
    return twin.half()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def run_all(networks: Any) -> list[np.ndarray]:
    """Draw a picture by one step, through every network in the usual order."""
    array = networks.array
    words, pooled = networks["text_encoder"](input_ids=array(np.array([[5, 7, 999]])), clip_skip=0)
    mean, _ = networks["vae_encoder"](pixel_values=array(noise(1, 3, 16, 16)))
    made = [words, pooled, mean]
    for step in (999.0, 1.0):
        timestep = array(np.array([step]))
        (latents,) = networks["unet"](latents=mean, timestep=timestep, encoder_hidden_states=words)
        made.append(latents)
    made += networks["vae_decoder"](latents=latents)
    return [networks.numpy(each) for each in made]


def expected_of(modules: dict[str, Any]) -> list[np.ndarray]:
    with torch.no_grad():
        words, pooled = modules["text_encoder"](torch.tensor([[5, 7, 999]]))
        mean, _ = modules["vae"].encode(torch.from_numpy(noise(1, 3, 16, 16)))
        made = [words, pooled, mean]
        made += [modules["unet"](mean, torch.tensor([step]), words) for step in (999.0, 1.0)]
        made.append(modules["vae"].decode(made[-1]))
    return [each.numpy() for each in made]


def test_networks_give_what_the_modules_give(modules: dict[str, nn.Module]) -> None:
    networks = generator_networks(modules)
    assert set(networks) == {
        *("text_encoder", "unet", "unet_shallow", "vae_encoder", "vae_decoder")
    }
    assert (networks.runtime, networks.device, networks.dtype) == ("torch", "cpu", "float32")
    assert networks.modules is modules
    for found, expected in zip(run_all(networks), expected_of(modules), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("in_halves")
def test_sixteen_bits_inside_and_float32_outside(
    modules: dict[str, nn.Module], dtype: torch.dtype
) -> None:
    narrow = {name: copy.deepcopy(module).to(dtype) for name, module in modules.items()}
    networks = generator_networks(narrow)
    assert networks.dtype == str(dtype).removeprefix("torch.")
    (pixels,) = networks["vae_decoder"](latents=networks.array(noise(1, 4, 8, 8)))
    assert pixels.dtype == torch.float32
    within = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for found, expected in zip(run_all(networks), expected_of(modules), strict=True):
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < within * np.abs(expected).max()


@pytest.mark.usefixtures("in_halves")
def test_timesteps_are_not_rounded(modules: dict[str, nn.Module]) -> None:
    narrow = {name: copy.deepcopy(module).bfloat16() for name, module in modules.items()}
    networks = generator_networks(narrow)
    seen = []
    predict = narrow["unet"].predict

    def watched(**arrays: Any) -> Any:
        seen.append(arrays["timestep"])
        return predict(**arrays)

    narrow["unet"].predict = watched
    given = {"latents": noise(1, 4, 8, 8), "encoder_hidden_states": noise(1, 3, 32)}
    networks["unet"](timestep=np.array([999.0]), **given)
    assert seen[0].dtype == torch.float32 and seen[0].item() == 999.0  # bfloat16 says 1000


@pytest.mark.usefixtures("in_halves")
def test_a_decode_that_overflows_is_repeated(
    modules: dict[str, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    vae = overflowing(modules["vae"])
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    latents = torch.from_numpy(noise(1, 4, 8, 8))
    with torch.no_grad():
        assert not vae.decode(latents.half()).isfinite().all()  # what the guard is for
        expected = copy.deepcopy(vae).float().decode(latents)
    networks = generator_networks({**modules, "vae": vae})
    for _ in range(2):
        (pixels,) = networks["vae_decoder"](latents=latents)
        torch.testing.assert_close(pixels, expected)
    assert caplog.messages.count(WARNING) == 1
    for name, tensor in vae.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, before[name])


@pytest.mark.usefixtures("in_halves")
def test_broken_latents_are_no_overflow(
    modules: dict[str, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    networks = generator_networks({**modules, "vae": copy.deepcopy(modules["vae"]).half()})
    latents = torch.full((1, 4, 8, 8), float("nan"))
    (pixels,) = networks["vae_decoder"](latents=latents)
    assert pixels.isnan().any()
    assert WARNING not in caplog.messages


@pytest.mark.usefixtures("in_halves")
def test_a_vae_that_is_known_to_overflow_runs_in_float32(
    caplog: pytest.LogCaptureFixture, modules: dict[str, nn.Module]
) -> None:
    torch.manual_seed(0)
    config = VaeConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    plain = Vae(config).half()
    forced = Vae(VaeConfig(**{**as_words(config), "force_upcast": True})).half()
    forced.load_state_dict(plain.state_dict())
    latents = torch.from_numpy(noise(1, 4, 8, 8))
    found = [
        generator_networks({**modules, "vae": vae})["vae_decoder"](latents=latents)[0]
        for vae in (plain, forced)
    ]
    with torch.no_grad():
        torch.testing.assert_close(found[1], copy.deepcopy(plain).float().decode(latents))
    assert not torch.equal(*found)
    assert not caplog.messages


def as_words(config: VaeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@pytest.fixture
def moves(
    modules: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[tuple[str, str]]]:
    """Take `meta` for a GPU whose tensors are in main memory; return who moved where."""
    names, moved, real = {id(module): name for name, module in modules.items()}, [], nn.Module.to

    def to(self: nn.Module, *args: Any, **words: Any) -> nn.Module:
        if id(self) not in names:
            return real(self, *args, **words)
        moved.append((names[id(self)], str(args[0])))
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    return lambda: [moved.pop(0) for _ in range(len(moved))]


def test_each_network_is_on_the_device_for_its_turn(
    modules: dict[str, nn.Module], moves: Callable[[], list[tuple[str, str]]]
) -> None:
    networks = generator_networks(modules, "cpu:0", offload=True)
    assert moves() == [(name, "cpu") for name in modules]
    assert networks.reason.endswith("each network is on cpu:0 for its turn only")
    found = run_all(networks)
    there, back = "cpu:0", "cpu"
    assert moves() == [
        *[("text_encoder", there)],
        *[("text_encoder", back), ("vae", there)],
        *[("vae", back), ("unet", there)],  # and stays for both steps
        *[("unet", back), ("vae", there)],
    ]
    for one, other in zip(found, expected_of(modules), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("free", "offloaded"), [(0, True), (1 << 40, False)])
def test_offload_where_the_gpu_is_too_small(
    free: int,
    offloaded: bool,
    modules: dict[str, nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(on_torch_generator, "_file_bytes", lambda model: 1000)
    monkeypatch.setattr(
        "diptych.weights.load_module.as_device", torch.device
    )  # as if it were there

    def load_generator(model: Any, *, device: str, dtype: str) -> dict[str, nn.Module]:
        opened.update(loaded_on=device, dtype=dtype)
        return {name: copy.deepcopy(module) for name, module in modules.items()}

    def networks(modules: Any, device: str, *, offload: bool, record: bool, reason: str) -> None:
        opened.update(device=device, offload=offload, record=record)

    monkeypatch.setattr("diptych.weights.load_generator.load_generator", load_generator)
    monkeypatch.setattr(on_torch_generator, "generator_networks", networks)
    on_torch_generator.open_generator_checkpoint(None, "cuda", "auto")  # type: ignore[arg-type]
    assert opened == {
        "loaded_on": "cpu" if offloaded else "cuda",
        "dtype": "float16",
        "device": "cuda",
        "offload": offloaded,
        "record": not offloaded,  # a graph keeps weights where they are
    }


def test_changed_weights_are_used_at_once(modules: dict[str, nn.Module]) -> None:
    own = {name: copy.deepcopy(module) for name, module in modules.items()}
    networks = generator_networks(own)
    given = {
        "latents": noise(1, 4, 8, 8),
        "timestep": np.array([5.0]),
        "encoder_hidden_states": noise(1, 3, 32),
    }
    (before,) = networks["unet"](**given)
    own["unet"].conv_out.bias.data += 1  # as a fused LoRA does; inference must not freeze it
    (after,) = networks["unet"](**given)
    torch.testing.assert_close(after, before + 1)


def test_arrays_are_what_the_runtime_takes(modules: dict[str, nn.Module]) -> None:
    networks = generator_networks(modules)
    floats, whole = networks.array(np.ones(3)), networks.array(np.array([1, 2], np.int32))
    assert (floats.dtype, whole.dtype) == (torch.float32, torch.int64)
    source = np.zeros(3, np.float32)
    made = networks.array(source)
    made += 1
    assert not source.any()  # its own memory
    assert networks.numpy(floats.bfloat16()).dtype == np.float32
