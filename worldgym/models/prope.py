"""Projective position encoding: cameras inside the attention (specs/worldplay.md section 5).

Shapes: B slot, F latent frame, T token, N head, E head width; T = F * tokens per frame. Every group
of four channels of a head is a point that the frame's matrix moves. Matrices are w2c, column
vectors, x right, y down, z forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldgym.errors import NotFiniteError, ShapeError


def rigid_inverse(m_44: Tensor) -> Tensor:
    """Inverse of rigid motions (..., 4, 4): the transposed rotation, -R' t."""
    out = torch.zeros_like(m_44)
    turn = m_44[..., :3, :3].mT
    out[..., :3, :3] = turn
    out[..., :3, 3:] = -turn @ m_44[..., :3, 3:]
    out[..., 3, 3] = 1
    return out


@dataclass(frozen=True, slots=True)
class Cameras:
    """Where the camera of every latent frame stands and how it sees.

    ``w2c_BF44``: world to camera; ``K_BF33``: normalised intrinsics, of which only the two focal
    lengths count; None = all 1. Keep both in float64: see :meth:`seen_from`.
    """

    w2c_BF44: Tensor
    K_BF33: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.w2c_BF44.shape
        fits = len(shape) == 4 and shape[2:] == (4, 4) and (
            self.K_BF33 is None or self.K_BF33.shape == (*shape[:2], 3, 3))
        if not fits:
            raise ShapeError(
                "cameras have the wrong shape", given=(tuple(shape), None if self.K_BF33 is None
                                                       else tuple(self.K_BF33.shape)),
                expected="w2c (B, F, 4, 4) and K (B, F, 3, 3)",
                fix="give one pose and one intrinsic matrix per latent frame")

    def seen_from(self, w2c_B44: Tensor) -> "Cameras":
        """The same cameras with the world's origin moved to another camera.

        One rigid motion of the whole world changes nothing in the attention, but numbers near zero
        survive a rounding to few digits that those of a camera far out do not.
        """
        return Cameras(self.w2c_BF44 @ rigid_inverse(w2c_B44)[:, None], self.K_BF33)

    def rows(self, index: Sequence[int] | Tensor) -> "Cameras":
        """Cameras of some slots."""
        index = torch.as_tensor(index, device=self.w2c_BF44.device)
        return Cameras(self.w2c_BF44[index], None if self.K_BF33 is None else self.K_BF33[index])

    @staticmethod
    def join(parts: "Sequence[Cameras]") -> "Cameras":
        """Cameras of frames that follow each other."""
        ks = [p.K_BF33 for p in parts if p.K_BF33 is not None]
        return Cameras(torch.cat([p.w2c_BF44 for p in parts], 1),
                       torch.cat(ks, 1) if len(ks) == len(parts) else None)

    def projection(self, like: Tensor) -> "Projection":
        """The matrices, worked out here in the cameras' precision, in dtype and place of ``like``.
        """
        m, inverse = self.w2c_BF44, rigid_inverse(self.w2c_BF44)
        if self.K_BF33 is not None:
            focal = torch.diagonal(self.K_BF33, dim1=-2, dim2=-1)[..., :2].to(m)
            if not bool(((focal > 0) & torch.isfinite(focal)).all()):
                raise NotFiniteError(
                    "focal length is not above 0", given=focal.flatten()[:4].tolist(),
                    expected="normalised intrinsics: fx / (2 cx), fy / (2 cy)",
                    fix="normalise them as floats (worldgym.camera.normalised)")
            scale = torch.cat([focal, torch.ones_like(focal)], -1)
            m, inverse = scale[..., None] * m, inverse / scale[..., None, :]
        if not bool(torch.isfinite(m).all()):
            raise NotFiniteError("camera pose is not finite", given="NaN or inf",
                                 expected="finite rigid motions", fix="check the pose file")
        return Projection(m.to(like), inverse.to(like))


@dataclass(frozen=True, slots=True)
class Projection:
    """P and its inverse per frame, applied to the channels of tokens in frame order."""

    p_BF44: Tensor
    inverse_BF44: Tensor

    def query(self, q_BTNE: Tensor) -> Tensor:
        """P' u."""
        return _each(self.p_BF44.mT, q_BTNE)

    def key(self, k_BTNE: Tensor) -> Tensor:
        """P^-1 u; values likewise."""
        return _each(self.inverse_BF44, k_BTNE)

    def out(self, o_BTNE: Tensor) -> Tensor:
        """P u, with the query's matrix."""
        return _each(self.p_BF44, o_BTNE)


def _each(m_BF44: Tensor, x_BTNE: Tensor) -> Tensor:
    b, f = m_BF44.shape[:2]
    if x_BTNE.shape[0] != b or x_BTNE.shape[1] % f or x_BTNE.shape[-1] % 4:
        raise ShapeError("tokens do not fit the cameras", given=tuple(x_BTNE.shape),
                         expected=f"({b}, a multiple of {f}, N, a multiple of 4)",
                         fix="give one camera per latent frame")
    u = x_BTNE.reshape(b, f, -1, 4)  # tokens, heads and groups of a frame in one
    return (u @ m_BF44.mT).reshape(x_BTNE.shape)
