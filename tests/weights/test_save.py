"""What we save, transformers loads, and we load back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diptych.errors import BadInput
from diptych.models.gpt2 import Gpt2Config
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.models.vit import ViTConfig
from diptych.weights.files import describe
from diptych.weights.load import load_captioner
from diptych.weights.save import describe_config, save_captioner


def save(module: Any, folder: Path, source: Path, **options: Any) -> None:
    model = describe(source)
    save_captioner(
        module,
        folder,
        preprocessing=model.preprocessing,
        generation=model.generation,
        tokenizer=model.tokenizer,
        **options,
    )


def randomised(config: VisionEncoderDecoderConfig) -> VisionEncoderDecoder:
    torch.manual_seed(4)
    module = VisionEncoderDecoder(config).eval()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
            else:
                tensor.fill_(1234)
    return module


def assert_same(one: VisionEncoderDecoder, other: VisionEncoderDecoder) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.dtype == second[name].dtype
    assert one.config == other.config


@pytest.mark.parametrize("seed", range(6))
def test_transformers_loads_what_we_save(
    tmp_path: Path,
    reference: Callable[..., Any],
    save_reference: Callable[..., Path],
    transformers: Any,
    seed: int,
) -> None:
    theirs = reference(seed)
    source = save_reference(theirs, tmp_path / "source")
    ours = load_captioner(describe(source))
    save(ours, tmp_path / "saved", source)

    again = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path / "saved").eval()
    side, channels = theirs.config.encoder.image_size, theirs.config.encoder.num_channels
    pixels, words = torch.randn(1, channels, side, side), torch.tensor([[5, 1, 2]])
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, decoder_input_ids=words).logits
        found = again(pixel_values=pixels, decoder_input_ids=words).logits
        options = {"max_new_tokens": 4, "num_beams": 2}
        assert torch.equal(theirs.generate(pixels, **options), again.generate(pixels, **options))
    assert torch.equal(expected, found)
    kinds = (theirs.config.encoder.model_type, theirs.config.decoder.tie_word_embeddings)
    assert kinds == (again.config.encoder.model_type, again.config.decoder.tie_word_embeddings)

    assert_same(ours, load_captioner(describe(tmp_path / "saved")))
    first, second = describe(source), describe(tmp_path / "saved")
    assert first.config == second.config
    assert first.preprocessing == second.preprocessing
    assert first.generation == second.generation


def test_auto_classes_find_tokenizer_and_processor(
    tmp_path: Path, checkpoint: Path, transformers: Any
) -> None:
    save(load_captioner(describe(checkpoint)), tmp_path / "saved", checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("ab d").input_ids == [0, 1, 2, 4]
    assert tokenizer.decode([0, 2, 3, 5], skip_special_tokens=True) == "a c"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (5, 5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    side = describe(checkpoint).config["encoder"]["image_size"]
    pixels = processor(Image.new("RGB", (40, 30)), return_tensors="pt").pixel_values
    assert tuple(pixels.shape) == (1, 3, side, side)


def test_older_tokenizers_are_copied_with_their_merges(
    tmp_path: Path, checkpoint: Path, transformers: Any
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    vocab = {"<|endoftext|>": 5, "a": 0, "b": 1, "Ġ": 2, "ab": 3}
    (checkpoint / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (checkpoint / "merges.txt").write_text("#version: 0.2\na b\n", "utf-8")
    assert describe(checkpoint).tokenizer == checkpoint / "vocab.json"
    save(load_captioner(describe(checkpoint)), tmp_path / "saved", checkpoint)
    assert (tmp_path / "saved" / "merges.txt").read_bytes() == b"#version: 0.2\na b\n"
    assert describe(tmp_path / "saved").tokenizer == tmp_path / "saved" / "vocab.json"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("ab a").input_ids == [3, 2, 0]


OURS = {
    "prefix": VisionEncoderDecoderConfig(
        ViTConfig.tiny(), replace(Gpt2Config.tiny(), add_cross_attention=False), "prefix"
    ),
    "prefix behind a stem": VisionEncoderDecoderConfig(
        replace(ViTConfig.tiny(), stem_channels=(4, 6, 8), stem_blocks=2, dropout=0.25),
        replace(Gpt2Config.tiny(), add_cross_attention=False, hidden_size=24, dropout=0.125),
        "prefix",
    ),
    "a stem, crossed": VisionEncoderDecoderConfig(
        replace(ViTConfig.tiny(), stem_channels=(4, 6, 8), qkv_bias=False),
        replace(Gpt2Config.tiny(), hidden_size=24, tie_word_embeddings=False),
    ),
    "distilled": VisionEncoderDecoderConfig(
        replace(ViTConfig.tiny(), distillation_token=True), Gpt2Config.tiny()
    ),
}


@pytest.mark.parametrize("dtype", [None, "float16", torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", OURS.values(), ids=OURS)
def test_our_own_kinds_come_back(
    tmp_path: Path, checkpoint: Path, config: VisionEncoderDecoderConfig, dtype: Any
) -> None:
    module = randomised(config)
    save(module, tmp_path / "saved", checkpoint, dtype=dtype)
    again = load_captioner(describe(tmp_path / "saved"))
    if dtype is not None:
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(target).float())
    assert_same(module, again)
    side = config.encoder.image_size
    pixels, words = torch.randn(2, 3, side, side), torch.randint(0, 99, (2, 3))
    with torch.no_grad():
        assert torch.equal(module(pixels, words), again(pixels, words))


def test_file_is_one_that_the_library_reads(tmp_path: Path, checkpoint: Path) -> None:
    module = randomised(OURS["prefix behind a stem"])
    save(module, tmp_path / "saved", checkpoint, dtype="float16")
    path = tmp_path / "saved" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        matrix = file.get_tensor("decoder.transformer.h.0.attn.c_attn.weight")
    assert torch.equal(matrix.t(), module.decoder.h[0].attn.c_attn.weight.half())
    assert "bridge.projection.weight" in names
    assert "encoder.embeddings.patch_embeddings.stages.0.1.num_batches_tracked" in names
    assert (int.from_bytes(path.read_bytes()[:8], "little") % 8) == 0
    document = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert document["bridge"] == "prefix"
    assert document["encoder"]["stem_channels"] == [4, 6, 8]


def test_numbers_beyond_a_half_are_told(tmp_path: Path, checkpoint: Path) -> None:
    module = randomised(VisionEncoderDecoderConfig.tiny())
    with torch.no_grad():
        module.decoder.wpe.weight[3, 2] = 7e4
    with pytest.raises(BadInput, match=r"decoder\.wpe\.weight holds numbers beyond float16"):
        save(module, tmp_path / "saved", checkpoint, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_config_of_a_module_is_that_of_its_folder(checkpoint: Path) -> None:
    model = describe(checkpoint)
    assert describe_config(load_captioner(model)) == model.config


# Whole, or not at all.


def test_an_existing_folder_keeps_what_is_not_ours(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    model = describe(checkpoint)
    module = load_captioner(model)
    with torch.no_grad():
        module.decoder.ln_f.bias += 1
    save(module, checkpoint, checkpoint)
    assert_same(module, load_captioner(describe(checkpoint)))
    assert (checkpoint / "notes.txt").read_text() == "mine"
    assert not list(checkpoint.glob(".*"))


def test_folders_above_are_made(tmp_path: Path, checkpoint: Path) -> None:
    save(load_captioner(describe(checkpoint)), tmp_path / "a" / "b", checkpoint)
    assert describe(tmp_path / "a" / "b").weights
    above, below = (tmp_path / "a").stat(), (tmp_path / "a" / "b").stat()
    assert below.st_mode == above.st_mode


def test_place_that_is_no_folder(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    module = load_captioner(describe(checkpoint))
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match=r"cannot be written: .*give another folder"):
            save(module, place, checkpoint)


def test_missing_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    module = load_captioner(describe(checkpoint))
    with pytest.raises(BadInput, match=r"cannot be written: No such file"):
        save_captioner(
            module,
            tmp_path / "saved",
            preprocessing={},
            generation={},
            tokenizer=tmp_path / "tokenizer.json",
        )
    assert not (tmp_path / "saved").exists()


def test_tokenizer_that_is_none(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("not JSON")
    with pytest.raises(BadInput, match=r"tokenizer\.json cannot be used: it is not JSON"):
        save(load_captioner(describe(checkpoint)), tmp_path / "saved", checkpoint)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("where", ["new", "checkpoint"])
def test_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, checkpoint: Path, where: str
) -> None:
    """A limit on the size of files stands for the disk: the system refuses the write the same."""
    resource = pytest.importorskip("resource")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert len(before["model.safetensors"]) > 20_000
    module = load_captioner(describe(checkpoint))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(BadInput) as caught:
            save(module, tmp_path / where, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: File too large. About 0 MB are needed: make" in str(caught.value)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
