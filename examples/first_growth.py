"""A first growth: look at a model, see where it is too small, look at what would help, apply it, take it back."""

import math

import torch
from torch import nn

import dagrow

torch.manual_seed(0)

# a regression that two hidden neurons cannot do
x = torch.randn(2000, 5)
y = torch.sin(x @ torch.randn(5, 4))
batches = list(zip(x.split(256), y.split(256), strict=True))
loss = nn.functional.mse_loss

model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 4))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(30):
    for inputs, target in batches:
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        optimizer.step()

# 1. the model as a dag: edges (weighted layers) and axes (hidden widths). Nothing is changed or copied.
dag = dagrow.trace(model, x[:2])
print(dag)
assert dag.model is model

# 2. where it is too small: the part of each layer's goal that its own weights cannot follow
report = dagrow.bottlenecks(dag, batches, loss)
print(report)
assert report["2"].bottleneck > 0

# 3. what could be added there, best first, and what it would bring. Still nothing is changed.
growths = dagrow.propose(dag, batches, loss, [dagrow.AddNeurons()])
best = growths[0]
print(best)
assert best.where == "0"
assert best.significant

# 4. apply it: in place, the same parameters, now larger; the optimizer keeps what it knows of the old entries
weight, outputs, losses = model[0].weight, model(x), [best.loss(gamma) for gamma in (0.0, 0.3, 0.6)]
receipt = best.apply(gamma=0.6, optimizer=optimizer)
print(receipt)
assert model[0].weight is weight
assert len(weight) == 2 + best.neurons
assert losses[0] > losses[1] > losses[2]
assert math.isclose(receipt.loss_after, losses[2], rel_tol=1e-5)

# 5. and back, bit for bit
receipt.undo()
assert model[0].weight is weight
assert len(weight) == 2
assert torch.equal(model(x), outputs)
