"""Train a tiny causal language model of Hugging Face transformers with the fused losses, without changing its code.

The model is made from a configuration with random parameters, so nothing is downloaded. Inside `fusedloss.patch()`,
torch.nn.functional.cross_entropy, which the model calls, is fusedloss's.
Run it where fusedloss and transformers are installed: python examples/patch_transformers.py
"""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fusedloss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def patched() -> list[str]:
    """The functions of torch.nn.functional that are fusedloss's at the moment."""
    names = fusedloss.functional.__all__
    return [name for name in names if getattr(F, name) is getattr(fusedloss.functional, name)]


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).to(DEVICE)
    tokens = torch.randint(0, 256, (4, 32), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss = model(tokens, labels=tokens).loss
    print(f"torch: loss {loss.item():.4f}, computed by {loss.grad_fn.name()}")
    with fusedloss.patch():
        print(f"patched: {', '.join(patched())}")
        for step in range(1, 6):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            print(f"step {step}: loss {loss.item():.4f}, computed by {loss.grad_fn.name()}")
    print(f"patched afterwards: {', '.join(patched()) or 'none'}")


if __name__ == "__main__":
    main()
