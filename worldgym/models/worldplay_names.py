"""Tensor names of WorldPlay's files: diffusers' Wan names and the additions' (worldplay.md 3)."""

import re

_RULES = [(re.compile(pattern), new) for pattern, new in (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.action_embedder\.linear_1\.", "action_embedding.0."),
    (r"^condition_embedder\.action_embedder\.linear_2\.", "action_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^(blocks\.\d+\.)attn1\.to_out_prope\.0\.", r"\1self_attn.o_camera."),
    (r"^(blocks\.\d+\.)scale_shift_table$", r"\1modulation"),
    (r"^(blocks\.\d+\.)attn1\.", r"\1self_attn."),
    (r"^(blocks\.\d+\.)attn2\.", r"\1cross_attn."),
    (r"^(blocks\.\d+\.\w+_attn\.)to_([qkv])\.", r"\1\2."),
    (r"^(blocks\.\d+\.\w+_attn\.)to_out\.0\.", r"\1o."),
    (r"^(blocks\.\d+\.)norm2\.", r"\1norm3."),
    (r"^(blocks\.\d+\.)ffn\.net\.0\.proj\.", r"\1ffn.0."),
    (r"^(blocks\.\d+\.)ffn\.net\.2\.", r"\1ffn.2."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
)]
ADDED = ("condition_embedder.action_embedder.", ".attn1.to_out_prope.")


def native_name(name: str) -> str:
    """A tensor name of the published files in our network; other names stay as they are.

    The training wrapper's ``model.`` goes wherever it stands, as in the published loader; the
    first may be off already, and no name of the network holds it.

    >>> native_name("model.blocks.3.attn1.to_out_prope.0.weight")
    'blocks.3.self_attn.o_camera.weight'
    >>> native_name("blocks.0.norm2.bias"), native_name("scale_shift_table")
    ('blocks.0.norm3.bias', 'head.modulation')
    """
    name = name.replace("model.", "")
    for pattern, new in _RULES:
        name = pattern.sub(new, name)
    return name


def is_added(name: str) -> bool:
    """Does a published name belong to what WorldPlay adds to the Wan network?"""
    return any(part in name for part in ADDED)
