"""Which past views overlap with a view: Monte-Carlo overlap, exact and pruned (worldplay.md 9).

Shapes: N candidate camera, M point, c cell of points. The published score counts how many random
points in front of the query camera a past camera also sees. Seeing is the least of five signed
distances (two sides of a wedge in yaw, two cones in pitch, a ball), each of which changes by no
more than a point moves. So a cell of points whose centre is further inside or outside than its
radius is decided at once, and few candidates ever meet all points: the result is that of all
points, the cost is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from worldgym.errors import ConfigError

LEVELS = (8, 64, 512)  # cells of points, from coarse to fine
SLACK = 1e-3  # of distances in float32
BLOCK = 1 << 16  # numbers worked on at once: they stay in the cache


def ball(uniform_3M: np.ndarray, radius: float) -> np.ndarray:
    """Points (M, 3) uniform in a ball, from uniform numbers for radius, azimuth, polar angle."""
    r = radius * np.cbrt(uniform_3M[0])
    azimuth, polar = 2 * np.pi * uniform_3M[1], np.arccos(1 - 2 * uniform_3M[2])
    return np.stack([r * np.sin(polar) * np.cos(azimuth), r * np.sin(polar) * np.sin(azimuth),
                     r * np.cos(polar)], -1).astype(np.float32)


@dataclass(frozen=True)
class Cloud:
    """Points around a query camera, in its coordinates; ``fov``: width and height in degrees.

    Only the points that the query itself sees are kept, and cells of them.
    """

    points_M3: np.ndarray
    radius: float = 8.0
    fov: tuple[float, float] = (60.0, 35.0)

    def __post_init__(self) -> None:
        if not (0 < self.fov[0] < 180 and 0 < self.fov[1] < 180 and self.radius > 0):
            raise ConfigError("impossible field of view", given=f"{self.fov}, {self.radius}",
                              expected="angles between 0 and 180 degrees, a radius above 0",
                              fix="use (60, 35) and 8, the published values")

    @cached_property
    def seen(self) -> np.ndarray:
        """The points in view of the query (M, 3)."""
        x, y, z = self.points_M3.T.astype(np.float64)
        yaw, pitch = np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))
        half = np.deg2rad(self.fov) / 2
        return self.points_M3[(np.abs(yaw) < half[0]) & (np.abs(pitch) < half[1])]

    @cached_property
    def cells(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
        """Per level: centres (c, 3), radii (c,), numbers of points (c,)."""
        return tuple(_cells(self.seen, n) for n in LEVELS if 4 * n <= len(self.seen))


def _cells(points_M3: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    groups = [points_M3]
    while len(groups) < count:  # halve the widest axis of every group
        halves = []
        for group in groups:
            order = np.argsort(group[:, np.ptp(group, axis=0).argmax()], kind="stable")
            halves += [group[order[:len(order) // 2]], group[order[len(order) // 2:]]]
        groups = halves
    centre = np.stack([(g.min(0) + g.max(0)) / 2 for g in groups])
    radius = [np.linalg.norm(g - c, axis=1).max() for g, c in zip(groups, centre, strict=True)]
    return centre, np.array(radius) + SLACK, np.array([len(g) for g in groups], np.float32)


@dataclass(frozen=True)
class Views:
    """Past cameras in a query's coordinates: position (N, 3) and direction (N, 3)."""

    position_N3: np.ndarray
    ahead_N3: np.ndarray
    half: tuple[float, float]  # of the field of view, radians
    radius: float

    @cached_property
    def _edges(self) -> tuple[np.ndarray, ...]:
        x, y, z = self.ahead_N3.T
        yaw, pitch = np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))
        up, down = (np.clip(pitch + s * self.half[1], -np.pi / 2, np.pi / 2) for s in (1, -1))
        left, right = yaw - self.half[0], yaw + self.half[0]
        wedge = (np.sin(right), np.cos(right), np.sin(left), np.cos(left))
        cones = (np.sin(up), np.cos(up), np.sin(down), np.cos(down))
        return tuple(e.astype(np.float32)[:, None] for e in (*wedge, *cones))

    def rows(self, index: np.ndarray) -> "Views":
        """Some of the cameras."""
        return Views(self.position_N3[index], self.ahead_N3[index], self.half, self.radius)

    def depth(self, points_M3: np.ndarray) -> np.ndarray:
        """How far inside each view each point lies (N, M), at most its distance to the edge."""
        p = self.position_N3.astype(np.float32)
        x, y, z = (points_M3[None, :, i] - p[:, None, i] for i in range(3))
        sin_r, cos_r, sin_l, cos_l, sin_u, cos_u, sin_d, cos_d = self._edges
        flat = x * x + z * z
        out = self.radius - np.sqrt(flat + y * y)
        np.sqrt(flat, out=flat)
        for a, b, c, d in ((sin_r, z, cos_r, x), (cos_l, x, sin_l, z),
                           (sin_u, flat, cos_u, y), (cos_d, y, sin_d, flat)):
            np.minimum(out, a * b - c * d, out=out)
        return out


