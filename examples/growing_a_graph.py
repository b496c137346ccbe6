"""From a single linear layer to a graph of layers: new hidden layers, new connections, new neurons, while it trains."""

import torch
from torch import nn
from torch.nn import functional

import dagrow

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
for parameter in teacher.parameters():
    parameter.data *= 2
x = torch.randn(3000, 6)
y = teacher(x).detach()
train = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 2000, 100)]
held_out, test = [(x[2000:2500], y[2000:2500])], (x[2500:], y[2500:])

model = nn.Sequential(nn.Linear(6, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
dag = dagrow.trace(model, x[:2])


def error() -> float:
    with torch.no_grad():
        return functional.mse_loss(model(test[0]), test[1]).item()


def epoch() -> None:
    for inputs, target in train:
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), target).backward()
        optimizer.step()


for _ in range(20):
    epoch()
linear = error()
print(f"a linear map: test error {linear:.4f}")

operators = [dagrow.AddLayer(4, nn.Tanh()), dagrow.AddConnection(), dagrow.AddNeurons()]
for operator in 3 * operators:
    receipt = dagrow.grow(
        dag, train, functional.mse_loss, [operator], validation=held_out, optimizer=optimizer
    )  # new parameters join the optimizer
    for _ in range(10):
        epoch()
    print(f"{receipt}; test error {error():.4f}")

print(dag)
for source, target, name in dag.network().edges(keys=True):
    print(f"{source} -> {target} by {name}")
assert error() < 0.2 * linear
assert len(dag.edges) > 2
