"""Pre-norm transformer of the nanoGPT family, both block versions (specs/wham.md section 3).

Shapes: B row, T token, Q query token, K key token, D width, N heads, E head width, V vocabulary.
One network serves every use, as in wan.py: who sees whom is the ``attend`` argument (the causal
default for whole sequences, a static cache while decoding). The ViT tokeniser uses the same block.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldgym.attention import attention
from worldgym.errors import ConfigError, ShapeError
from worldgym.models.wan import MIN_ROWS, Attend


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTConfig:
    """Sizes under their native names.

    ``version``: 1 = layer norms of the blocks have parameters, 2 = they have none; ``bias``: of
    linears and of layer norms with parameters.
    """

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = True
    version: int = 1

    def __post_init__(self) -> None:
        sizes = (self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        if any(not isinstance(s, int) or s < 1 for s in sizes) or self.n_embd % self.n_head:
            raise ConfigError("impossible transformer sizes", given=sizes,
                              expected="positive integers, n_embd a multiple of n_head",
                              fix="check the config")
        if self.version not in (1, 2):
            raise ConfigError("unknown block version", given=self.version, expected="1 or 2",
                              fix="read nanogpt_version from the hyper-parameters")

    @classmethod
    def from_dict(cls, data: Mapping) -> "GPTConfig":
        """Read a dict; unknown descriptive keys are ignored."""
        known: dict[str, Any] = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**known)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, weight only, or nothing; eps 1e-5."""

    def __init__(self, dim: int, weight: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.dim = (dim,)
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if weight and bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.dim, self.weight, self.bias)


class _Attention(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)


class _MLP(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim, bias=bias)
        self.c_proj = nn.Linear(4 * dim, dim, bias=bias)


class Norm(NamedTuple):
    """Weight and bias of a layer norm, where there are any."""

    weight: Tensor | None
    bias: Tensor | None


