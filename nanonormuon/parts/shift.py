"""Shifted keys: modded-nanogpt's partial key offset, for half of the heads instead of channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanonormuon.model import Attention, Cache


class ShiftedAttention(Attention):
    """Attention in which half of the key heads show a token the key of the one before it.

    A token that followed an equal one is then found by its key: copying takes one layer, where it
    takes two otherwise, of which one learns to look at the token before.
    """

    def keys(self, k: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """Normalise k (B, G, T, D) and shift the last G // 2 heads, before RoPE.

        A first token keeps its own key, of a text and, where a mask (B, 1, T, T) separates
        documents, of a document.
        """
        k = super().keys(k, cache, mask)
        own, late = k.tensor_split((-(k.size(1) // 2),), 1)
        before = late[:, :, :1]
        if cache is not None:
            before = cache.latest[self] if cache.length else before
            cache.latest[self] = late[:, :, -1:]
        shifted = torch.cat((before, late[:, :, :-1]), 2)
        if mask is not None and cache is None:
            first = F.pad(~mask.diagonal(-1, 2, 3), (1, 0))  # cannot attend to the token before
            shifted = torch.where(first[..., None], late, shifted)
        # in three dimensions, as inductor takes a single head's four for a channels-last image
        return torch.cat((own.flatten(2), shifted.flatten(2)), 1).view(k.shape)
