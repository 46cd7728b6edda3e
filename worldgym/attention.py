"""The one door to attention: flash-attn where it is installed and applies, exact SDPA elsewhere.

Shapes: B batch, Q query tokens, K key tokens, N heads, D head width.
"""

import functools
import importlib
import logging
import os

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("worldgym")


@functools.cache
def flash_function():
    """flash-attn's ``flash_attn_func``, or None with the reason logged once.

    ``WORLDGYM_FLASH=0`` switches it off.
    """
    if os.environ.get("WORLDGYM_FLASH", "1") == "0" or not torch.cuda.is_available():
        return None
    reasons = []
    for name in ("flash_attn", "flash_attn.cute"):
        try:
            return importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            reasons.append(f"{name}: {error}")
    log.info("flash-attn is not used, PyTorch SDPA is (%s)", "; ".join(reasons))
    return None


def attention(q_BQND: Tensor, k_BKND: Tensor, v_BKND: Tensor, mask: Tensor | None = None,
              causal: bool = False) -> Tensor:
    """Softmax attention, scale 1/sqrt(D); returns (B, Q, N, D).

    ``mask``: bool, True = may attend, broadcastable to (B, N, Q, K). A mask always goes through
    SDPA; flash-attn serves unmasked half-precision CUDA tensors. ``causal``: token q sees the
    tokens up to itself (Q = K).
    """
    if mask is None and q_BQND.is_cuda and q_BQND.dtype in (torch.float16, torch.bfloat16):
        flash = flash_function()
        if flash is not None and q_BQND.shape[-1] % 8 == 0:
            out = flash(q_BQND, k_BKND, v_BKND, causal=causal)
            return out[0] if isinstance(out, tuple) else out
    q, k, v = q_BQND.transpose(1, 2), k_BKND.transpose(1, 2), v_BKND.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)