class Linear(NamedTuple):
    """Weight and bias of a linear layer."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """The tensors of one block: looking them up in modules costs more than a small product."""

    heads: int
    ln_1: Norm
    qkv: Linear
    out: Linear
    ln_2: Norm
    up: Linear
    down: Linear

    def forward(self, x_BTD: Tensor, attend: Attend, number: int = 0,
                last: int | None = None) -> Tensor:
        """Next (B, T, D); with ``last`` only that many newest tokens ask, all are seen."""
        size = x_BTD.shape[-1]
        y = torch.layer_norm(x_BTD, (size,), *self.ln_1)
        weight, bias = self.qkv
        if last is None or last >= y.shape[1]:
            q, k, v = F.linear(y, weight, bias).view(
                *y.shape[:2], 3, self.heads, size // self.heads).unbind(2)
        else:
            parts = (None, None) if bias is None else (bias[:size], bias[size:])
            q = F.linear(y[:, -last:], weight[:size], parts[0])
            q = q.view(len(q), last, self.heads, -1)
            k, v = F.linear(y, weight[size:], parts[1]).view(
                *y.shape[:2], 2, self.heads, size // self.heads).unbind(2)
            x_BTD = x_BTD[:, -last:]
        return self.after(x_BTD, attend(number, q, k, v).reshape(x_BTD.shape))

    def asked(self, x_RD: Tensor) -> Tensor:
        """Queries, keys and values (R, 3, N, E) of one token of each row."""
        y = torch.layer_norm(x_RD, x_RD.shape[-1:], *self.ln_1)
        return F.linear(y, *self.qkv).view(len(y), 3, self.heads, -1)

    def after(self, x: Tensor, seen: Tensor) -> Tensor:
        """Next (..., D), once attention has ``seen`` (..., D)."""
        x = x + F.linear(seen, *self.out)
        y = F.linear(torch.layer_norm(x, x.shape[-1:], *self.ln_2), *self.up)
        return x + F.linear(F.gelu(y, approximate="tanh"), *self.down)


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a skip."""

    def __init__(self, dim: int, heads: int, bias: bool, parametric_norms: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = LayerNorm(dim, parametric_norms, bias)
        self.attn = _Attention(dim, bias)
        self.ln_2 = LayerNorm(dim, parametric_norms, bias)
        self.mlp = _MLP(dim, bias)

    def layer(self) -> Layer:
        """The tensors as they are now."""
        first, second = (Norm(n.weight, n.bias) for n in (self.ln_1, self.ln_2))
        qkv, out, up, down = (Linear(x.weight, x.bias) for x in (
            self.attn.c_attn, self.attn.c_proj, self.mlp.c_fc, self.mlp.c_proj))
        return Layer(self.heads, first, qkv, out, second, up, down)

    def forward(self, x_BTD: Tensor, attend: Attend) -> Tensor:
        return self.layer().forward(x_BTD, attend)


def causal(layer: int, q_BQNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor) -> Tensor:
    """An ``attend`` in which a token sees itself and all before it; queries are the newest."""
    q, k = q_BQNE.shape[1], k_BKNE.shape[1]
    if q == k:
        return attention(q_BQNE, k_BKNE, v_BKNE, causal=True)
    mask = torch.ones(q, k, dtype=torch.bool, device=q_BQNE.device).tril(k - q)
    return attention(q_BQNE, k_BKNE, v_BKNE, mask)


def everyone(layer: int, q_BQNE: Tensor, k_BKNE: Tensor, v_BKNE: Tensor) -> Tensor:
    """An ``attend`` without a mask."""
    return attention(q_BQNE, k_BKNE, v_BKNE)


class Network(NamedTuple):
    """The tensors of a GPT, and what is computed with them."""

    wte: Tensor
    wpe: Tensor
    layers: list[Layer]
    norm: Norm

    def hidden(self, ids_BT: Tensor, positions: Tensor, attend: Attend = causal,
               last: int | None = None) -> Tensor:
        """Final states (B, T, D), before the last norm; positions (T,) or (B, T).

        ``last``: only that many newest tokens are wanted; the last layer then computes keys and
        values of all tokens and everything else of these alone.
        """
        x = F.embedding(ids_BT, self.wte) + F.embedding(positions, self.wpe)
        return self.through(x, attend, last)

    def through(self, x: Tensor, attend: Attend, last: int | None = None) -> Tensor:
        """``hidden`` from embeddings (B, T, D) on."""
        top = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer.forward(x, attend, number, last if number == top else None)
        return x if last is None else x[:, -last:]

    def logits(self, x: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """Logits (..., high - low) of the ids low..high-1 for final states (..., D)."""
        rows = torch.layer_norm(x, x.shape[-1:], *self.norm)
        return F.linear(rows, self.wte[low:high])


class GPT(nn.Module):
    """Decoder over tokens with learned absolute positions and a tied head.

    >>> cfg = GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=8)
    >>> GPT(cfg)(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 10])
    """

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(cfg.vocab_size, cfg.n_embd),
            "wpe": nn.Embedding(cfg.block_size, cfg.n_embd),
            "h": nn.ModuleList(Block(cfg.n_embd, cfg.n_head, cfg.bias, cfg.version == 1)
                               for _ in range(cfg.n_layer)),
            "ln_f": LayerNorm(cfg.n_embd, bias=cfg.bias)})
        self._network: Network | None = None

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights: N(0, 0.02), residual projections smaller by sqrt(2 * layers)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1:
                small = (2 * self.cfg.n_layer) ** -0.5 if "c_proj" in name else 1.0
                nn.init.normal_(p, std=0.02 * small, generator=generator)
            else:
                nn.init.ones_(p)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer["wte"].weight.device  # type: ignore[union-attr,return-value]

    def network(self) -> "Network":
        """The tensors as they are now, for many calls; looked up anew when they were replaced."""
        parts = self.transformer
        tokens, places, norm = (cast(Any, parts[name]) for name in ("wte", "wpe", "ln_f"))
        old = self._network
        if old is None or old.wte is not tokens.weight or old.norm.weight is not norm.weight:
            blocks = [cast(Block, b).layer() for b in cast(nn.ModuleList, parts["h"])]
            old = Network(tokens.weight, places.weight, blocks, Norm(norm.weight, norm.bias))
            self._network = old
        return old

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of every position of whole sequences."""
        check_ids(ids_BT, self.cfg)
        network, positions = self.network(), torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return network.logits(network.hidden(ids_BT, positions))


def check_ids(ids_BT: Tensor, cfg: GPTConfig) -> None:
    """Raise ShapeError unless these are token ids that fit the position table."""
    if ids_BT.ndim != 2 or not 0 < ids_BT.shape[1] <= cfg.block_size:
        raise ShapeError("token ids have the wrong shape", given=tuple(ids_BT.shape),
                         expected=f"(batch, 1 to {cfg.block_size})",
                         fix="keep the newest tokens only")
    if ids_BT.is_floating_point() or not ids_BT.is_meta and bool(
            ((ids_BT < 0) | (ids_BT >= cfg.vocab_size)).any()):
        raise ShapeError("token ids outside the vocabulary", given=f"{ids_BT.dtype} ids",
                         expected=f"integers in [0, {cfg.vocab_size - 1}]",
                         fix="check the offsets of the vocabulary")


def losses(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Cross entropy (B, T) of every token, 0 where the mask is 0."""
    out = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(),
                          reduction="none").view(targets_BT.shape)
    return out if mask_BT is None else out * mask_BT


