"""The decoder-only Transformer of the report, and the cache that makes decoding, and undoing it, cheap.

Pre-norm blocks: RMSNorm (Zhang & Sennrich 2019), causal attention with rotary positions in the half-rotation layout
(Su et al. 2021) and any number of key-value heads (Ainslie et al. 2023), Linear → GELU → Linear, no biases, untied
output layer. One forward pass serves training, prefill, one-token decoding and verification.

    B batch · T tokens · C width · H query heads · K key-value heads · D head size · V vocabulary · S cached tokens
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Rows = Tensor | tuple[Tensor, ...]  # cached keys or values by layer: one block, or a tensor for each
NO_TOKENS = "there are no tokens to read; give at least one."


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer; two models with equal configs have interchangeable weights."""

    n_layers: int
    n_heads: int
    width: int  # C
    n_kv_heads: int  # = n_heads: MHA; 1: MQA; between: GQA
    vocab_size: int = 50304  # V, rows of the embedding; padded above n_ids for speed
    n_ids: int = 50257  # ids that the tokenizer knows; ids above are padding and never leave the model
    context: int = 1024  # longest text, in tokens
    dropout: float = 0.1  # after the feed-forward, in training only
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    activation: str = "gelu"  # or "relu2", which other engines' Arcee models assume

    def __post_init__(self):
        if self.width % self.n_heads or (self.width // self.n_heads) % 2:
            raise ValueError(f"width {self.width} does not split into {self.n_heads} heads of an even size.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key-value heads evenly.")
        if not 0 < self.n_ids <= self.vocab_size:
            raise ValueError(f"n_ids is {self.n_ids}; it must lie in 1 … vocab_size = {self.vocab_size}.")
        if self.activation not in ("gelu", "relu2"):
            raise ValueError(f"activation is {self.activation!r}; choose 'gelu' or 'relu2'.")

    @property
    def head_size(self) -> int:
        return self.width // self.n_heads


class KVCache:
    """Keys and values of the tokens read so far, preallocated for ``capacity`` tokens.

    ``length`` is all that says which rows are valid: `truncate` moves that number and copies nothing, which is what
    makes rolling back a rejected draft free.
    """

    def __init__(self, config: ModelConfig, batch: int = 1, capacity: int | None = None, dtype=None, device=None):
        self.capacity, self.length = capacity or config.context, 0
        shape = (config.n_layers, batch, config.n_kv_heads, self.capacity, config.head_size)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (layers, B, K, S, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, n: int) -> int:
        """Claim the next n rows and return the first one's index; ValueError when they do not fit."""
        start, end = self.length, self.length + n
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} do not fit: shorten the text.")
        self.length = end
        return start

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on. Never grows: a row that was not written cannot be claimed."""
        if length < 0:
            raise ValueError(f"cannot truncate a cache to {length} tokens.")
        self.length = min(self.length, length)

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget the rows too: a pass of fixed shape multiplies those after the text by 0, and 0 · NaN is NaN."""
        self.length = 0
        self.k.zero_(), self.v.zero_()


class Attention(nn.Module):
    attend = staticmethod(F.scaled_dot_product_attention)  # over a cache; decoding may know a faster way to the same

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_size = config.n_heads, config.n_kv_heads, config.head_size
        self.qkv = nn.Linear(config.width, (config.n_heads + 2 * config.n_kv_heads) * config.head_size, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask=None, rows=None, at=None, end=None) -> Tensor:
        B, T, C = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H+2K, T, D)
        q, k = rotate(qkv[:, : H + K], *rotary).split([H, K], dim=1)
        v = qkv[:, H + K :]
        if rows is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)  # (B, H, T, D)
        else:
            keys, values = rows  # this layer's (B, K, S, D)
            keys[:, :, at], values[:, :, at] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
            # the queries that share a key-value head become rows of one product: nothing is copied, and for one
            # token it is several times faster than the library's own grouping
            y = self.attend(q.reshape(B, K, H // K * T, D), k, v, attn_mask=mask).reshape(B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = F.gelu if config.activation == "gelu" else lambda x: F.relu(x).square()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x))))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """ids (B, T) → logits (B, T, V). Weights are drawn from ``generator`` (or torch's own if None), std 0.02."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("offered", None, persistent=False)  # ids of a trimmed output layer; None: all, in their order
        cos, sin = rotary_tables(config.context, config.head_size, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)  # (context, D/2)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # the two projections onto the residual stream shrink with depth, as in GPT-2
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.n_layers) ** (residual / 2), generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def n_params(self, read_per_token: bool = False) -> int:
        """Number of weights; ``read_per_token`` leaves out the embedding, of which a step reads one row."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.embedding.weight.numel() if read_per_token else total

    def new_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        return KVCache(self.config, batch, capacity, self.dtype, self.device)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T); with a cache the tokens continue the text in it and are added to it."""
        if ids.shape[1] == 0:
            raise ValueError(NO_TOKENS)
        if cache is None:
            if ids.shape[1] > self.config.context:
                raise ValueError(f"{ids.shape[1]} tokens exceed the context of {self.config.context}; shorten the text.")
            return self._forward(ids, None, None, slice(0, ids.shape[1]), 0)
        start = cache.append(ids.shape[1])
        return self._forward(ids, cache.k, cache.v, slice(start, cache.length), cache.length)

    def forward_at(self, ids: Tensor, positions: Tensor, keys: Rows, values: Rows) -> Tensor:
        """`forward` with every shape fixed, for torch.compile and CUDA graphs: where the tokens go is data.

        ``positions`` (T,) are rows of a cache's ``keys`` and ``values``, for each layer (B, K, S, D). All S rows are
        read and those after a token's own are masked, so that whatever numbers are in them do not matter.
        """
        return self._forward(ids, keys, values, positions, keys[0].shape[2])

    def _forward(self, ids: Tensor, keys: Rows | None, values: Rows | None, at: slice | Tensor, end: int) -> Tensor:
        rotary = self.cos[at], self.sin[at]  # (T, D/2)
        # training is plainly causal, and one new token sees all there is: neither needs a mask
        mask = None
        if keys is not None and (ids.shape[1] > 1 or isinstance(at, Tensor)):
            rows = torch.arange(end, device=ids.device)
            mask = (rows <= rows[at, None]).repeat(self.config.n_heads // self.config.n_kv_heads, 1)
        x = self.embedding(ids)  # (B, T, C)
        for i, layer in enumerate(self.blocks):
            x = layer(x, rotary, mask, None if keys is None else (keys[i], values[i]), at, end)
        return self.head(self.norm(x))  # (B, T, V)


def of_one_text(ids: Tensor) -> Tensor:
    """``ids`` (1, T), for passes that know no batch; ValueError for ids of several texts, or none."""
    if ids.shape[0] != 1:
        raise ValueError(f"{ids.shape[0]} texts were given to a model that reads one; give ids of shape (1, T).")
    if not ids.shape[1]:
        raise ValueError(NO_TOKENS)
    return ids


def rotary_tables(context: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(−2j/D), each (context, D/2)."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (B, H, T, D): the pair (x_j, x_{j+D/2}) turns by its position's j-th angle."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
