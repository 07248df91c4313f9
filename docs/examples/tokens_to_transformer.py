"""Encode images as tokens, train a small transformer on them, and decode what it samples.

python tokens_to_transformer.py IMAGES TOKENIZER OUT [STEPS]

The tokens are written to OUT, and the samples to OUT-samples.png.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torchvision.utils import save_image

from vqpipe import Tokenizer
from vqpipe.data import TokenDataset

if len(sys.argv) not in (4, 5):
    sys.exit("usage: python tokens_to_transformer.py IMAGES TOKENIZER OUT [STEPS]")
images, weights, out, steps = [*sys.argv[1:], "100"][:4]
tokenizer = Tokenizer.from_pretrained(weights, device="auto")
# Minutes for thousands of images on a CPU. vqpipe tokenize writes the same, with a progress bar.
print(f"encoding {images} into {out}")
tokenizer.write_tokens(images, out)
tokens = TokenDataset(out)
num_tokens, size = tokens.facts["num_tokens"], tokens.facts["image_size"]
counts = torch.cat([tokens[row]["ids"] for row in range(len(tokens))]).bincount().float()
entropy = torch.distributions.Categorical(counts).entropy()
print(f"entropy of single ids: {entropy:.3f}; the loss should fall below it")

project = nn.Linear(tokenizer.code_dim, 64)
positions = nn.Embedding(num_tokens, 64)
layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True), 2)
head = nn.Linear(64, tokens.codebook_size)
model = nn.ModuleList([project, positions, layers, head]).to(tokenizer.device)
causal = nn.Transformer.generate_square_subsequent_mask(num_tokens, device=tokenizer.device)


def logits(ids: Tensor) -> Tensor:
    """int64[B, N] -> float[B, N, K], of each id from the codes of the ids before it."""
    codes = pad(tokenizer.embed(ids)[:, :-1], (0, 0, 1, 0))
    return head(layers(project(codes) + positions.weight, mask=causal, is_causal=True))


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step, batch in zip(range(int(steps)), tokens.stream(seed=0, batch_size=8), strict=False):
    ids = batch["ids"].to(tokenizer.device)
    loss = cross_entropy(logits(ids).transpose(1, 2), ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.3f}")

print(f"sampling 4 images of {num_tokens} ids")
ids = torch.full((4, num_tokens), -1, device=tokenizer.device)
with torch.no_grad():
    for place in range(num_tokens):
        ids[:, place] = logits(ids)[:, place].softmax(-1).multinomial(1).squeeze(1)
save_image(tokenizer.decode(ids, image_size=size) / 255, f"{out}-samples.png")
print(f"samples: {out}-samples.png")
