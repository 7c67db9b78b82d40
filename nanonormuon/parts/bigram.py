"""A vector for each pair of neighbouring tokens: the bigram table of modded-nanogpt's speedruns."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class BigramEmbedding(nn.Embedding):
    """Vectors that are added to the tokens' own, chosen by a hash of a token and the one before it.

    Pairs that share a row share its vector. Many parameters, no products.
    """

    parameter_roles: ClassVar = {"weight": "value"}  # AdamW at optim.value_lr

    def forward(self, tokens: Tensor, cache: Any, separator: int | None) -> Tensor:
        """tokens (B, T) -> (B, T, C). cache: a model.Cache whose tokens they continue, or None.

        What comes before the first token of a window, or before `separator`, counts as token 0.
        """
        last = torch.zeros_like(tokens[:, :1]) if cache is None else cache.last
        before = torch.cat([last, tokens[:, :-1]], 1)
        if separator is not None:
            before = before.masked_fill(tokens == separator, 0)
        return super().forward((36_313 * tokens ^ 27_191 * before) % self.num_embeddings)
