"""LoRA files and learned words, held against diffusers' own reading of their names."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import nn

from diptych.errors import BadInput, UnsupportedModel, WeightsMismatch
from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.lora import LowRank, layers
from diptych.models.unet import UNet, UNetConfig
from diptych.weights.adapters import add_embedding, apply_lora, read_embedding
from diptych.weights.dialects.ldm_unet import ldm_unet
from diptych.weights.rename import backwards
from diptych.weights.save_adapters import save_lora
from traced import traced_once, untraced

SD1 = UNetConfig(
    block_out_channels=(8, 16),
    down_attention=(True, False),
    transformer_layers_per_block=(1, 1),
    num_attention_heads=(2, 2),
    cross_attention_dim=16,
    norm_num_groups=4,
)
SDXL = UNetConfig(
    block_out_channels=(8, 16, 16),
    down_attention=(False, True, True),
    transformer_layers_per_block=(1, 2, 3),
    num_attention_heads=(2, 2, 2),
    cross_attention_dim=24,
    norm_num_groups=4,
    use_linear_projection=True,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 8,
)
TEXT = ClipTextConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=2,
)
TEXT_2 = ClipTextConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    eos_token_id=2,
    projection_dim=8,
)

Tensors = dict[str, torch.Tensor]


def make_modules(family: str) -> dict[str, nn.Module]:
    if family == "sd1":
        return {"text_encoder": ClipText(TEXT).eval(), "unet": UNet(SD1).eval()}
    return {
        "text_encoder": ClipText(TEXT).eval(),
        "text_encoder_2": ClipText(TEXT_2).eval(),
        "unet": UNet(SDXL).eval(),
    }


class Update:
    """What one layer gets: drawn here, written to files under many names."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float | None) -> None:
        out, into, *kernel = layer.weight.shape
        self.down = torch.randn(rank, into, *kernel) / into**0.5
        self.up = 0.2 * torch.randn(out, rank, *([1] * len(kernel)))
        self.alpha, self.rank = alpha, rank

    def delta(self) -> np.ndarray:
        strength = 1.0 if self.alpha is None else self.alpha / self.rank
        down, up = self.down.double().numpy(), self.up.double().numpy()
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        return strength * product.reshape(len(up), *down.shape[1:])


def draw_updates(modules: dict[str, nn.Module], pattern: str) -> dict[tuple[str, str], Update]:
    """Return updates of different ranks for the layers whose path has `pattern`."""
    updates = {}
    for network, module in modules.items():
        for number, (path, layer) in enumerate(layers(module).items()):
            if re.search(pattern, path):
                alpha = None if number % 4 == 3 else 1.0 + number % 3
                updates[network, path] = Update(layer, 1 + number % 3, alpha)
    assert len(updates) > 10
    return updates


def expected_weights(
    modules: dict[str, nn.Module], updates: dict[tuple[str, str], Update], scale: float
) -> Tensors:
    wanted = {}
    for (network, path), update in updates.items():
        weight = layers(modules[network])[path].weight.detach().double().numpy()
        wanted[f"{network}.{path}"] = torch.from_numpy(weight + scale * update.delta()).float()
    return wanted


