"""Train with a loss that is written as an expression and compiled into one fused kernel.

The loss is the pinball loss, whose minimum is the quantile `q` of the targets. It has a parameter (q) and a weight for
each element. Compiling takes several seconds the first time; later runs load the kernel from the cache.
Run it where fusedloss and a C++ compiler are installed: python examples/custom_loss.py
"""

import torch
from torch import nn

import fusedloss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    torch.manual_seed(0)
    criterion = fusedloss.custom_loss("weight * maximum(q * (target - input), (q - 1) * (target - input))", q=0.9)
    x = torch.randn(2048, 1, device=DEVICE)
    target = 2 * x + torch.randn_like(x)
    weight = torch.rand_like(x) + 0.5
    model = nn.Linear(1, 1).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for q in (0.9, 0.1):
        criterion.q = q  # an attribute, read at each call; nothing is compiled again
        for step in range(1, 101):
            optimizer.zero_grad()
            loss = criterion(model(x), target, weight=weight)
            loss.backward()
            optimizer.step()
            if step in (1, 10, 100):
                print(f"q = {q}, step {step:3}: loss {loss.item():.4f}")
        below = (weight * (target < model(x))).sum() / weight.sum()
        print(f"q = {q}: {below.item():.0%} of the targets, by weight, are below the prediction")


if __name__ == "__main__":
    main()
