"""Train with the loss of a head whose logits [tokens, vocabulary] never exist, and see every sample's gradient norm."""

import torch

import pyeff

torch.manual_seed(0)
VOCABULARY, WIDTH = 32768, 64


class Model(torch.nn.Module):
    """A language model that returns its last hidden states; its embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.mix = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states [samples, tokens, width]."""
        x = self.embedding(tokens)
        return x + torch.tanh(self.mix(x))


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = torch.randint(VOCABULARY, (8, 65))

for step in range(5):
    with pyeff.observe(model) as seen:
        hidden = model(tokens[:, :-1])
        # Was cross_entropy(linear(hidden, weight), targets): 64 MiB of logits, and as much again for their gradient.
        loss = pyeff.linear_cross_entropy(hidden, model.embedding.weight, tokens[:, 1:])
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    norms = ", ".join(f"{norm:.3f}" for norm in seen.grad_norms[:3].tolist())
    print(f"step {step}  loss {loss.item():.3f}  gradient norms of the first samples {norms}")
