"""Search against transformers' `generate`, brute force and distributions known in closed form.

The reference runs on tiny random models of its own; `ReferenceStep` drives the same model through
our search, without any cache, so these tests see the search alone.
"""

from __future__ import annotations

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
from diptych.image_to_text.candidates import Candidates
from diptych.image_to_text.decoding import Hypothesis, search, search_steps, settled, stream
from diptych.image_to_text.filters import filters_of
from diptych.image_to_text.options import CaptionOptions, SearchOptions
from traced import traced_once, untraced

IMAGE_SIZE = 8
POSITIONS = 48


@pytest.fixture(autouse=True)
def _one_thread(_seeds: None) -> None:
    torch.set_num_threads(1)  # Sharing work out costs more than these tiny models do.


# The reference --------------------------------------------------------------------------------


@untraced()
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
        with torch.no_grad(), untraced():
            logits = self.model.decoder(
                input_ids=torch.from_numpy(self.prefixes),
                encoder_hidden_states=self.encoded[torch.from_numpy(self.images)],
                use_cache=False,
            ).logits[:, -1]
        return logits.numpy()


class Choosing:
    """Tell the best tokens of another step's rows as a GPU does, in torch's order of equal ones."""

    def __init__(self, step: Any) -> None:
        self.step = step
        self.asked: list[int] = []

    def __call__(self, token_ids: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
        logits: np.ndarray = self.step(token_ids, parents)
        return logits

    def best(
        self, token_ids: np.ndarray, parents: np.ndarray | None, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.asked.append(count)
        logits = torch.tensor(self.step(token_ids, parents))
        values, places = logits.topk(min(count, logits.shape[1]), dim=1, sorted=False)
        log_sums = logits.logsumexp(1) - logits.max(dim=1).values
        return places.numpy(), values.numpy(), log_sums.numpy()


HOW = pytest.mark.parametrize("how", [lambda step: step, Choosing], ids=["whole", "best"])


@untraced()
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
        plain = decoding.rank

        def recording(scores: np.ndarray, count: int) -> np.ndarray:
            places = plain(scores, count + 1)
            best = scores[places]
            # Beams that only repeat another, and words that are banned, tie by construction.
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
    # Both ways of asking, in turns.
    step: Any = ReferenceStep(model, pixel_values)
    step = Choosing(step) if seed % 2 else step
    with monkeypatch.context() as patch:
        gaps = Gaps(patch)
        ours = our_captions(step, len(pixel_values), prompt_ids, ends, **words)
    note = f"seed {seed}, V {vocabulary}, {words}, smallest gap at a border {gaps.smallest:.2g}"
    assert_same_captions(ours, reference, note)
    return [len(found.token_ids) for image in ours for found in image]


@pytest.mark.parametrize("block", traced_once(range(8)))
def test_same_tokens_as_transformers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [compare_one(20 * block + i, monkeypatch) for i in range(20)]
    assert len({length for case in lengths for length in case}) > 5, "captions of many lengths"


@pytest.mark.parametrize("seed", range(12))
def test_same_tokens_with_fewer_words_than_candidates(seed: int) -> None:
    """With V < 2 * num_beams some beams only repeat the first, at transformers' score of -1e9.

    With V <= num_beams such beams tie, and transformers' choice among them is that of torch.topk.
    """
    rng = np.random.default_rng(seed)
    num_beams = int(rng.integers(2, 7))
    vocabulary = int(rng.integers(num_beams + 1, 2 * num_beams + 1))
    model = reference_model(seed, vocabulary, end_bias=float(rng.choice([0.0, 3.0])))
    end = vocabulary - 1
    words = {
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "max_new_tokens": int(rng.integers(1, 9)),
        "length_penalty": float(rng.choice([-1.0, 1.0])),
        "early_stopping": [False, True, "never"][seed % 3],
    }
    pixel_values = pictures(seed, 2)
    reference = their_captions(model, pixel_values, [end], [end], **words)
    ours = our_captions(ReferenceStep(model, pixel_values), 2, [end], [end], **words)
    assert_same_captions(ours, reference, words)


@pytest.mark.parametrize("seed", range(6))
def test_same_tokens_with_many_end_tokens(seed: int) -> None:
    """Each further end token adds num_beams candidates, so that enough beams stay unfinished."""
    model = reference_model(seed, 14, sharpness=1.0)
    ends = [9, 10, 11, 12, 13]
    words = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 9}
    pixel_values = pictures(seed, 4)
    reference = their_captions(model, pixel_values, [13], ends, eos_token_id=ends, **words)
    ours = our_captions(ReferenceStep(model, pixel_values), 4, [13], ends, **words)
    assert_same_captions(ours, reference, words)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_same_tokens_without_an_end_token(num_beams: int) -> None:
    model = reference_model(3, 20)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    words = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 7}
    pixel_values = pictures(3, 2)
    reference = their_captions(model, pixel_values, [19], [], **words)
    ours = our_captions(ReferenceStep(model, pixel_values), 2, [19], [], **words)
    assert_same_captions(ours, reference, words)
    assert {len(found.token_ids) for image in ours for found in image} == {7}


