"""Let torch.compile work on the blocks of networks: regionally, so that few kinds are compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from diptych.errors import BadInput
from diptych.models import gpt2, vit
from diptych.models.layers import ResnetBlock
from diptych.models.unet_blocks import TransformerBlock

__all__ = ["check_mode", "compile_captioner", "compile_generator"]

logger = logging.getLogger("diptych")

_MODES = ("default", "reduce-overhead", "max-autotune")
_MODES_WITH_GRAPHS = _MODES[1:]
_MOST_KINDS = 64


def check_mode(mode: str | None) -> None:
    """Raise `BadInput` for what is no mode of torch.compile that is offered."""
    if mode not in (None, *_MODES):
        raise BadInput(f"mode is {mode!r}: give None, {', '.join(map(repr, _MODES))}")


def compile_generator(modules: Mapping[str, nn.Module], **words: Any) -> int:
    """Compile the blocks of UNet and VAE, in place; return how many there are.

    Blocks of one kind share their code, so a few kinds are compiled instead of one large network,
    and a LoRA that is swapped for another finds its code there already. `words` are those of
    `torch.compile`. What is compiled is compiled at the first call; where the compiler fails, all
    blocks run as they were, and a warning says so once.
    """
    blocks = _compile([modules["unet"], modules["vae"]], (TransformerBlock, ResnetBlock), words)
    if words.get("mode") in _MODES_WITH_GRAPHS:
        for name, call in (("unet", "predict"), ("vae", "encode"), ("vae", "decode")):
            # In the instance, so that the network's own file stays free of it.
            object.__setattr__(modules[name], call, partial(_as_one, getattr(modules[name], call)))
    return blocks


def compile_captioner(module: nn.Module, **words: Any) -> int:
    """Compile the layers of encoder and decoder, as `compile_generator` does."""
    return _compile([module], (vit.Layer, gpt2.Block), words)


def _compile(
    modules: Sequence[nn.Module], kinds: tuple[type[nn.Module], ...], words: Mapping[str, Any]
) -> int:
    # A UNet has more kinds of blocks, by their widths, than torch compiles of one function.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_KINDS)
    blocks = [block for module in modules for block in module.modules() if isinstance(block, kinds)]
    for block in blocks:
        block.compile(**words)
        compiled = cast(Callable[..., Any], block._compiled_call_impl)
        block._compiled_call_impl = partial(_attempt, blocks, block, compiled)
    return len(blocks)


def _attempt(
    blocks: Sequence[nn.Module],
    block: nn.Module,
    compiled: Callable[..., Any],
    *args: Any,
    **words: Any,
) -> Any:
    """Call a compiled block; if it cannot be compiled, none of `blocks` is any more."""
    from torch._dynamo.exc import BackendCompilerFailed  # takes long, and few compile

    try:
        return compiled(*args, **words)
    except BackendCompilerFailed as error:
        logger.warning("torch.compile failed, all runs without it: %s", _origin(error))
        for each in blocks:
            each._compiled_call_impl = None
        return block(*args, **words)


def _origin(error: BaseException) -> str:
    """Return in one line what an error of the compiler began with."""
    first: BaseException = getattr(error, "inner_exception", error)
    while first.__cause__ is not None:
        first = first.__cause__
    return f"{type(first).__name__}: {first}".partition("\n")[0][:200]


def _as_one(call: Callable[..., Any], *args: Any, **words: Any) -> Any:
    """Run a network of blocks that are CUDA graphs, each of which reuses the same memory.

    Else each block would begin anew, and write over what later ones still have to read.
    """
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    made = call(*args, **words)
    return made.clone() if isinstance(made, Tensor) else tuple(each.clone() for each in made)
