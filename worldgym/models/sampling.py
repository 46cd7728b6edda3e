"""Choosing the next token: temperature, range, top-k or top-p, one draw (specs/wham.md section 5).

Shapes: B row, V vocabulary or the allowed part of it. Temperature is at least 0.1, as published.
Leaving out forbidden ids gives the same distribution as -inf on them, so callers may pass logits
of the allowed ids alone and no range.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldgym.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Settings of the sampler.

    ``top_k`` or ``top_p``, never both; ``deterministic`` stands for ``top_k=1`` whatever they are
    (ties survive). ``top_p``: a token is dropped when the probability of it and all likelier ones
    exceeds p, so the one that crosses p is dropped too, unlike elsewhere; the likeliest
    ``min_tokens_to_keep`` always stay.
    """

    temperature: float = 0.9
    top_k: int | None = None
    top_p: float | None = None
    min_tokens_to_keep: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1000:
            raise _bad("temperature", self.temperature, "a number in [0, 1000]", "use 0.9")
        if self.min_tokens_to_keep < 1:
            raise _bad("min_tokens_to_keep", self.min_tokens_to_keep, "at least 1", "use 1")
        if self.deterministic:
            return
        if self.top_k is not None and self.top_p is not None:
            raise _bad("filter", f"top_k {self.top_k} and top_p {self.top_p}", "one of them",
                       "set the other to None")
        k = self.top_k
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise _bad("top_k", k, "an integer of at least 1", "leave it out, or use 50")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise _bad("top_p", self.top_p, "a number in [0, 1]", "leave it out, or use 0.95")


def _bad(name: str, given: object, expected: str, fix: str) -> ConfigError:
    return ConfigError(f"impossible {name}", given=given, expected=expected, fix=fix)


def distribution(logits_BV: Tensor, how: Sampling,
                 valid_range: tuple[int, int] | None = None) -> Tensor:
    """Probabilities (B, V) that the draw is made from; ``valid_range`` is inclusive."""
    logits = logits_BV / max(how.temperature, 0.1)
    if valid_range is not None:
        low, high = valid_range
        kept = logits[..., low:high + 1]
        logits = torch.full_like(logits, -torch.inf)
        logits[..., low:high + 1] = kept
    least, width = how.min_tokens_to_keep, logits.shape[-1]
    top_k = 1 if how.deterministic else how.top_k
    if top_k is not None:
        worst = logits.topk(min(max(top_k, least), width)).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    elif how.top_p is not None:
        ordered, index = logits.sort(descending=True)
        drop = ordered.softmax(-1).cumsum(-1) > how.top_p
        drop[..., :least] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)
    return logits.softmax(-1)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Ids (B,) at these uniform numbers in (0, 1) of the cumulative distribution; B: any shape."""
    total = probabilities_BV.cumsum(-1, dtype=torch.float64)
    at = uniform_B[..., None].to(total) * total[..., -1:]
    return torch.searchsorted(total, at, right=True)[..., 0]