def weights(modules: dict[str, nn.Module]) -> Tensors:
    return {
        f"{network}.{name}": tensor.clone()
        for network, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def check_applied(
    modules: dict[str, nn.Module], updates: dict[tuple[str, str], Update], file: Path
) -> None:
    """The file does what its updates say, to these layers and no others, and leaves no trace."""
    before = weights(modules)
    wanted = expected_weights(modules, updates, 0.7)
    handle = apply_lora(modules, file, 0.7, fused=True)
    for name, tensor in weights(modules).items():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path in wanted:
            torch.testing.assert_close(tensor, wanted[path], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(tensor, before[name]), name
    handle.remove()
    after = weights(modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert after.keys() == before.keys()


def kohya(prefix: str, path: str, update: Update) -> Tensors:
    name = f"{prefix}_{path.replace('.', '_')}"
    found = {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up}
    if update.alpha is not None:
        found[f"{name}.alpha"] = torch.tensor(update.alpha)
    return found


def numbered(unet: nn.Module, path: str) -> str:
    """Return the path of a layer with the numbers that ldm gives to blocks."""
    dialect = ldm_unet({name: getattr(unet.config, name) for name in unet.config.__slots__})
    (name,) = backwards(dialect, [f"{path}.weight"]).values()
    return name.removesuffix(".weight")


@untraced()
def places_by_diffusers(tensors: Tensors, config: UNetConfig) -> set[str]:
    """Return `network.path` of every layer, as diffusers understands the names."""
    settings = types.SimpleNamespace(layers_per_block=config.layers_per_block)
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), settings)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    unet = {name: each for name, each in converted.items() if name.startswith("unet.")}
    text = {name: each for name, each in converted.items() if not name.startswith("unet.")}
    peft = convert_unet_state_dict_to_peft(unet)
    peft |= convert_state_dict_to_peft(text) if text else {}
    return {name.removesuffix(".lora_A.weight") for name in peft if ".lora_A." in name}


ATTENTION = r"attn|proj_in|proj_out|ff\.net|mlp\.fc"
LOCON = ATTENTION + r"|conv|time_emb"


@pytest.mark.parametrize("pattern", traced_once([LOCON, ATTENTION]))
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_reads_kohya(family: str, pattern: str, tmp_path: Path) -> None:
    modules = make_modules(family)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if family == "sdxl":
        prefixes["text_encoder"] = "lora_te1"
    updates = draw_updates(modules, pattern)
    tensors: Tensors = {}
    for (network, path), update in updates.items():
        tensors |= kohya(prefixes[network], path, update)
    ours = {f"{network}.{path}" for network, path in updates}
    assert places_by_diffusers(tensors, modules["unet"].config) == ours
    save_file(tensors, tmp_path / "lora.safetensors")
    check_applied(modules, updates, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("pattern", traced_once([LOCON, ATTENTION]))
def test_reads_the_block_numbers_of_ldm(pattern: str, tmp_path: Path) -> None:
    modules = make_modules("sdxl")
    unet = modules["unet"]
    updates = draw_updates({"unet": unet}, pattern)
    tensors: Tensors = {}
    for (_, path), update in updates.items():
        tensors |= kohya("lora_unet", numbered(unet, path), update)
    assert any("output_blocks_5_1_transformer_blocks_1" in name for name in tensors)
    assert places_by_diffusers(tensors, unet.config) == {f"unet.{path}" for _, path in updates}
    save_file(tensors, tmp_path / "lora.safetensors")
    check_applied(modules, updates, tmp_path / "lora.safetensors")


def test_every_layer_of_sdxl_in_kohya_s_names_is_known_to_diffusers(tmp_path: Path) -> None:
    modules = make_modules("sdxl")
    updates = draw_updates(modules, r"^(?!text_projection)")
    low_rank = {}
    for place, update in updates.items():
        alpha = update.rank if update.alpha is None else update.alpha
        low_rank[place] = LowRank(update.down, update.up, alpha / update.rank)
    save_lora(low_rank, tmp_path / "lora.safetensors", layout="kohya")
    tensors = load_file(tmp_path / "lora.safetensors")
    ours = {f"{network}.{path}" for network, path in updates}
    assert "unet.add_embedding.linear_1" in ours
    assert places_by_diffusers(tensors, modules["unet"].config) == ours
    check_applied(modules, updates, tmp_path / "lora.safetensors")


def test_a_file_that_names_the_blocks_in_both_ways_is_read_once(tmp_path: Path) -> None:
    modules = make_modules("sdxl")
    unet = modules["unet"]
    updates = draw_updates({"unet": unet}, LOCON)
    tensors: Tensors = {}
    for (_, path), update in updates.items():
        # What is not to be read.
        other = Update(layers(unet)[path], update.rank, update.alpha and 1.0)
        tensors |= kohya("lora_unet", numbered(unet, path), other)
        tensors |= kohya("lora_unet", path, update)
    save_file(tensors, tmp_path / "lora.safetensors")
    check_applied(modules, updates, tmp_path / "lora.safetensors")


PEFT_SPELLINGS = {
    "diffusers": "{network}.{path}.lora_{letter}.weight",
    "with the adapter's name": "{network}.{path}.lora_{letter}.default.weight",
    "of PEFT": "base_model.model.{network}.{path}.lora_{letter}.weight",
    "older diffusers": "{network}.{path}.lora.{word}.weight",
}


@pytest.mark.parametrize("spelling", traced_once(PEFT_SPELLINGS.values()), ids=PEFT_SPELLINGS)
def test_reads_dotted_paths(spelling: str, tmp_path: Path) -> None:
    modules = make_modules("sdxl")
    updates = draw_updates(modules, LOCON)
    tensors: Tensors = {}
    for (network, path), update in updates.items():
        update.alpha = None
        names = {"network": network, "path": path}
        tensors[spelling.format(letter="A", word="down", **names)] = update.down
        tensors[spelling.format(letter="B", word="up", **names)] = update.up
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    check_applied(modules, updates, tmp_path)


def test_reads_the_processors_of_old_diffusers(tmp_path: Path) -> None:
    """Attention only, in three spellings: with the network's name, without, and text towers."""
    modules = make_modules("sd1")
    updates = draw_updates({"unet": modules["unet"]}, r"attn\d\.to_")
    text = draw_updates({"text_encoder": modules["text_encoder"]}, "self_attn|mlp")
    text = {place: update for place, update in text.items() if "self_attn" in place[1]}
    bare: Tensors = {}
    for (_, path), update in updates.items():
        update.alpha = None
        head, layer = re.fullmatch(r"(.*)\.(to_[a-z]+)(?:\.0)?", path).groups()
        bare[f"{head}.processor.{layer}_lora.down.weight"] = update.down
        bare[f"{head}.processor.{layer}_lora.up.weight"] = update.up
    save_file(bare, tmp_path / "bare.safetensors")
    check_applied(modules, updates, tmp_path / "bare.safetensors")

    full = {f"unet.{name}": tensor for name, tensor in bare.items()}
    for (_, path), update in text.items():
        update.alpha = None
        head, layer = path.rsplit(".", 1)
        word = {"out_proj": "to_out"}.get(layer, f"to_{layer[0]}")
        full[f"text_encoder.{head}.{word}_lora.down.weight"] = update.down
        full[f"text_encoder.{head}.{word}_lora.up.weight"] = update.up
    save_file(full, tmp_path / "full.safetensors")
    check_applied(modules, {**updates, **text}, tmp_path / "full.safetensors")


def test_takes_alpha_from_what_peft_writes_beside(tmp_path: Path) -> None:
    modules = make_modules("sd1")
    updates = draw_updates({"unet": modules["unet"]}, r"attn\d\.to_")
    said = {"unet.lora_alpha": 3, "unet.alpha_pattern": {"attn2.to_k": 5.0}, "unet.r": 2}
    tensors: Tensors = {}
    for (_, path), update in updates.items():
        update.alpha = 5.0 if path.endswith("attn2.to_k") else 3.0
        tensors[f"unet.{path}.lora_A.weight"] = update.down
        tensors[f"unet.{path}.lora_B.weight"] = update.up
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(said)})
    check_applied(modules, updates, file)

    folder = tmp_path / "peft"
    folder.mkdir()
    own = {f"base_model.model.{name.removeprefix('unet.')}": t for name, t in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors")
    settings = {key.removeprefix("unet."): value for key, value in said.items()}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    check_applied(modules, updates, folder)


def test_reads_a_pickled_file_in_half_precision(tmp_path: Path) -> None:
    modules = make_modules("sd1")
    updates = draw_updates(modules, ATTENTION)
    tensors: Tensors = {}
    for (network, path), update in updates.items():
        update.down, update.up = update.down.half(), update.up.half()
        prefix = "lora_unet" if network == "unet" else "lora_te"
        tensors |= kohya(prefix, path, update)
    torch.save(tensors, tmp_path / "lora.pt")
    check_applied(modules, updates, tmp_path / "lora.pt")


def test_mixes_matrices_and_1x1_kernels(tmp_path: Path) -> None:
    """Trainers write either for a projection, whatever the checkpoint has."""
    modules = make_modules("sd1")  # 1x1 convolutions
    updates = draw_updates({"unet": modules["unet"]}, r"proj_in|proj_out|attn1\.to_")
    tensors: Tensors = {}
    for (_, path), update in updates.items():
        written = kohya("lora_unet", path, update)
        for name, tensor in written.items():
            if tensor.dim() == 4:
                tensors[name] = tensor.flatten(1).contiguous()
            else:
                tensors[name] = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
    save_file(tensors, tmp_path / "lora.safetensors")
    check_applied(modules, updates, tmp_path / "lora.safetensors")


@pytest.mark.parametrize("fused", [False, True])
def test_changes_the_noise_as_the_reference_with_changed_weights(
    fused: bool, tmp_path: Path
) -> None:
    modules = make_modules("sd1")
    unet = modules["unet"]
    reference = UNet2DConditionModel(
        block_out_channels=SD1.block_out_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ).eval()
    files, state = [], {name: t.clone() for name, t in unet.state_dict().items()}
    for number, (pattern, scale) in enumerate([(LOCON, 0.5), (ATTENTION, -1.5)]):
        updates = draw_updates({"unet": unet}, pattern)
        tensors: Tensors = {}
        for (_, path), update in updates.items():
            tensors |= kohya("lora_unet", path, update)
            state[f"{path}.weight"] += scale * torch.from_numpy(update.delta()).float()
        files.append((tmp_path / f"{number}.safetensors", scale))
        save_file(tensors, files[-1][0])
    latents, words = torch.randn(2, 4, 8, 6), torch.randn(2, 5, 16)
    timestep = torch.tensor([3, 700])
    with torch.no_grad():
        plain = unet(latents, timestep, words)
        handles = [apply_lora(modules, file, scale, fused=fused) for file, scale in files]
        reference.load_state_dict(state)
        wanted = reference(latents, timestep, words).sample
        assert not torch.allclose(plain, wanted, atol=1e-2)
        found = unet(latents, timestep, words)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
        # Another strength, and back.
        handles[0].set_scale(0.0)
        assert not torch.allclose(unet(latents, timestep, words), wanted, atol=1e-2)
        handles[0].set_scale(0.5)
        torch.testing.assert_close(unet(latents, timestep, words), found)
        for handle in handles:
            handle.remove()
            handle.remove()
        assert torch.equal(unet(latents, timestep, words), plain)


# --- what does not fit ----------------------------------------------------------------------------


def some_update(unet: nn.Module) -> Tensors:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return kohya("lora_unet", path, Update(layers(unet)[path], 2, 1.0))


def test_names_the_first_five_that_find_no_place(tmp_path: Path) -> None:
    modules = make_modules("sd1")
    before = weights(modules)
    strangers = {f"lora_unet_nowhere_{n}.lora_down.weight": torch.ones(2) for n in range(9)}
    save_file({**some_update(modules["unet"]), **strangers}, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsMismatch, match="9 of its 12 tensors have no place") as raised:
        apply_lora(modules, tmp_path / "lora.safetensors")
    assert [n for n in range(9) if f"nowhere_{n}" in str(raised.value)] == [0, 1, 2, 3, 4]
    after = weights(modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_refuses_half_an_update(tmp_path: Path) -> None:
    modules = make_modules("sd1")
    tensors = some_update(modules["unet"])
    tensors.pop(next(name for name in tensors if "lora_up" in name))
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsMismatch, match="lora_down"):
        apply_lora(modules, tmp_path / "lora.safetensors")


def test_refuses_another_width(tmp_path: Path) -> None:
    modules = make_modules("sd1")
    tensors = {
        n: t.repeat(1, 3) if t.dim() == 2 else t for n, t in some_update(modules["unet"]).items()
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsMismatch, match="another family"):
        apply_lora(modules, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("ending", "method"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA")]
)
def test_names_another_method(ending: str, method: str, tmp_path: Path) -> None:
    save_file({f"lora_unet_mid.{ending}": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(UnsupportedModel, match=method):
        apply_lora(make_modules("sd1"), tmp_path / "lora.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), "strong", True, float("inf")])
def test_refuses_an_odd_scale(scale: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="scale"):
        apply_lora({}, tmp_path / "lora.safetensors", scale)


def test_says_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no LoRA at"):
        apply_lora({}, tmp_path / "lora.safetensors")
    with pytest.raises(BadInput, match="0 files"):
        apply_lora({}, tmp_path)
    (tmp_path / "lora.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(WeightsMismatch, match="web page"):
        apply_lora({}, tmp_path / "lora.safetensors")


# --- learned words --------------------------------------------------------------------------------

WIDTHS = {"text_encoder": 16}
WIDTHS_XL = {"text_encoder": 16, "text_encoder_2": 8}


def test_reads_a1111(tmp_path: Path) -> None:
    vectors = torch.randn(3, 16)
    document = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "cat",
        "step": 499,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    torch.save(document, tmp_path / "my-cat.pt")
    found = read_embedding(tmp_path / "my-cat.pt", WIDTHS)
    assert found.token == "my-cat"
    assert torch.equal(found.vectors["text_encoder"], vectors)


def test_reads_the_other_layouts(tmp_path: Path) -> None:
    small, large = torch.randn(2, 16), torch.randn(2, 8)
    save_file({"emb_params": small}, tmp_path / "a.safetensors")
    found = read_embedding(tmp_path / "a.safetensors", WIDTHS)
    assert (found.token, found.vectors["text_encoder"].tolist()) == ("a", small.tolist())

    save_file({"clip_l": small, "clip_g": large}, tmp_path / "b.safetensors")
    found = read_embedding(tmp_path / "b.safetensors", WIDTHS_XL)
    assert torch.equal(found.vectors["text_encoder"], small)
    assert torch.equal(found.vectors["text_encoder_2"], large)

    torch.save({"<cat-toy>": small[0]}, tmp_path / "learned_embeds.bin")
    found = read_embedding(tmp_path, WIDTHS)
    assert found.token == "<cat-toy>"
    assert torch.equal(found.vectors["text_encoder"], small[:1])


def test_refuses_what_fits_no_encoder(tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(2, 17)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsMismatch, match="16 numbers for the text_encoder"):
        read_embedding(tmp_path / "a.safetensors", WIDTHS)
    save_file({"emb_params": torch.randn(2, 16)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsMismatch, match="8 numbers for the text_encoder_2"):
        read_embedding(tmp_path / "a.safetensors", WIDTHS_XL)
    save_file({"a": torch.randn(16), "b": torch.randn(16)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsMismatch, match="holds 2 tensors"):
        read_embedding(tmp_path / "a.safetensors", WIDTHS)
    uneven = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(1, 8)}
    save_file(uneven, tmp_path / "a.safetensors")
    with pytest.raises(WeightsMismatch, match="more vectors"):
        read_embedding(tmp_path / "a.safetensors", WIDTHS_XL)


def test_runs_nothing_that_a_learned_word_names(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"string_to_param": {"*": Hostile()}}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedModel, match="refuses to run"):
        read_embedding(tmp_path / "a.pt", WIDTHS)
    assert not (tmp_path / "executed").exists()


def test_adds_a_word_to_every_encoder_and_takes_it_away(tmp_path: Path) -> None:
    modules = make_modules("sdxl")
    before = weights(modules)
    files = {}
    for name, count in (("one", 2), ("two", 3)):
        files[name] = {"clip_l": torch.randn(count, 16), "clip_g": torch.randn(count, 8)}
        save_file(files[name], tmp_path / f"{name}.safetensors")
    one = add_embedding(modules, tmp_path / "one.safetensors", token="<first>")
    two = add_embedding(modules, tmp_path / "two.safetensors")
    assert (one.token, two.token) == ("<first>", "two")
    assert one.ids == {"text_encoder": (50, 51), "text_encoder_2": (50, 51)}
    assert two.ids["text_encoder_2"] == (52, 53, 54)

    tower = modules["text_encoder_2"]
    table = tower.text_model.embeddings.token_embedding
    assert torch.equal(table(torch.tensor([53])), files["two"]["clip_g"][1:2])
    with torch.no_grad():
        # The words' ids are larger than the end's, which old configs call the largest of all.
        ids = torch.tensor([[48, 5, 49, 49]])
        other = torch.tensor([[48, 53, 49, 49]])
        assert not torch.equal(tower(ids)[1], tower(other)[1])
        table.weight[53] = table.weight[5]
        torch.testing.assert_close(tower(ids)[1], tower(other)[1])

    one.remove()
    assert torch.equal(table(torch.tensor([52])), files["two"]["clip_g"][:1])
    two.remove()
    after = weights(modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    again = add_embedding(modules, tmp_path / "two.safetensors")
    assert again.ids["text_encoder"] == (50, 51, 52)
