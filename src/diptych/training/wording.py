"""Choose the words that a picture is shown with: its captions, a subject's, or a learned word's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.training.data import Item
from diptych.training.options import GeneratorTrainOptions

__all__ = ["Wording"]

# What the word is shown in (after the templates of Gal et al. 2022, appendix; own choice of them).
_TEMPLATES = {
    "object": (
        *("a photo of {}", "a picture of {}", "a close-up photo of {}", "a good photo of {}"),
        *("a bright photo of {}", "a photo of one {}", "a cropped photo of {}", "a drawing of {}"),
    ),
    "style": (
        *("a picture in the style of {}", "a painting in the style of {}"),
        *("a rendering in the style of {}", "a small drawing in the style of {}"),
    ),
}


class Wording:
    """Give the words for training, validation and samples, as the method wants them."""

    def __init__(self, options: GeneratorTrainOptions) -> None:
        self._options = options
        # DreamBooth and textual inversion say the same of every picture.
        self._sentences: tuple[str, ...] = ()
        if options.method == "dreambooth":
            self._sentences = (options.instance_prompt or "",)
        elif options.method == "textual-inversion":
            word = options.placeholder_token or ""
            templates = _TEMPLATES[options.learnable_property]
            self._sentences = tuple(each.format(word) for each in templates)

    def training(self, item: Item, rng: np.random.Generator) -> str:
        """Draw a caption of the picture; now and then none."""
        options = self._options
        if options.caption_dropout and rng.random() < options.caption_dropout:
            return ""
        choices = self._sentences or item.captions
        caption = choices[rng.integers(len(choices))]
        is_shuffled = options.shuffle_caption and not self._sentences
        return self._shuffled(caption, rng) if is_shuffled else caption

    def all_of(self, item: Item) -> list[str]:
        """Return every caption that `training` and `held_out` can give, if none is shuffled."""
        nothing = [""] if self._options.caption_dropout else []
        return [*(self._sentences or item.captions), *nothing]

    def held_out(self, item: Item) -> str:
        """Return the same caption of the picture every time."""
        return (self._sentences or item.captions)[0]

    def samples(self, items: Sequence[Item]) -> list[str]:
        """Return the prompts that are drawn while it learns."""
        options = self._options
        if options.sample_prompts:
            return list(options.sample_prompts)
        count = options.num_sample_images
        if self._sentences:
            return [self._sentences[n % len(self._sentences)] for n in range(count)]
        return [" ".join(each.captions[0].split()) for each in items[:count]]

    @property
    def has_weights(self) -> bool:
        """Tell whether brackets of `samples` weigh words: captions mean what stands there."""
        return bool(self._options.sample_prompts)

    def _shuffled(self, caption: str, rng: np.random.Generator) -> str:
        kept_places = self._options.keep_tokens
        parts = [part.strip() for part in caption.split(",")]
        kept, others = parts[:kept_places], parts[kept_places:]
        return ", ".join([*kept, *(others[i] for i in rng.permutation(len(others)))])
