"""Search against transformers' `generate`, brute force and distributions known in closed form.

The reference runs on tiny random models of its own; `ReferenceStep` drives the same model through
our search, without any cache, so these tests see the search alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.generation import logits_process as theirs

from diptych.errors import BadInput, DiptychError
from diptych.image_to_text import decoding
from diptych.image_to_text.decoding import Hypothesis, search, search_steps, settled, stream
from diptych.image_to_text.options import CaptionOptions, SearchOptions

IMAGE_SIZE = 8
POSITIONS = 48


# The reference --------------------------------------------------------------------------------


def reference_model(
    seed: int, vocabulary: int, *, sharpness: float = 3.0, end_bias: float = 0.0
) -> Any:
    """Build a tiny captioner whose words are unevenly likely; the last id starts and ends."""
    torch.manual_seed(seed)
    size = {"intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = ViTConfig(hidden_size=16, image_size=IMAGE_SIZE, patch_size=4, **size)
    end = vocabulary - 1
    decoder = GPT2Config(
        vocab_size=vocabulary,
        n_embd=16,
        n_head=2,
        n_layer=2,
        n_positions=POSITIONS,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=end,
        eos_token_id=end,
        initializer_range=0.5,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("encoder.") and parameter.ndim > 1:
                parameter.normal_(std=0.5)
        # The head is tied to the embeddings, so a direction added before it moves one word's logit.
        final_norm = model.decoder.transformer.ln_f
        embedding = model.decoder.transformer.wte.weight[end]
        final_norm.weight.fill_(sharpness / 2)
        final_norm.bias.copy_(end_bias * embedding / embedding.square().sum())
    settings = model.generation_config
    settings.decoder_start_token_id = settings.eos_token_id = settings.pad_token_id = end
    settings.bos_token_id = None
    return model


def pictures(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


class ReferenceStep:
    """Run the reference's decoder on whole prefixes, and hold the caller to `Step`'s rules."""

    def __init__(self, model: Any, pixel_values: torch.Tensor) -> None:
        self.model = model
        with torch.no_grad():
            self.encoded = model.encoder(pixel_values).last_hidden_state
        self.prefixes = np.zeros((0, 0), np.int64)
        self.images = np.zeros(0, np.int64)
        self.rows_fed: list[int] = []

    def __call__(self, token_ids: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
        assert token_ids.dtype == np.int64
        assert token_ids.ndim == 2
        if parents is None:
            assert not self.rows_fed
            assert len(token_ids) == len(self.encoded)
            self.prefixes, self.images = token_ids, np.arange(len(token_ids))
        else:
            assert token_ids.shape == (len(parents), 1)
            assert parents.dtype == np.int64
            self.prefixes = np.concatenate([self.prefixes[parents], token_ids], axis=1)
            self.images = self.images[parents]
            sizes = np.unique(self.images, return_counts=True)[1]
            assert (np.diff(self.images) >= 0).all(), "rows of one image are adjacent, in order"
            assert len(set(sizes.tolist())) == 1, "every image has as many rows as the others"
        self.rows_fed.append(len(token_ids))
        with torch.no_grad():
            logits = self.model.decoder(
                input_ids=torch.from_numpy(self.prefixes),
                encoder_hidden_states=self.encoded[torch.from_numpy(self.images)],
                use_cache=False,
            ).logits[:, -1]
        return logits.numpy()


def their_captions(
    model: Any,
    pixel_values: torch.Tensor,
    prompt_ids: Sequence[int],
    ends: Sequence[int],
    **words: Any,
) -> list[list[tuple[tuple[int, ...], float | None]]]:
    """Return transformers' captions of each image: ids after the prompt up to the end, score."""
    prompts = torch.tensor([list(prompt_ids)] * len(pixel_values))
    with torch.no_grad():
        output = model.generate(
            pixel_values,
            decoder_input_ids=prompts,
            return_dict_in_generate=True,
            output_scores=True,
            **words,
        )
    scores = getattr(output, "sequences_scores", None)
    found = []
    for row, ids in enumerate(output.sequences[:, len(prompt_ids) :].tolist()):
        end = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
        found.append((tuple(ids[:end]), None if scores is None else float(scores[row])))
    each = words.get("num_return_sequences", 1)
    return [found[start : start + each] for start in range(0, len(found), each)]


def decided(prompt_length: int = 1, **words: Any) -> SearchOptions:
    return CaptionOptions(**words).resolve().for_search(prompt_length)


