"""Train a small classifier with fusedloss.CrossEntropyLoss in place of nn.CrossEntropyLoss.

The training loop does not change, and the two loss curves agree up to rounding.
Run it where fusedloss is installed: python examples/drop_in.py
"""

import torch
from torch import Tensor, nn

import fusedloss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(criterion: nn.Module, x: Tensor, labels: Tensor, steps: int = 10) -> list[float]:
    """An ordinary training loop. It returns the loss of each step."""
    torch.manual_seed(1)  # both runs start from the same parameters
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 20, device=DEVICE)
    labels = (x @ torch.randn(20, 5, device=DEVICE)).argmax(dim=1)
    expected = train(nn.CrossEntropyLoss(label_smoothing=0.1), x, labels)
    found = train(fusedloss.CrossEntropyLoss(label_smoothing=0.1), x, labels)
    print(f"step  torch     fusedloss  (on {DEVICE})")
    for step, (theirs, ours) in enumerate(zip(expected, found, strict=True), start=1):
        print(f"{step:4}  {theirs:.6f}  {ours:.6f}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    print("the curves agree")


if __name__ == "__main__":
    main()