class StaticCache:
    """Keys and values of ``size`` positions for rows of equal length, written in place.

    ``k[layer]`` and ``v[layer]``: (B, size, N, E), views of ``stores[layer]``, (B, 2, N, size, E).
    """

    def __init__(self, cfg: GPTConfig, rows: int, size: int, like: Tensor) -> None:
        shape = (rows, 2, cfg.n_head, size, cfg.n_embd // cfg.n_head)
        # in memory a head's keys lie side by side: attention reads them once for every token
        self.stores = [like.new_empty(shape) for _ in range(cfg.n_layer)]
        self.k = [store[:, 0].transpose(1, 2) for store in self.stores]
        self.v = [store[:, 1].transpose(1, 2) for store in self.stores]

    def put(self, layer: int, at: slice | Tensor, k_BTNE: Tensor, v_BTNE: Tensor) -> None:
        """Write some positions of one layer."""
        self.k[layer][:, at] = k_BTNE
        self.v[layer][:, at] = v_BTNE

    def append(self, layer: int, at: int, asked_B3NE: Tensor) -> Tensor:
        """What one new token sees, (B, D), after its keys and values are written at ``at``.

        The same as ``extend(at, 1)`` for what ``Layer.asked`` gives, in fewer calls: they take
        longer than the arithmetic of a small model.
        """
        store = self.stores[layer]
        store.select(3, at).copy_(asked_B3NE[:, 1:])
        keys, values = store.narrow(3, 0, at + 1).unbind(1)
        seen = attention(asked_B3NE[:, :1], keys.transpose(1, 2), values.transpose(1, 2))
        return seen.reshape(len(seen), -1)

    def extend(self, start: int, count: int) -> Attend:
        """An ``attend`` that appends ``count`` tokens at ``start``; queries are its newest."""
        end = start + count

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.put(layer, slice(start, end), k, v)
            return causal(layer, q, self.k[layer][:, :end] if start else k,
                          self.v[layer][:, :end] if start else v)

        return attend


def at_least(rows: int, device: torch.device) -> int:
    """How many rows a product must have for bits that do not depend on the batch (CPU only)."""
    return max(rows, MIN_ROWS) if device.type == "cpu" else rows
