"""Moves of keys: what layers share of them, and for how long it is remembered."""

import copy
import gc
import pickle

import pytest
import tiny
import torch

from sinkbench.cache.stream import StreamCache
from sinkbench.engines.forward import one_by_one
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Moves
from sinkbench.strategies import choose

ROPE = Rope(torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))


@pytest.mark.parametrize("rope", [ROPE, Rope(ROPE.inv_freq, "interleaved"), Rope(ROPE.inv_freq[:2])])
def test_a_move_is_that_of_the_rope(rope):
    moves, keys = Moves(), torch.randn(2, 3, 5, 8)
    by = torch.randint(0, 40, (2, 3, 5))
    for distance in (7, 7, -30):
        torch.testing.assert_close(moves.move(rope, keys, distance), rope.move(keys, torch.tensor([distance])))
    for most in (39, 39, 400):
        torch.testing.assert_close(moves.move_each(rope, keys, by, most), rope.move(keys, by))


def test_layers_on_different_devices_share_a_rope():
    moves, keys = Moves(), torch.randn(1, 1, 3, 8)
    by = torch.zeros(1, 1, 3, dtype=torch.long)
    for device in ("cpu", "meta", "cpu"):
        assert moves.move(ROPE, keys.to(device), 5).device.type == device
        assert moves.move_each(ROPE, keys.to(device), by.to(device), 5).device.type == device


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_has_moves_of_its_own_which_its_layers_share(twin_of):
    model = tiny.ROTARY["llama"]()
    cache = StreamCache(model, choose("attention_sinks", 8, 2).plan(layer_sizes(model.config)))
    (moves,) = {id(layer.moves): layer.moves for layer in cache.kept}.values()
    moves.move(ROPE, torch.zeros(1, 1, 1, 8), 3)
    (twin,) = {id(layer.moves): layer.moves for layer in twin_of(cache).kept}.values()
    assert twin is not moves
    assert len(pickle.dumps(moves)) == len(pickle.dumps(twin)) == len(pickle.dumps(Moves()))


def test_frequencies_of_lengths_that_are_over_are_forgotten():
    model = tiny.SCALED["dynamic"]()  # they follow the length from 64 tokens on
    chosen = choose("h2o", 80, parameters={"recent": 40}, positions="cache")
    cache, held = StreamCache(model, chosen.plan(layer_sizes(model.config))), []
    with one_by_one(model, cache, 130) as feed, torch.no_grad():
        for token in tiny.tokens(130).split(1):
            feed(token)
            held.append(sum(isinstance(one, Rope) for one in gc.get_objects()) if len(held) in (79, 129) else 0)
    assert held[129] <= held[79] + 8