def our_captions(
    step: Any, num_images: int, prompt_ids: Sequence[int], ends: Sequence[int], **words: Any
) -> list[list[Hypothesis]]:
    return search(
        step,
        num_images=num_images,
        prompt_ids=prompt_ids,
        options=decided(len(prompt_ids), **words),
        eos_token_ids=ends,
    )


class Gaps:
    """Record how far the last place that counted was ahead of the first that did not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.smallest = np.inf
        self.ranked_nothing = False
        plain = decoding.rank

        def recording(scores: np.ndarray, count: int) -> np.ndarray:
            places = plain(scores, count + 1)
            best = scores[places]
            # Beams that only repeat another, and words that are banned, tie by construction.
            self.ranked_nothing |= bool(best[count // 2 - 1] < -1e8) and scores.ndim == 1
            if len(places) > count and best[count] > -1e8:
                self.smallest = min(self.smallest, float(best[count - 1] - best[count]))
            return places[:count]

        monkeypatch.setattr(decoding, "rank", recording)


def assert_same_captions(
    ours: list[list[Hypothesis]],
    theirs_: list[list[tuple[tuple[int, ...], float | None]]],
    note: object,
) -> None:
    for image, (mine, reference) in enumerate(zip(ours, theirs_, strict=True)):
        assert [h.token_ids for h in mine] == [ids for ids, _ in reference], (image, note)
        for hypothesis, (_, score) in zip(mine, reference, strict=True):
            if score is not None:
                assert hypothesis.score == pytest.approx(score, abs=1e-4, rel=1e-5), (image, note)


# Parity with transformers ---------------------------------------------------------------------


def random_words(rng: np.random.Generator, vocabulary: int, prompt_length: int) -> dict[str, Any]:
    """Draw options that transformers and we both understand."""
    most_beams = min(6, (vocabulary - 4) // 2)
    num_beams = int(rng.choice([1, 2, 3, 4, 5, 6][:most_beams]))
    words: dict[str, Any] = {"num_beams": num_beams, "do_sample": False}
    if rng.random() < 0.5:
        words["max_length"] = int(rng.integers(prompt_length + 1, 18))
    else:
        words["max_new_tokens"] = int(rng.integers(1, 16))
    if num_beams > 1:
        words["length_penalty"] = float(rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0, 1.0, 2.0]))
        words["early_stopping"] = [False, True, "never"][int(rng.integers(3))]
        words["num_return_sequences"] = int(rng.integers(1, num_beams + 1))
    if rng.random() < 0.4:
        words["repetition_penalty"] = float(rng.choice([0.7, 1.2, 1.8]))
    if rng.random() < 0.4:
        words["no_repeat_ngram_size"] = int(rng.integers(1, 4))
    if rng.random() < 0.4:
        longest = words.get("max_length", words.get("max_new_tokens", 0) + prompt_length)
        words["min_length"] = int(rng.integers(1, longest + 1))
    return words


def compare_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compare one random model under random options; return the lengths of the captions."""
    rng = np.random.default_rng(seed)
    vocabulary = int(rng.integers(17, 61))
    model = reference_model(
        seed,
        vocabulary,
        sharpness=float(rng.choice([0.5, 1.0, 3.0])),
        end_bias=float(rng.choice([0.0, 2.0, 4.0, 6.0])),
    )
    end = vocabulary - 1
    extra = [] if rng.random() < 0.7 else rng.integers(0, end, int(rng.integers(1, 4))).tolist()
    prompt_ids, ends = [end, *extra], [end]
    if rng.random() < 0.15:
        ends.append(int(rng.integers(0, end)))
    words = random_words(rng, vocabulary, len(prompt_ids))
    pixel_values = pictures(seed, int(rng.integers(1, 4)))
    reference = their_captions(
        model, pixel_values, prompt_ids, ends, eos_token_id=ends, pad_token_id=end, **words
    )
    with monkeypatch.context() as patch:
        gaps = Gaps(patch)
        ours = our_captions(
            ReferenceStep(model, pixel_values), len(pixel_values), prompt_ids, ends, **words
        )
    note = f"seed {seed}, V {vocabulary}, {words}, smallest gap at a border {gaps.smallest:.2g}"
    assert_same_captions(ours, reference, note)
    return [len(found.token_ids) for image in ours for found in image]


@pytest.mark.parametrize("block", range(8))
def test_same_tokens_as_transformers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [compare_one(20 * block + i, monkeypatch) for i in range(20)]
    assert len({length for case in lengths for length in case}) > 5, "captions of many lengths"