def test_end_tokens_outside_the_vocabulary_mean_nothing() -> None:
    words = {"max_new_tokens": 5, "min_length": 4, "num_beams": 2}
    without = our_captions(random_table(1, 9), 2, [8], [], **words)
    assert our_captions(random_table(1, 9), 2, [8], [-1], **words) == without
    with_far = our_captions(random_table(1, 9), 2, [8], [8, 500], **words)
    assert all(8 not in found.token_ids[:2] for image in with_far for found in image)


def test_greedy_with_every_token_banned_gives_token_0_as_transformers_does() -> None:
    """A quirk of transformers: argmax over nothing but -inf."""
    model = reference_model(0, 5)
    words = {"no_repeat_ngram_size": 1, "max_new_tokens": 8}
    pixel_values = pictures(0, 1)
    reference = their_captions(model, pixel_values, [4], [4], **words)
    ours = our_captions(ReferenceStep(model, pixel_values), 1, [4], [4], **words)
    assert_same_captions(ours, reference, words)
    assert ours[0][0].token_ids[-4:] == (0, 0, 0, 0)


def test_beams_with_every_token_banned_return_what_stood() -> None:
    """A quirk of transformers: unfinished rows come back with a score of -1e9.

    Their order is a tie that torch.topk settles, so rows are compared in kind only.
    """
    model = reference_model(0, 9)
    words = {"no_repeat_ngram_size": 1, "max_new_tokens": 12, "num_beams": 2}
    pixel_values = pictures(0, 1)
    [[(their_ids, their_score)]] = their_captions(model, pixel_values, [8], [8], **words)
    [[found]] = our_captions(ReferenceStep(model, pixel_values), 1, [8], [8], **words)
    assert found.score == their_score == -1e9
    assert sorted(found.token_ids) == sorted(their_ids) == list(range(8))
    assert len(found.token_logprobs) == 8


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_each_row_give_what_whole_rows_give(seed: int) -> None:
    """Also with many equal logits, penalties that sink the best, and bans; sampling asks for all.

    Equal logits are fewer than the spare ones that are asked for.
    """
    rng = np.random.default_rng(seed)
    vocabulary = 700

    def logits_of(image: int, said: tuple[int, ...]) -> np.ndarray:
        # All that was said counts: else sums of beams are equal but for their rounding.
        own = np.random.default_rng((seed, image, *said))
        logits = own.normal(scale=2.0, size=vocabulary).astype(np.float32)
        return (logits * 8).round() / 8 if seed % 2 else logits

    num_beams = int(rng.integers(1, 6))
    words = {
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "max_new_tokens": 14,
        "min_length": int(rng.choice([0, 9])),
        "repetition_penalty": float(rng.choice([0.8, 1.0, 1.0, 3.0])),
        "no_repeat_ngram_size": int(rng.choice([0, 1, 2])),
        "do_sample": False,
    }
    whole, few = TableStep(logits_of), Choosing(TableStep(logits_of))
    expected, found = (our_captions(step, 2, [5, 3], [5], **words) for step in (whole, few))
    for wanted, got in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        assert got.token_ids == wanted.token_ids
        assert got.score == pytest.approx(wanted.score, abs=1e-5)
        assert got.token_logprobs == pytest.approx(wanted.token_logprobs, abs=1e-5)
    # A reward may lift a token from anywhere, so then nothing can be left out.
    assert bool(few.asked) == (words["repetition_penalty"] >= 1)
    assert all(count < 60 for count in few.asked)


