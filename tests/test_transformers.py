"""Transformers of Hugging Face grow during training, untouched otherwise.

They train on the characters of a file of this folder, or of the file that the environment variable DAGROW_TEXT names.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from language import MODELS, step

import dagrow
from dagrow.surgery import Growth, preview

TEXT = Path(os.environ.get("DAGROW_TEXT", Path(__file__).with_name("language.py"))).read_text()[:20000]


def grown(name: str, init: str = "optimal") -> tuple[Any, Any, list[dict[str, torch.Tensor]], list[Any]]:
    """A model that was trained a little, its dag, its batches, and what could be added to its feed-forward blocks."""
    tiny = MODELS[name]
    model, batches = tiny.model(), tiny.batches(TEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, batches, optimizer)
    dag = dagrow.trace(model, tiny.example(batches[0]))
    blocks = tuple(axis.name for axis in dag.axes if tiny.feed_forward in axis.name)
    assert len(blocks) == 2
    operator = dagrow.AddNeurons(k=3, axes=blocks, init=init)  # type: ignore[arg-type]
    return model, dag, batches, dagrow.propose(dag, batches, step=step, operators=[operator])


def train(model: Any, batches: Any, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        step(model, batch).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_gain_is_the_slope_of_the_loss_through_the_whole_model(name: str) -> None:
    *_, growths = grown(name)
    assert len(growths) == 2
    for growth in growths:
        assert growth.gain > 0
        assert -slope(growth) == pytest.approx(growth.gain, rel=1e-5)


def slope(growth: Growth) -> float:
    """The derivative of the loss in gamma at 0, by automatic differentiation: norms that are taken in single precision
    leave nothing of it to finite differences."""
    dag, change, gamma = growth.dag, growth.change, torch.zeros((), dtype=torch.float64, requires_grad=True)
    start, objective = change.tensors(dag.model, 0.0), growth.objective
    total, count = torch.zeros(()), 0
    ray = {name: tensor + gamma * change.slope.get(name, 0.0) for name, tensor in start.items()}
    with preview(dag, change, ray):
        for batch, samples in objective:
            total, count = total + objective.value(batch) * samples, count + samples
    return float(torch.autograd.grad(total / count, gamma)[0])


@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_with_the_same_state_dict_keys(name: str) -> None:
    model, _, batches, growths = grown(name)
    keys, kind = list(model.state_dict()), type(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [model(**batch).logits for batch in batches]
    receipt = growths[0].apply(0.0, optimizer=optimizer)
    for batch, logits in zip(batches, before, strict=True):
        assert torch.allclose(model(**batch).logits, logits, rtol=0, atol=1e-12)
    receipt.undo()
    growths[0].apply(1.0, optimizer=optimizer)
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    loss = sum(float(step(model, batch).detach()) for batch in batches)
    for _ in range(5):
        train(model, batches, optimizer)
    assert sum(float(step(model, batch).detach()) for batch in batches) < loss


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.writes])
def test_a_grown_model_generates_with_and_without_its_cache(name: str) -> None:
    model, _, batches, growths = grown(name)
    growths[0].apply(1.0)
    prompt = batches[0]["input_ids"][:2, :5]
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(prompt, use_cache=True, **given)
    assert written.shape[1] > prompt.shape[1]
    assert torch.equal(written, model.generate(prompt, use_cache=False, **given))
