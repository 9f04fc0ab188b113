"""When a network's calls are recorded, and when what was recorded is forgotten; without a GPU.

Real graphs are compared with plain calls in tests/gpu.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from diptych.models.lora import LowRank, attach, detach  # noqa: E402
from diptych.models.unet import UNet, UNetConfig  # noqa: E402
from diptych.runtimes.on_torch_recorded import RecordedNetwork  # noqa: E402
from replicas import Replica  # noqa: E402


@pytest.fixture(autouse=True)
def _none_made():
    Replica.made = 0


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(UNetConfig.tiny()).eval().requires_grad_(False)


def predict(module, arrays):
    return module.predict(**arrays)


def inputs(seed, rows=1, side=8):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(rows, 4, side, side, generator=generator),
        "timestep": torch.full((rows,), 17.0 * seed),
        "encoder_hidden_states": torch.randn(rows, 5, 32, generator=generator),
        "text_embeds": None,
    }


def test_calls_are_recorded_at_the_third_of_a_shape_and_give_the_same(unet):
    recorded = RecordedNetwork(predict, Replica)
    kept = []
    for turn, made in enumerate([0, 0, 1, 1, 1]):
        answer = recorded(unet, inputs(turn))
        assert Replica.made == made
        kept.append((answer, predict(unet, inputs(turn))))
    # Also those before: nothing that was returned is written over.
    for answer, wanted in kept:
        assert all(map(torch.equal, answer, wanted))
    recorded(unet, inputs(1, rows=2))
    assert Replica.made == 1
    for _ in range(2):
        recorded(unet, inputs(1, rows=2))
    assert Replica.made == 2
    recorded(unet, inputs(1))
    assert Replica.made == 2, "a shape that was seen before is recorded still"


def test_other_inputs_are_another_shape(unet):
    """A layout or a further input is not fed into what was recorded without it."""
    recorded = RecordedNetwork(predict, Replica)
    for _ in range(3):
        recorded(unet, inputs(1))
    given = inputs(2)
    given["latents"] = given["latents"].contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, recorded(unet, given), predict(unet, given)))
    deep = {**inputs(2), "deep_features": torch.ones_like(predict(unet, inputs(2))[1])}
    assert all(map(torch.equal, recorded(unet, deep), predict(unet, deep)))
    assert Replica.made == 1


def layer_of(module):
    return module.mid_block.attentions[0].transformer_blocks[0].attn1.to_q


def put_in(module):
    layer = layer_of(module)
    narrow, wide = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
    update = LowRank(narrow, wide, 0.01)
    attach(layer, update)
    return update


def moved(module):
    layer = layer_of(module)
    layer.weight.data = layer.weight.data * 2


def scaled(module):
    layer_of(module).live[0].scale = 0.5


def taken_out(module):
    detach(layer_of(module), layer_of(module).live[0])


def compiled(module):
    block = module.mid_block.attentions[0]
    block._compiled_call_impl = lambda hidden, *_: hidden * 0


@pytest.mark.parametrize(
    ("before", "change"),
    [(None, moved), (None, put_in), (put_in, scaled), (put_in, taken_out), (None, compiled)],
)
def test_what_was_recorded_is_forgotten_when_the_network_changes(unet, before, change):
    if before is not None:
        before(unet)
    recorded = RecordedNetwork(predict, Replica)
    for _ in range(3):
        recorded(unet, inputs(1))
    earlier = predict(unet, inputs(1))[0]
    change(unet)
    wanted = predict(unet, inputs(1))
    assert not torch.equal(wanted[0], earlier)
    for made in (1, 1, 2):
        assert all(map(torch.equal, recorded(unet, inputs(1)), wanted))
        assert Replica.made == made


def test_weights_written_in_place_are_read_as_they_are_now(unet):
    recorded = RecordedNetwork(predict, Replica)
    for _ in range(3):
        recorded(unet, inputs(1))
    layer_of(unet).weight.mul_(2)
    assert all(map(torch.equal, recorded(unet, inputs(1)), predict(unet, inputs(1))))
    assert Replica.made == 1


def test_numbers_and_networks_with_graphs_of_their_own_run_as_they_are(unet):
    recorded = RecordedNetwork(predict, Replica)
    for _ in range(4):
        recorded(unet, {**inputs(1), "token_merging_ratio": 0.5})
    object.__setattr__(unet, "predict", unet.predict)
    for _ in range(4):
        recorded(unet, inputs(1))
    assert Replica.made == 0


def test_few_shapes_are_kept(unet):
    recorded = RecordedNetwork(predict, Replica)
    sides = [4, 6, 8, 10, 12]
    for side in sides:
        for _ in range(3):
            recorded(unet, inputs(1, side=side))
    assert Replica.made == 5
    recorded(unet, inputs(1, side=12))
    assert Replica.made == 5
    for _ in range(3):
        given = inputs(2, side=4)
        assert all(map(torch.equal, recorded(unet, given), predict(unet, given)))
    assert Replica.made == 6


def test_where_recording_fails_all_runs_as_it_is(unet, caplog):
    def fail(call, inputs):
        nonlocal tried
        tried += 1
        raise RuntimeError("CUDA error: operation not permitted\nmore of it")

    tried = 0
    recorded = RecordedNetwork(predict, fail)
    for seed in range(6):
        assert all(map(torch.equal, recorded(unet, inputs(seed)), predict(unet, inputs(seed))))
    assert tried == 1
    (line,) = caplog.messages
    assert "operation not permitted" in line
    assert "\n" not in line