# Closed forms ---------------------------------------------------------------------------------


class TableStep:
    """Give logits that depend on the image and on everything said so far."""

    def __init__(self, logits_of: Callable[[int, tuple[int, ...]], np.ndarray]) -> None:
        self.logits_of = logits_of
        self.rows: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, token_ids: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
        before = [(image, ()) for image in range(len(token_ids))]
        if parents is not None:
            before = [self.rows[parent] for parent in parents]
        self.rows = [
            (image, said + tuple(new.tolist()))
            for (image, said), new in zip(before, token_ids, strict=True)
        ]
        return np.stack([self.logits_of(image, said) for image, said in self.rows])


def random_table(seed: int, vocabulary: int) -> TableStep:
    def logits_of(image: int, said: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng((seed, image, *said))
        return rng.normal(scale=2.0, size=vocabulary).astype(np.float32)

    return TableStep(logits_of)


def every_caption(
    step: TableStep, image: int, end: int, new_tokens: int, length_penalty: float
) -> Iterator[tuple[tuple[int, ...], float]]:
    def grow(said: tuple[int, ...], total: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(said) == new_tokens or (said and said[-1] == end):
            yield said, total / len(said) ** length_penalty
            return
        logprobs = decoding.log_softmax(step.logits_of(image, (end, *said))[None])[0]
        for token, logprob in enumerate(logprobs.tolist()):
            yield from grow((*said, token), total + logprob)

    return grow((), 0.0)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize(("vocabulary", "new_tokens"), [(2, 5), (3, 4), (4, 3)])
def test_wide_beam_search_equals_brute_force(
    vocabulary: int, new_tokens: int, length_penalty: float
) -> None:
    end, width = vocabulary - 1, vocabulary**new_tokens
    step = random_table(7, vocabulary)
    found = search(
        step,
        num_images=2,
        prompt_ids=[end],
        options=decided(
            num_beams=width,
            num_return_sequences=8,
            max_new_tokens=new_tokens,
            length_penalty=length_penalty,
        ),
        eos_token_ids=[end],
    )
    for image, hypotheses in enumerate(found):
        best = sorted(
            every_caption(step, image, end, new_tokens, length_penalty), key=lambda x: -x[1]
        )
        assert len(hypotheses) == min(8, width)
        for hypothesis, (token_ids, score) in zip(hypotheses[: len(best)], best[:8], strict=True):
            assert hypothesis.token_ids == token_ids
            assert hypothesis.score == pytest.approx(score, abs=1e-5)


def test_log_probabilities_are_the_models_own() -> None:
    model = reference_model(11, 24, end_bias=3.0)
    pixel_values = pictures(11, 3)
    filtered = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 10}
    for words in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 4, "temperature": 1.7}):
        step = ReferenceStep(model, pixel_values)
        found = our_captions(step, 3, [23], [23], **filtered, **words)
        for image, [hypothesis] in enumerate(found):
            ids = torch.tensor([[23, *hypothesis.token_ids]])
            with torch.no_grad():
                logits = model.decoder(
                    input_ids=ids, encoder_hidden_states=step.encoded[image : image + 1]
                ).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert hypothesis.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_scores_follow_from_log_probabilities() -> None:
    model = reference_model(12, 24, end_bias=3.0)
    pixel_values = pictures(12, 2)
    step = lambda: ReferenceStep(model, pixel_values)  # noqa: E731
    words = {"num_beams": 4, "length_penalty": 0.7, "max_new_tokens": 9, "num_return_sequences": 4}
    for hypothesis in itertools.chain(*our_captions(step(), 2, [23], [23], **words)):
        total = sum(hypothesis.token_logprobs)
        expected = total / len(hypothesis.token_ids) ** 0.7
        assert hypothesis.score == pytest.approx(expected, abs=1e-5)
    for hypothesis in itertools.chain(*our_captions(step(), 2, [23], [23], max_new_tokens=9)):
        assert hypothesis.score == pytest.approx(np.mean(hypothesis.token_logprobs), abs=1e-6)


# Sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_filters_equal_those_of_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = int(rng.choice([7, 50, 1000]))
    scores = rng.normal(scale=3, size=(3, vocabulary)).astype(np.float32)
    if seed % 4 == 0:
        scores = scores.round()  # many ties
    words = {
        "temperature": float(rng.choice([0.3, 1.0, 1.9])),
        "top_k": int(rng.choice([0, 1, 5, 50])),
        "top_p": float(rng.choice([0.0, 0.1, 0.5, 0.95, 1.0])),
        "repetition_penalty": float(rng.choice([0.8, 1.0, 1.6])),
        "no_repeat_ngram_size": int(rng.choice([0, 1, 2, 3])),
        "min_length": int(rng.choice([0, 5, 20])),
    }
    end = vocabulary - 1
    token_ids = rng.integers(0, min(vocabulary, 9), (3, 12))
    options = decided(**words, do_sample=True, seed=0, max_length=40)
    ours = filters_of(options, np.array([end]))(scores, Candidates(scores), token_ids)
    chain = [
        theirs.RepetitionPenaltyLogitsProcessor(words["repetition_penalty"]),
        theirs.NoRepeatNGramLogitsProcessor(words["no_repeat_ngram_size"] or 99),
        theirs.MinLengthLogitsProcessor(words["min_length"], torch.tensor([end])),
        theirs.TemperatureLogitsWarper(words["temperature"]),
        theirs.TopKLogitsWarper(words["top_k"] or vocabulary),
        theirs.TopPLogitsWarper(words["top_p"]),
    ]
    reference = torch.from_numpy(scores)
    for process in chain:
        reference = process(torch.from_numpy(token_ids), reference)
    expected = reference.numpy()
    if seed % 4 == 0:
        # Which of the words that tie at the border stay is up to torch.sort, and not stable.
        ours, expected = np.sort(ours), np.sort(expected)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.no_cover  # thousands of draws
def test_draws_follow_the_filtered_distribution() -> None:
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -3.0], np.float32)
    words = {"temperature": 0.8, "top_k": 5, "top_p": 0.92, "seed": 1, "max_new_tokens": 1}
    count = 4000
    found = search(
        TableStep(lambda image, said: logits),
        num_images=count,
        prompt_ids=[5],
        options=decided(**words),
        eos_token_ids=[5],
    )
    drawn = np.bincount([image[0].token_ids[0] for image in found], minlength=6) / count
    reference = torch.from_numpy(logits[None]) / 0.8
    reference = theirs.TopPLogitsWarper(0.92)(None, theirs.TopKLogitsWarper(5)(None, reference))
    expected = reference.softmax(-1)[0].numpy()
    assert (expected == 0).sum() == 2
    assert (drawn[expected == 0] == 0).all()
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(drawn - expected) <= 4 * spread).all(), (drawn, expected)


def test_seeds_repeat_and_number_the_images() -> None:
    model = reference_model(5, 40, sharpness=1.0)
    words = {"temperature": 1.3, "max_new_tokens": 10}
    pixel_values = pictures(5, 1).repeat(4, 1, 1, 1)

    def sample(images: slice, seed: int, **more: Any) -> list[list[Hypothesis]]:
        step = ReferenceStep(model, pixel_values[images])
        return our_captions(step, len(pixel_values[images]), [39], [39], seed=seed, **words, **more)

    batch = sample(slice(4), 0)
    assert batch == sample(slice(4), 0)
    ids = [image[0].token_ids for image in batch]
    assert ids == [sample(slice(1), seed)[0][0].token_ids for seed in range(4)]
    assert len(set(ids)) > 1
    several = sample(slice(2), 0, num_return_sequences=3)
    for image, hypotheses in enumerate(several):
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        assert ids[image] in [h.token_ids for h in hypotheses], "more captions keep the first draw"


def test_sampling_ends_captions_at_the_end_token() -> None:
    model = reference_model(6, 20, sharpness=1.0, end_bias=4.0)
    step = ReferenceStep(model, pictures(6, 3))
    words = {"num_return_sequences": 5, "do_sample": True, "seed": 3, "max_new_tokens": 12}
    found = our_captions(step, 3, [19], [19], **words)
    assert [len(image) for image in found] == [5, 5, 5]
    hypotheses = list(itertools.chain(*found))
    assert len({len(h.token_ids) for h in hypotheses}) > 2
    for hypothesis in hypotheses:
        assert 19 not in hypothesis.token_ids[:-1]
        assert hypothesis.token_ids[-1] == 19 or len(hypothesis.token_ids) == 12
        assert len(hypothesis.token_logprobs) == len(hypothesis.token_ids)


