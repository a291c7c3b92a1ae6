"""Score the tokens of a packed batch from PyTorch code, without the logits [tokens, vocabulary] in memory."""

import torch

import pyeff

torch.manual_seed(0)
hidden = torch.randn(512, 576)  # last hidden states of three samples, packed: your model's output
head = torch.nn.Linear(576, 49152, bias=False)  # its output head
targets = torch.randint(49152, (512,))  # the next tokens; -100 where a token does not count
cu_seqlens = torch.tensor([0, 100, 300, 512], dtype=torch.int32)  # where the samples begin and end

with torch.no_grad():
    tokens = pyeff.linear_cross_entropy_scores(hidden, head.weight, targets)
samples = tokens.per_sample(cu_seqlens)
for i, (nll, el2n) in enumerate(zip(samples.nll.tolist(), samples.el2n.tolist(), strict=True)):
    print(f"sample {i}: loss {nll:.3f} nats per token, EL2N {el2n:.4f}")
print(f"ran on {pyeff.explain('linear_cross_entropy_scores', hidden, head.weight, targets)}")
