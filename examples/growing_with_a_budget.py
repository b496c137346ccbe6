"""A network of one neuron per layer grows on handwritten digits, within a budget, when its loss has stopped falling.

Which layers grow is up to the gain per parameter. Growing ends when the budget is spent or nothing is worth adding;
the last epochs only train.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dagrow

torch.manual_seed(0)
BUDGET = dagrow.Budget(parameters=1000)

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 8 - 1, dtype=torch.float32), torch.tensor(labels)
order = torch.randperm(len(x))
train, held_out, test = (TensorDataset(x[i], y[i]) for i in order.split([1200, 250, len(x) - 1450]))

model = nn.Sequential(nn.Linear(64, 1), nn.SELU(), nn.Linear(1, 1), nn.SELU(), nn.Linear(1, 10))
dag = dagrow.trace(model, x[:2])
before = dag.parameter_count()

history = dagrow.fit(
    dag,
    DataLoader(train, batch_size=64, shuffle=True),
    nn.functional.cross_entropy,
    [dagrow.AddNeurons()],
    BUDGET,
    dagrow.OnPlateau(patience=1, tolerance=0.2),
    policy=dagrow.ByGainPerParameter(),
    stop=[dagrow.NothingToAdd(times=3), dagrow.AfterEpoch(20)],
    epochs=30,
    optimizer=torch.optim.Adam(model.parameters(), lr=5e-3),
    validation=DataLoader(held_out, batch_size=250),
    measured=DataLoader(train, batch_size=400),
)
print(history)
for growth in history.growths():
    print(f"epoch {growth['epoch']}: {growth['where']} +{growth['neurons']} for {growth['parameters']} parameters")

with torch.no_grad():
    accuracy = (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean().item()
print(f"{dag.parameter_count()} parameters, {dag.flop_count()} FLOPs, test accuracy {accuracy:.1%}")

assert dag.parameter_count() - before == sum(growth["parameters"] for growth in history.growths())
assert dag.parameter_count() - before <= BUDGET.parameters
assert accuracy > 0.85  # one neuron wide, it stays far below
assert history.over