# Batches, streams, the rules of a step --------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {"num_beams": 2},
    {"num_beams": 5, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "early_stopping": True},
    {"do_sample": True, "seed": 9},
]


@HOW
@pytest.mark.parametrize("words", WAYS)
def test_an_image_gives_in_a_batch_what_it_gives_alone(words: dict[str, Any], how: Any) -> None:
    model = reference_model(21, 30, end_bias=4.0)
    pixel_values = pictures(21, 8)
    words = {"max_new_tokens": 12, **words}
    step = ReferenceStep(model, pixel_values)
    together = our_captions(how(step), 8, [29], [29], **words)
    for image in range(8):
        alone = dict(words)
        if "seed" in words:
            alone["seed"] += image
        one = ReferenceStep(model, pixel_values[image : image + 1])
        [hypotheses] = our_captions(how(one), 1, [29], [29], **alone)
        assert [h.token_ids for h in hypotheses] == [h.token_ids for h in together[image]]
    fed = step.rows_fed
    assert fed[0] == 8
    assert fed[1:] == sorted(fed[1:], reverse=True)
    if words.get("early_stopping") != "never":
        assert fed[-1] < fed[1], "images that are done leave the batch"
    assert all(rows % words.get("num_beams", 1) == 0 for rows in fed[1:])


@pytest.mark.parametrize("words", WAYS)
@pytest.mark.parametrize("seed", [31, 32, 33])
def test_streams_give_the_best_caption_piece_by_piece(seed: int, words: dict[str, Any]) -> None:
    model = reference_model(seed, 30, end_bias=3.0)
    pixel_values = pictures(seed, 1)
    words = {"max_new_tokens": 12, **words}
    [[best, *_]] = our_captions(ReferenceStep(model, pixel_values), 1, [29], [29], **words)
    pieces = list(
        stream(
            ReferenceStep(model, pixel_values),
            prompt_ids=[29],
            options=decided(**words),
            eos_token_ids=[29],
        )
    )
    assert all(pieces)
    assert sum(pieces, ()) == best.token_ids
    if words.get("num_beams", 1) == 1:
        assert all(len(piece) == 1 for piece in pieces)


def test_beams_settle_tokens_before_the_end() -> None:
    sizes = []
    for seed in range(6):
        model = reference_model(seed, 30, sharpness=4.0, end_bias=3.0)
        steps = search_steps(
            ReferenceStep(model, pictures(seed, 2)),
            num_images=2,
            prompt_ids=[29],
            options=decided(num_beams=3, max_new_tokens=14),
            eos_token_ids=[29],
        )
        seen = [[settled(state) for state in states] for states in steps]
        for image in range(2):
            final = seen[-1][image]
            for before, after in itertools.pairwise(states[image] for states in seen):
                assert after[: len(before)] == before
                sizes.append(len(before) if before != final else 0)
    assert max(sizes) > 2


def test_streaming_gives_one_caption_only() -> None:
    options = decided(num_beams=3, num_return_sequences=2)
    with pytest.raises(BadInput, match=r"num_return_sequences is 2.*num_return_sequences=1"):
        next(stream(random_table(0, 9), prompt_ids=[8], options=options, eos_token_ids=[8]))


def test_the_step_is_called_as_often_as_needed() -> None:
    for words, calls in (({"max_new_tokens": 1}, 1), ({"max_new_tokens": 5, "min_length": 6}, 5)):
        for num_beams in (1, 3):
            step = ReferenceStep(reference_model(0, 20), pictures(0, 2))
            our_captions(step, 2, [19], [19], num_beams=num_beams, **words)
            assert step.rows_fed == [2, *[2 * num_beams] * (calls - 1)]


def test_no_image_needs_no_step() -> None:
    options = decided(num_beams=2)
    assert (
        search(random_table(0, 9), num_images=0, prompt_ids=[8], options=options, eos_token_ids=[8])
        == []
    )