def views_of(query_w2c_44: np.ndarray, centre_N3: np.ndarray, ahead_N3: np.ndarray,
             cloud: Cloud, fov: tuple[float, float] | None = None) -> Views:
    """Cameras (their centre and direction in the world) as a query camera has them before it."""
    turn, move = query_w2c_44[:3, :3], query_w2c_44[:3, 3]
    half = np.deg2rad(fov or cloud.fov) / 2
    return Views(centre_N3 @ turn.T + move, ahead_N3 @ turn.T, (half[0], half[1]), cloud.radius)


def _blocks(count: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, width))
    return (slice(i, i + step) for i in range(0, count, step))


def hits(views: Views, cloud: Cloud) -> np.ndarray:
    """How many of the query's points each view sees too (N,)."""
    out, index = np.zeros(len(views.position_N3)), np.arange(len(views.position_N3))
    for block in _blocks(len(out), len(cloud.seen)):
        out[block] = (views.rows(index[block]).depth(cloud.seen) > 0).sum(1)
    return out


def bounds(views: Views, cell: tuple[np.ndarray, np.ndarray, np.ndarray]
           ) -> tuple[np.ndarray, np.ndarray]:
    """Least and most hits (N,) that cells of points allow."""
    centre, radius, count = cell
    low, high = (np.zeros(len(views.position_N3)) for _ in range(2))
    index = np.arange(len(low))
    for block in _blocks(len(low), len(centre)):
        depth = views.rows(index[block]).depth(centre)
        low[block], high[block] = (depth > radius) @ count, (depth > -radius) @ count
    return low, high


def overlap(query_w2c_44: np.ndarray, past_w2c_44: np.ndarray, cloud: Cloud) -> float:
    """Share of the points that the query sees which the past camera sees too; 0 if none."""
    centre, ahead = geometry(past_w2c_44[None])
    seen = hits(views_of(query_w2c_44, centre, ahead, cloud), cloud)
    return float(seen[0]) / max(1, len(cloud.seen))


def geometry(w2c_N44: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (N, 3) and direction (N, 3) of cameras in the world: all that the score needs."""
    turn = w2c_N44[:, :3, :3]
    return -np.einsum("nji,nj->ni", turn, w2c_N44[:, :3, 3]), turn[:, 2].copy()


def nearest(query_w2c_Q44: np.ndarray, centre_N23: np.ndarray, ahead_N23: np.ndarray,
            cloud: Cloud, most: int = 1, fov: tuple[float, float] | None = None,
            distance_weight: float = 0.0) -> np.ndarray:
    """The candidates whose distance is least, in order; of equals the earlier one.

    The distance of a candidate is the mean over queries and its two cameras of 1 - overlap.

    Args:
        query_w2c_Q44: the cameras of the coming chunk.
        centre_N23: two camera centres per candidate; ``ahead_N23``: their directions.
        cloud: points in front of a query.
        most: how many candidates to return.
        fov: of the past cameras; default: the cloud's.
        distance_weight: adds this times the mean distance of the cameras over the radius (at
            most 1); the published score has none.
    """
    n, pairs = len(centre_N23), 2 * len(query_w2c_Q44)
    every = [views_of(q, centre_N23.reshape(-1, 3), ahead_N23.reshape(-1, 3), cloud, fov)
             for q in query_w2c_Q44]
    points = max(1, len(cloud.seen))
    far = np.zeros(n)
    if distance_weight:
        off = np.mean([np.linalg.norm(v.position_N3, axis=1) for v in every], 0) / cloud.radius
        far = distance_weight * np.minimum(off, 1).reshape(n, 2).mean(1)
    left, low = np.arange(n), np.zeros(n)
    for cell in cloud.cells:
        if len(left) <= most:
            break
        low, high = _distances(every, left, lambda v, c=cell: bounds(v, c), points, pairs)
        low, high = low + far[left], high + far[left]
        keep = low <= np.partition(high, most - 1)[most - 1] + 1e-9
        left, low = left[keep], low[keep]
    order = np.argsort(low, kind="stable") if len(low) == len(left) else np.arange(len(left))
    exact, worst, step = np.full(n, np.inf), np.inf, 8
    for start in range(0, len(left), step):  # most promising first
        some = left[order[start:start + step]]
        some = some[low[order[start:start + step]] <= worst + 1e-9]
        if not len(some):
            break
        both = _distances(every, some, lambda v: (hits(v, cloud),) * 2, points, pairs)
        exact[some] = both[0] + far[some]
        worst = np.partition(exact, min(most, n) - 1)[min(most, n) - 1]
    return np.argsort(exact, kind="stable")[:most]


def _distances(every: list[Views], index: np.ndarray, count, points: int, pairs: int
               ) -> tuple[np.ndarray, np.ndarray]:
    """Least and most distance of some candidates, from hits summed over queries and cameras."""
    rows = (2 * index[:, None] + np.arange(2)).ravel()
    counted = [count(views.rows(rows)) for views in every]
    least, most = (sum(c[i].reshape(-1, 2).sum(1) for c in counted) for i in (0, 1))
    return 1 - most / (pairs * points), 1 - least / (pairs * points)
