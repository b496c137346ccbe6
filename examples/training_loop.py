"""Growth inside a plain training loop: a tiny network finds its own widths on handwritten digits.

The optimizer and the learning rate schedule live on: parameters keep their identity when they grow.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dagrow

torch.manual_seed(0)
EPOCHS, EVERY = 24, 4

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels)
order = torch.randperm(len(x))
train, held_out, test = (TensorDataset(x[i], y[i]) for i in order.split([1200, 250, len(x) - 1450]))
loader = DataLoader(train, batch_size=64, shuffle=True)
measured, validation = DataLoader(train, batch_size=256), DataLoader(held_out, batch_size=256)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    inputs, target = data.tensors
    with torch.no_grad():
        return (model(inputs).argmax(1) == target).float().mean().item()


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    for inputs, target in loader:
        optimizer.zero_grad()
        value = loss(model(inputs), target)
        value.backward()
        optimizer.step()
    return value.detach()


loss = nn.functional.cross_entropy
model = nn.Sequential(nn.Linear(64, 1), nn.SELU(), nn.Linear(1, 1), nn.SELU(), nn.Linear(1, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
parameters = list(model.parameters())

dag = dagrow.trace(model, x[:2])
wider = [dagrow.AddNeurons(axes=(axis.name,)) for axis in dag.axes if axis.growable]
growing, added = True, []
for epoch in range(EPOCHS):
    train_epoch(model, optimizer)
    schedule.step()
    if epoch % EVERY == 0 and growing:
        receipt = dagrow.grow(dag, measured, loss, wider, validation=validation, optimizer=optimizer)
        growing = receipt.neurons > 0  # each layer gets as many as are worth it; none is an answer
        added.append(receipt.neurons)
        print(f"after epoch {epoch}:\n{receipt}")

widths = [axis.width for axis in dag.axes if axis.growable]
print(f"hidden widths {widths}, test accuracy {accuracy(model, test):.1%}")

assert accuracy(model, test) > 0.85  # one neuron wide, it stays far below
assert sum(widths) == 2 + sum(added)
assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