@pytest.mark.parametrize("prompt_ids", [[], [1] * 6])
def test_prompts_without_room_are_refused(prompt_ids: list[int]) -> None:
    options = decided(max_length=6)
    with pytest.raises(BadInput, match="max_length is 6"):
        search(
            random_table(0, 9),
            num_images=1,
            prompt_ids=prompt_ids,
            options=options,
            eos_token_ids=[8],
        )


@HOW
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("words", WAYS)
def test_logits_that_are_no_numbers_are_named(
    value: float, words: dict[str, Any], how: Any
) -> None:
    def logits_of(image: int, said: tuple[int, ...]) -> np.ndarray:
        logits = np.zeros(9, np.float32)
        logits[4] = value if len(said) == 3 else 1.0
        return logits

    with pytest.raises(DiptychError, match="not finite at step 3"):
        search(
            how(TableStep(logits_of)),
            num_images=2,
            prompt_ids=[8],
            options=decided(**words),
            eos_token_ids=[8],
        )


@HOW
@pytest.mark.parametrize("words", WAYS)
def test_a_model_may_ban_tokens_itself(words: dict[str, Any], how: Any) -> None:
    def logits_of(image: int, said: tuple[int, ...]) -> np.ndarray:
        return np.where(np.arange(60) % 3 == 0, -np.inf, np.float32(0.0)).astype(np.float32)

    found = search(
        how(TableStep(logits_of)),
        num_images=2,
        prompt_ids=[59],
        options=decided(max_new_tokens=6, **words),
        eos_token_ids=[59],
    )
    for hypothesis in itertools.chain(*found):
        assert all(token % 3 for token in hypothesis.token_ids)
        assert np.isfinite(hypothesis.token_logprobs).all()


def test_sampling_from_nothing_says_so() -> None:
    words = {"seed": 0, "top_p": 0.5, "no_repeat_ngram_size": 1, "max_new_tokens": 9}
    with pytest.raises(DiptychError, match="no token is left"):
        our_captions(random_table(0, 5), 1, [4], [4], **words)


def test_steps_may_reuse_their_buffer() -> None:
    model = reference_model(2, 20, end_bias=3.0)
    for words in WAYS:
        fresh = ReferenceStep(model, pictures(2, 3))
        inner = ReferenceStep(model, pictures(2, 3))
        buffer = np.zeros((64, 20), np.float32)

        def reusing(
            token_ids: np.ndarray,
            parents: np.ndarray | None,
            inner: ReferenceStep = inner,
            buffer: np.ndarray = buffer,
        ) -> np.ndarray:
            view = buffer[: len(token_ids)]
            view[:] = inner(token_ids, parents)
            view.flags.writeable = False
            return view

        words = {"max_new_tokens": 8, "repetition_penalty": 1.2, **words}
        assert our_captions(reusing, 3, [19], [19], **words) == our_captions(
            fresh, 3, [19], [19], **words
        )


# Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_rank_is_a_stable_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 5, 255, 256, 1000, 20_000]))
    scores = rng.normal(size=size).astype(np.float32)
    if seed % 2:
        scores = scores.round(1)
    if seed % 3 == 0:
        scores[rng.random(size) < 0.9] = -np.inf
    for count in (1, 2, 8, 64):
        expected = np.argsort(-scores, kind="stable")[:count]
        assert (decoding.rank(scores, count) == expected).all()


def test_log_softmax_equals_torch() -> None:
    logits = np.random.default_rng(0).normal(scale=20, size=(4, 50257)).astype(np.float32)
    expected = torch.from_numpy(logits).log_softmax(-1).numpy()
    ours = decoding.log_softmax(logits)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_full_vocabulary_takes_milliseconds() -> None:
    """Guard against work that grows with Python and the vocabulary; benchmarks hold the numbers."""
    logits = np.random.default_rng(0).normal(scale=3, size=(4, 50257)).astype(np.float32)
    options = decided(num_beams=4, max_new_tokens=10, no_repeat_ngram_size=3)
    times = []
    for _ in range(3):
        start = time.process_time()
        search(
            lambda token_ids, parents: logits[: len(token_ids)],
            num_images=1,
            prompt_ids=[50256],
            options=options,
            eos_token_ids=[50256],
        )
        times.append((time.process_time() - start) / 10)
    assert min(times) < 0.02
