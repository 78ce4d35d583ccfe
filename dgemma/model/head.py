"""Where tokens become vectors and vectors become logits: the tied matrix, the soft cap, self-conditioning."""

import torch
from torch import Tensor, nn

from dgemma.config import ModelConfig
from dgemma.model.layers import MLP, RMSNorm, linear


class TiedEmbedding(nn.Embedding):
    """Token embeddings times sqrt(hidden), which are also the rows of the vocabulary head."""

    def __init__(self, config: ModelConfig):
        # Looking the pad token up teaches nothing, as in the reference.
        super().__init__(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.cap = config.final_logit_softcapping

    @property
    def scale(self) -> float:
        """sqrt(hidden), rounded to the weights' dtype as the reference does."""
        return torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype).item()

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale

    def soft(self, probabilities: Tensor) -> Tensor:
        """Expected embedding [..., hidden] under float32 probabilities [..., V]."""
        return self.expected(probabilities.to(self.weight.dtype)) * self.scale

    def expected(self, weights: Tensor) -> Tensor:
        """weights [N, V] E, [N, hidden], without the scale."""
        return weights @ self.weight

    def scores(self, x: Tensor) -> Tensor:
        """x E^T, [..., V] in the weights' dtype: logits before their cap."""
        return linear(x, self.weight)

    def scores_by_token(self, x: Tensor) -> Tensor:
        """E x^T of x [N, hidden], [V, N]: the same, a token's scores side by side."""
        return linear(self.weight, x)

    def logits(self, x: Tensor) -> Tensor:
        """float32 [..., V]: cap * tanh(x E^T / cap); the cap is applied in float32."""
        logits = self.scores(x).float()
        if logits.requires_grad:
            return self.cap * torch.tanh(logits / self.cap)
        return logits.div_(self.cap).tanh_().mul_(self.cap)


class SelfConditioning(MLP):
    """Adds what the previous step believed, as its expected embedding, to the canvas; zeros where there was none."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, scale=False)

    def forward(self, x: Tensor, soft: Tensor) -> Tensor:  # type: ignore[override]
        return self.post_norm(x + super().forward(self.pre_norm(soft)))
