"""A small CNN with BatchNorm grows from two channels a layer while it trains, on the digits that scikit-learn holds."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import dagrow

torch.manual_seed(0)

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # 1797 images of 8 x 8
y = torch.tensor(digits.target)
order = torch.randperm(len(x))
train, held_out, test = order[:1100], order[1100:1400], order[1400:]
loss = nn.functional.cross_entropy

model = nn.Sequential(
    nn.Conv2d(1, 2, 3, padding=1),
    nn.BatchNorm2d(2),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(2, 2, 3, padding=1),
    nn.BatchNorm2d(2),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(2),
    nn.Flatten(),
    nn.Linear(8, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
dag = dagrow.trace(model, x[:2])
print(dag)


def epoch() -> None:
    model.train()
    for part in train[torch.randperm(len(train))].split(50):
        optimizer.zero_grad()
        loss(model(x[part]), y[part]).backward()
        optimizer.step()


def error(part: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x[part]).argmax(1) != y[part]).float().mean())


for _ in range(6):
    epoch()
small = error(test)
print(f"2 and 2 channels: test error {small:.1%}")

# The BatchNorms carry the new channels' statistics, so that training goes on where it was.
batches, validation = [(x[train], y[train])], [(x[held_out], y[held_out])]
for _ in range(3):
    for axis in ("0", "4"):
        operator = dagrow.AddNeurons(k=4, axes=(axis,), solver="als")
        receipt = dagrow.grow(dag, batches, loss, [operator], validation=validation, optimizer=optimizer)
        print(receipt)
        assert receipt.loss_after <= receipt.loss_before
    for _ in range(4):
        epoch()

widths = [model[0].out_channels, model[4].out_channels]
print(f"{widths[0]} and {widths[1]} channels: test error {error(test):.1%}")
assert model[1].num_features == widths[0] > 2
assert error(test) < small
