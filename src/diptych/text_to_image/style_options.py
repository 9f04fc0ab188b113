"""Settings of a style transfer."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.errors import BadInput
from diptych.option_fields import option, setting
from diptych.text_to_image.options import MaskedOptions

__all__ = ["PRESETS", "StyleOptions"]

# Shares of the content's query at the first step and at the last, and what multiplies the scores
# (Chung et al. 2024; the falling share: scheduled style injection, 2025).
PRESETS = {"content": (0.75, 0.75, 1.5), "style": (0.75, 0.375, 1.5)}


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleOptions(MaskedOptions):
    """Say how a picture takes on the style of another.

    What the preset decides may be set one by one. Width and height left open follow from the
    content, as in image to image. The sampler is always DDIM, and nothing is left to chance.
    """

    preset: str = setting(
        str,
        "content keeps more of the picture, style takes more of the style.",
        default="content",
        choices=tuple(PRESETS),
    )
    style_strength: float = setting(
        float,
        "From 0, the content as the model knows it, to 1, the most style the preset gives.",
        default=1.0,
        low=0.0,
        high=1.0,
    )
    num_inversion_steps: int = setting(
        int, "Steps to noise and back: more keep the content better.", default=50, low=2, high=1000
    )
    query_preservation: float | None = setting(
        float, "How much of the content's structure is kept; none is the preset's.",
        default=None, low=0.0, high=1.0,
    )  # fmt: skip
    query_preservation_end: float | None = setting(
        float, "The same at the last step, reached by a cosine; none is the preset's.",
        default=None, low=0.0, high=1.0,
    )  # fmt: skip
    attention_temperature: float | None = setting(
        float, "How sharply the style's parts are picked; none is the preset's.",
        default=None, low=0.1, high=10.0,
    )  # fmt: skip
    adain: float = setting(
        float,
        "How far the noise starts from the style's mean and spread (AdaIN).",
        default=1.0,
        low=0.0,
        high=1.0,
    )
    layers: str | None = setting(
        str,
        "Self-attentions on the way up that take style, as in 3,4,5, counted from 0, the coarsest; "
        "none is all but those of the coarsest level.",
        default=None,
    )
    guidance_scale: float | None = option(
        float,
        "How strongly the prompt pulls, where one is given; 1 or less does without guidance.",
        library=3.0,
        low=0.0,
        high=100.0,
    )

    @classmethod
    def _verb(cls) -> str:
        return "style_transfer"

    @property
    def blend(self) -> float:
        """Return the share of the styled prediction at each step.

        It adds up over the steps: by the square, equal steps of strength look about equally far.
        """
        return self.style_strength**2

    @property
    def shares(self) -> tuple[float, float]:
        """Return the shares of the content's query at the first step and at the last."""
        first, last, _ = PRESETS[self.preset]
        if self.query_preservation is not None:
            # One number alone holds throughout.
            first = last = self.query_preservation
        return first, last if self.query_preservation_end is None else self.query_preservation_end

    @property
    def temperature(self) -> float:
        """Return what multiplies the scores of attention."""
        chosen = self.attention_temperature
        return PRESETS[self.preset][2] if chosen is None else chosen

    @property
    def is_neutral(self) -> bool:
        """Tell options under which a picture as its own style is its plain reconstruction."""
        return self.shares == (1.0, 1.0) and self.temperature == 1 and self.adain == 0

    def chosen_layers(self, per_level: int, levels: int) -> tuple[int, ...]:
        """Return the layers that take style; raises BadInput for one that is not there."""
        count = per_level * levels
        if self.layers is None:
            return tuple(range(per_level if levels > 1 else 0, count))
        parts = [part.strip() for part in self.layers.split(",")]
        chosen = {int(part) for part in parts if part.isascii() and part.isdigit()}
        if not all(part.isascii() and part.isdigit() for part in parts) or max(chosen) >= count:
            raise BadInput(
                f"layers is {self.layers!r}: give numbers from 0 to {count - 1} with commas between"
            )
        return tuple(sorted(chosen))
