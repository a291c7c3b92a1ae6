"""Train with AdamW whose states take 2 bytes a parameter instead of 8: change the optimizer's line, nothing else."""

import torch
from torch.nn.functional import mse_loss

from pyeff.optim import AdamW8bit

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 1))
inputs = torch.randn(256, 64)
labels = torch.sin(inputs.sum(1, keepdim=True))
optimizer = AdamW8bit(model.parameters(), lr=3e-3, weight_decay=0.01)  # was torch.optim.AdamW

for step in range(101):
    loss = mse_loss(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")

parameters = sum(p.numel() for p in model.parameters())
state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
print(f"{sum(t.numel() * t.element_size() for t in state) / parameters:.2f} bytes of state per parameter")
