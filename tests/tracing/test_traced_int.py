"""Sizes that remember where in a graph they come from."""

import functools

import einops
import torch
from forwards import made

from dagrow.tracing import record


def test_guards_and_baked_sizes_are_noted():
    def forward(self, x):
        half = int(x.shape[1]) // 2
        if x.shape[0] * 2 > 3 and x.size(1) == 4:
            x = x / x.shape[1]
        return x[:, :half] * len(x.shape)

    program = record(made(forward), torch.randn(3, 4))
    notes = "\n".join(program.specialisations)
    assert "(x.shape[0] * 2) > 3 is True (test_traced_int.py:" in notes
    assert "x.size(1) == 4 is True" in notes
    assert "x.shape[1] = 4 is baked in" in notes


def test_a_cache_keyed_by_size_keeps_sizes_live():
    @functools.lru_cache
    def twice(n):
        return n * 2

    model = made(lambda self, x: x.view(twice(x.shape[0]), -1))
    twice(3)
    assert record(model, torch.randn(3, 4)).run(torch.randn(5, 4)).shape == (10, 2)
    assert type(twice(3)) is int


def test_einops_sizes_stay_live_behind_its_caches():
    model = made(lambda self, x: einops.rearrange(x, "b (h d) -> (b h) d", h=2))
    model(torch.zeros(3, 4))
    assert record(model, torch.zeros(3, 4)).run(torch.zeros(5, 4)).shape == (10, 2)


def test_shapes_are_still_shapes_and_loops_over_them_are_noted():
    def forward(self, x):
        assert type(x.shape) is torch.Size
        return sum(x[:, t] for t in range(x.shape[1]))

    program = record(made(forward), torch.zeros(3, 4))
    assert any("x.shape is read next to range()" in note for note in program.specialisations)
