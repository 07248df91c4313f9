"""Encode images as tokens, train a small transformer on them, and decode what it samples.

python tokens_to_transformer.py IMAGES TOKENIZER OUT    # OUT: the folder of the tokens; samples are in OUT-samples.png
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.utils import save_image

from vqpipe import Tokenizer, artifacts
from vqpipe.data import TokenDataset, open_images
from vqpipe.data.tokens import write_tokens


class Transformer(nn.Module):
    def __init__(self, num_tokens: int, codebook_size: int, code_dim: int, width: int = 64) -> None:
        super().__init__()
        self.start, self.positions = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(num_tokens, width))
        self.project, self.head = nn.Linear(code_dim, width), nn.Linear(width, codebook_size)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, codes: Tensor) -> Tensor:
        """The codes of the first n ids, float[B, n, C] -> logits of the first n + 1 ids, float[B, n + 1, K]."""
        inputs = torch.cat([self.start.expand(len(codes), 1, -1), self.project(codes)], dim=1)
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=inputs.device)
        return self.head(self.layers(inputs + self.positions[: inputs.shape[1]], mask, is_causal=True))


def main(folder: str, weights: str, out: str) -> None:
    torch.manual_seed(0)
    tokenizer, images = Tokenizer.from_pretrained(weights, device="auto"), open_images(folder)
    size = tokenizer.image_size or 256
    inputs = {"images": images, "tokenizer": tokenizer.source}
    draft = artifacts.start(out, "tokens", {"image_size": size}, inputs)
    if isinstance(draft, artifacts.Draft):  # otherwise an earlier run has published them
        with draft:
            draft.publish(write_tokens(draft, images, tokenizer, image_size=size))

    tokens = TokenDataset(out)
    num_tokens = tokens.facts["num_tokens"]
    model = Transformer(num_tokens, tokens.codebook_size, tokenizer.code_dim).to(tokenizer.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, batch in zip(range(100), tokens.stream(seed=0, batch_size=8), strict=False):
        ids = batch["ids"].to(tokenizer.device)
        loss = cross_entropy(model(tokenizer.embed(ids[:, :-1])).transpose(1, 2), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    ids = torch.empty(4, 0, dtype=torch.int64, device=tokenizer.device)
    with torch.no_grad():
        while ids.shape[1] < num_tokens:
            probabilities = model(tokenizer.embed(ids))[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, probabilities.multinomial(1)], dim=1)
    save_image(tokenizer.decode(ids, image_size=size) / 255, f"{out}-samples.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
