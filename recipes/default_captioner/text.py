"""Teach the decoder to write before it sees: captions alone, behind an empty picture.

    python recipes/default_captioner/text.py [config.toml]

Only for ablations (`ablations.toml`): the model that ships does without.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning import IGNORED, image_cache, new_model, read_split, trimmed, word_states
from diptych.text import Gpt2Tokenizer
from diptych.training.replay import Replay, set_rate
from diptych.training.state import Average, Log, decayed, learning_rate, save_state
from pretrain import adamw


def main(config: dict[str, Any]) -> None:
    options, output = config["text"], Path(config["output"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config["seed"])
    tokenizer = Gpt2Tokenizer.load(output / "tokenizer.json")
    train = read_split(config, tokenizer, training=True).to(device)
    rows = [part.flatten(0, 1) for part in (train.inputs, train.targets)]
    model = new_model(config, options["dropout"]).to(device)
    average = Average(model.decoder, options["ema_decay"])
    named = decayed(model.decoder.named_parameters(), options["weight_decay"])
    optimizer = adamw(named, device, (0.9, 0.98))
    # As many empty places as a picture has: a word learns the place that it will have.
    empty = torch.zeros(
        1, model.encoder.config.num_tokens, model.decoder.config.hidden_size, device=device
    )

    def step(inputs: Tensor, targets: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            written = (
                word_states(model, image_cache(model, empty), inputs)
                .flatten(0, 1)
                .index_select(0, places)
            )
            logits = model.decoder.logits(written).float()
        loss = F.cross_entropy(logits, targets.flatten()[places], ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        optimizer.step()
        return (loss.detach(),)

    learn = Replay(device, enabled=config.get("cuda_graphs", True))(step)
    for index in range(options["steps"]):
        chosen = torch.randint(len(rows[0]), (options["batch_size"],), device=device)
        rate = learning_rate(index, options["steps"], options["warmup_steps"])
        set_rate(optimizer, options["learning_rate"] * rate)
        (loss,) = learn(*trimmed(*(part[chosen] for part in rows)))
        average.update(model.decoder)
    Log(output / "text.jsonl").write(stage="text", step=index + 1, loss=round(float(loss), 4))
    save_state(output / "text.safetensors", model.decoder, average, optimizer, {})


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "config.toml"
    main(tomllib.loads(Path(path).read_text()))
