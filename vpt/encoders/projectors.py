"""Projectors: features of a re-encoder to the language model's width, conditioned on the control state.

    f = project(x)                    the unconditioned tokens
    c = W_c LN_c([c_1; ...; c_s])     one direction from the control states of the image's s control tokens
    f + (f . c) c                     the conditioned tokens: one key, no softmax, no 1/sqrt(d)

`layernorm_*` and `linear_*` carry the names of the upstream checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn


class ConditionalProjector(nn.Module, ABC):
    """The condition that all projectors share; subclasses say what `project` does.

    `num_control_tokens` is the number of control tokens of an action (`projector_scale`).
    """

    def __init__(self, feature_dim: int, hidden_dim: int, *, num_control_tokens: int = 1) -> None:
        super().__init__()
        self.layernorm_feature = nn.LayerNorm(feature_dim, eps=1e-5)
        self.linear_feature = nn.Linear(feature_dim, hidden_dim)
        self.layernorm_condition = nn.LayerNorm(num_control_tokens * hidden_dim, eps=1e-5)
        self.linear_condition = nn.Linear(num_control_tokens * hidden_dim, hidden_dim)

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Features of an encoder, [rows, feature_dim], to tokens, [tokens, hidden_dim]."""

    def condition_vector(self, states: Tensor) -> Tensor:
        """Control states of n images, [n, scale, hidden_dim], to the direction each is searched in, [n, hidden_dim]."""
        return self.linear_condition(self.layernorm_condition(states.flatten(1)))

    def forward(self, tokens: Tensor, directions: Tensor) -> Tensor:
        """Add to each token its part along its direction; both are [tokens, hidden_dim]."""
        return tokens + (tokens * directions).sum(dim=-1, keepdim=True) * directions

    def condition_parameters(self) -> Iterator[nn.Parameter]:
        """What makes the direction: the smaller, the less is added to each token."""
        return self.linear_condition.parameters()

    def unused_modules(self) -> list[nn.Module]:
        """Parts that the upstream checkpoints hold though nothing reads them; they are kept, frozen."""
        return []


class LinearProjector(ConditionalProjector):
    """W_f LN_f(x): one token for each feature vector (DINOv2, CLIP, SigLIP)."""

    def project(self, features: Tensor) -> Tensor:
        return self.linear_feature(self.layernorm_feature(features))


Deep = Literal["none", "unchanged", "conditioned"]


class IdentityProjector(ConditionalProjector):
    """f = x: for features that already are the language model's (Qwen's own tower).

    What becomes of a tower's deep features (DeepStack), which stand beside each x: `none` leaves them out, `unchanged`
    passes them on, `conditioned` adds (f . c) c to each of them as to x.
    """

    def __init__(self, hidden_dim: int, *, num_control_tokens: int = 1, deep: Deep = "none") -> None:
        super().__init__(hidden_dim, hidden_dim, num_control_tokens=num_control_tokens)
        self.deep, self.width = deep, hidden_dim

    def project(self, features: Tensor) -> Tensor:
        return features[:, : self.width] if self.deep == "none" else features

    def forward(self, tokens: Tensor, directions: Tensor) -> Tensor:
        first, *deep = tokens.split(self.width, dim=1)
        if self.deep == "conditioned":
            deep = [super(IdentityProjector, self).forward(part, directions) for part in deep]
        return torch.cat([super().forward(first, directions), *deep], dim=1)

    def unused_modules(self) -> list[nn.Module]:
        return [self.layernorm_feature, self.linear_feature]


class ConvProjector(ConditionalProjector):
    """LayerNorm over channels, then a 4x4 convolution of stride 4: 64x64 positions become 16x16 tokens (SAM)."""

    def __init__(
        self, feature_dim: int, hidden_dim: int, *, side: int, patch: int = 4, num_control_tokens: int = 1
    ) -> None:
        super().__init__(feature_dim, hidden_dim, num_control_tokens=num_control_tokens)
        self.side, self.patch = side, patch
        self.conv_feature = nn.Conv2d(feature_dim, hidden_dim, kernel_size=patch, stride=patch)

    def project(self, features: Tensor) -> Tensor:
        maps = rearrange(
            self.layernorm_feature(features), "(n h a w b) c -> (n h w) (c a b)",
            a=self.patch, b=self.patch, h=self.side // self.patch, w=self.side // self.patch,
        )  # fmt: skip
        # The stride is the kernel, so the convolution is a matrix product over patches.
        return nn.functional.linear(maps, self.conv_feature.weight.flatten(1), self.conv_feature.bias)

    def unused_modules(self) -> list[nn.Module]:
        return [self.linear_feature]
