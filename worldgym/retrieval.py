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

Cells = tuple[np.ndarray, np.ndarray, np.ndarray]  # centres (c, 3), radii (c,), numbers (c,)
LEVELS = (16, 64, 512)  # cells of points, from coarse to fine
RINGS, BINS = 8, 240  # of the first, coarsest bound: distances and directions
WIDER = 2.5  # a ring lies this many times farther out than the other camera
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
    def cells(self) -> tuple[Cells, ...]:
        """Cells of the points seen, per level."""
        return tuple(_cells(self.seen, n) for n in LEVELS if 4 * n <= len(self.seen))


    @cached_property
    def fan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For :meth:`most`: radii of rings (RINGS,), how many points lie nearer (RINGS + 1,), and
        how many of the others lie left of each of BINS directions (RINGS + 1, BINS + 3)."""
        x, _, z = self.seen.T.astype(np.float64)
        away, yaw = np.hypot(x, z), np.arctan2(x, z)
        half = np.deg2rad(self.fov[0]) / 2
        radii = self.radius * np.geomspace(1 / 32, 1, RINGS)
        slot = np.clip(((yaw + half) / (2 * half) * BINS).astype(int), 0, BINS - 1)
        left = np.zeros((RINGS + 1, BINS + 3))
        for ring, radius in enumerate(radii):
            counts = np.bincount(slot[away >= radius], minlength=BINS)
            left[ring, 2:BINS + 2], left[ring, BINS + 2:] = np.cumsum(counts), counts.sum()
        near = np.array([*(np.count_nonzero(away < r) for r in radii), len(yaw)])
        return radii, near.astype(np.float64), left

    @cached_property
    def reach(self) -> np.ndarray:
        """Distances of the points seen, ascending."""
        return np.sort(np.linalg.norm(self.seen.astype(np.float64), axis=1))

    def most(self, position_N3: np.ndarray, ahead_N3: np.ndarray) -> np.ndarray:
        """How many points (N,) cameras in the query's coordinates see at most.

        By directions on the level alone: from a camera d away, a point at least r away lies in a
        direction that differs by asin(d / r) at most. What is nearer counts as seen. And no point
        is seen that is nearer than the distance of the cameras less the radius.
        """
        radii, near, left = self.fan
        away = np.hypot(position_N3[:, 0], position_N3[:, 2])
        yaw = np.arctan2(ahead_N3[:, 0], ahead_N3[:, 2])
        ring = np.searchsorted(radii, WIDER * away + SLACK)  # RINGS: too far to say anything
        half = np.deg2rad(self.fov[0]) / 2
        wide = half + SLACK + np.arcsin(away / np.append(radii, np.inf)[ring].clip(1e-9))
        scale = BINS / (2 * half)
        low = np.clip(np.floor((yaw - wide + half) * scale), -1, BINS).astype(int) + 1
        high = np.clip(np.ceil((yaw + wide + half) * scale), -1, BINS).astype(int) + 1
        count = near[ring] + left[ring, np.minimum(high + 1, BINS + 2)] - left[ring, low]
        gone = np.searchsorted(self.reach, np.linalg.norm(position_N3, axis=1) - self.radius
                               - SLACK)
        return np.minimum(np.where(wide > np.pi - half, len(self.seen), count),
                          len(self.seen) - gone)


def _cells(points_M3: np.ndarray, count: int) -> Cells:
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


class Views:
    """Past cameras in a query's coordinates: position (N, 3), and the edges of what they see."""

    def __init__(self, position_N3: np.ndarray, ahead_N3: np.ndarray, fov: tuple[float, float],
                 radius: float) -> None:
        x, y, z = ahead_N3.T
        yaw, pitch = np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))
        half = np.deg2rad(fov) / 2
        cones = np.clip([pitch + half[1], pitch - half[1]], -np.pi / 2, np.pi / 2)
        edges = np.concatenate([[yaw + half[0], yaw - half[0]], cones])
        self.rows_11N = np.concatenate([position_N3.T, np.sin(edges), np.cos(edges)]
                                       ).astype(np.float32)
        self.position_N3, self.radius = position_N3, radius

    def depth(self, index: np.ndarray, points_M3: np.ndarray) -> np.ndarray:
        """How far inside some views each point lies (n, M), at most its distance to the edge."""
        r = self.rows_11N[:, index, None]
        px, py, pz, sin_r, sin_l, sin_u, sin_d, cos_r, cos_l, cos_u, cos_d = r
        x, y, z = (points_M3[None, :, i] - p for i, p in enumerate((px, py, pz)))
        flat = x * x
        flat += z * z
        out = y * y
        out += flat
        np.sqrt(out, out=out)
        np.subtract(self.radius, out, out=out)
        np.sqrt(flat, out=flat)
        one, two = np.empty_like(out), np.empty_like(out)
        for a, b, c, d in ((sin_r, z, cos_r, x), (cos_l, x, sin_l, z),
                           (sin_u, flat, cos_u, y), (cos_d, y, sin_d, flat)):
            np.multiply(a, b, out=one)
            np.multiply(c, d, out=two)
            one -= two
            np.minimum(out, one, out=out)
        return out

    def hits(self, index: np.ndarray, points_M3: np.ndarray) -> np.ndarray:
        """How many points some views see (n,)."""
        out = np.zeros(len(index))
        for block in _blocks(len(index), len(points_M3)):
            out[block] = np.count_nonzero(self.depth(index[block], points_M3) > 0, axis=1)
        return out

    def bounds(self, index: np.ndarray, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
        """Least and most hits (n,) that cells of points allow."""
        centre, radius, count = cells
        low, high = np.zeros((2, len(index)))
        for block in _blocks(len(index), len(centre)):
            depth = self.depth(index[block], centre)
            low[block], high[block] = (depth > radius) @ count, (depth > -radius) @ count
        return low, high


def _blocks(count: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, width))
    return (slice(i, i + step) for i in range(0, count, step))


def geometry(w2c_N44: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (N, 3) and direction (N, 3) of cameras in the world: all that the score needs."""
    turn = w2c_N44[:, :3, :3]
    return -np.einsum("nji,nj->ni", turn, w2c_N44[:, :3, 3]), turn[:, 2].copy()


def overlap(query_w2c_44: np.ndarray, past_w2c_44: np.ndarray, cloud: Cloud) -> float:
    """Share of the points that the query sees which the past camera sees too; 0 if none."""
    centre, ahead = geometry(past_w2c_44[None])
    turn = query_w2c_44[:3, :3]
    views = Views(centre @ turn.T + query_w2c_44[:3, 3], ahead @ turn.T, cloud.fov, cloud.radius)
    return float(views.hits(np.zeros(1, int), cloud.seen)[0]) / max(1, len(cloud.seen))


class Distances:
    """Distance of candidates from a chunk: the mean over its cameras q and the candidate's two of
    1 - overlap(q, candidate), exactly or between bounds.

    Args:
        query_w2c_Q44: the cameras of the coming chunk.
        centre_N23: two camera centres per candidate; ``ahead_N23``: their directions.
        cloud: points in front of a query.
        distance_weight: adds this times the mean distance of the cameras over the radius (at
            most 1); the published score has none.
    """

    def __init__(self, query_w2c_Q44: np.ndarray, centre_N23: np.ndarray, ahead_N23: np.ndarray,
                 cloud: Cloud, distance_weight: float = 0.0) -> None:
        q, n = len(query_w2c_Q44), len(centre_N23)
        turn, move = query_w2c_Q44[:, :3, :3], query_w2c_Q44[:, :3, 3]
        position, ahead = (x.reshape(-1, 3) @ np.swapaxes(turn, 1, 2) for x in
                           (centre_N23, ahead_N23))
        position += move[:, None]
        self.cloud, self.pairs = cloud, 2 * q * max(1, len(cloud.seen))
        self.position, self.ahead = position.reshape(-1, 3), ahead.reshape(-1, 3)
        self.rows_NP = (np.arange(q)[:, None] * 2 * n + np.arange(2)).reshape(1, -1) + (
            2 * np.arange(n)[:, None])
        away = np.linalg.norm(position, axis=-1).reshape(q, n, 2).mean((0, 2)) / cloud.radius
        # where to look first: near, and looking the same way
        self.guess_N = away - ahead[..., 2].reshape(q, n, 2).mean((0, 2))
        self.extra_N = distance_weight * np.minimum(away, 1)
        self.place_N = np.full(n, -1)  # of a candidate in ``kept``
        self.kept: Views | None = None

    def _look(self, index: np.ndarray) -> Views:
        rows = self.rows_NP[index].ravel()
        return Views(self.position[rows], self.ahead[rows], self.cloud.fov, self.cloud.radius)

    def keep(self, index: np.ndarray) -> None:
        """Work out the cameras of some candidates, which will be asked for again and again."""
        self.kept, self.place_N[index] = self._look(index), np.arange(len(index))

    def _views(self, index: np.ndarray) -> tuple[Views, np.ndarray]:
        """The cameras of some candidates, and where they are."""
        place, pairs = self.place_N[index], self.rows_NP.shape[1]
        if self.kept is None or place.min() < 0:
            return self._look(index), np.arange(len(index) * pairs)
        return self.kept, (place[:, None] * pairs + np.arange(pairs)).ravel()

    def roughly(self, index: np.ndarray) -> np.ndarray:
        """What the distances of some candidates are at least, at first glance."""
        rows = self.rows_NP[index].ravel()
        high = self.cloud.most(self.position[rows], self.ahead[rows])
        return 1 - high.reshape(len(index), -1).sum(1) / self.pairs + self.extra_N[index]

    def exact(self, index: np.ndarray) -> np.ndarray:
        """Distances of some candidates."""
        views, rows = self._views(index)
        seen = views.hits(rows, self.cloud.seen)
        return 1 - seen.reshape(len(index), -1).sum(1) / self.pairs + self.extra_N[index]

    def least(self, index: np.ndarray, cells: Cells) -> np.ndarray:
        """What the distances of some candidates are at least."""
        views, rows = self._views(index)
        high = views.bounds(rows, cells)[1]
        return 1 - high.reshape(len(index), -1).sum(1) / self.pairs + self.extra_N[index]

    def nearest(self, most: int = 1) -> np.ndarray:
        """The ``most`` candidates of least distance, in order; of equals the earlier one."""
        n = len(self.guess_N)
        most = min(most, n)
        exact, low = np.full(n, np.inf), np.full(n, -np.inf)

        def measure(some: np.ndarray) -> float:
            exact[some] = self.exact(some)
            return float(np.partition(exact, most - 1)[most - 1]) + 1e-9

        limit = measure(np.argpartition(self.guess_N, most - 1)[:most])
        left = np.flatnonzero(np.isinf(exact))
        if len(left) > 2 * most:
            low[left] = self.roughly(left)
            left = left[low[left] <= limit]
        if len(left):
            self.keep(left)
        for cells in self.cloud.cells:
            if len(left) <= most:
                break
            low[left] = self.least(left, cells)
            left = left[low[left] <= limit]
            if len(left) > most:  # the most promising one sharpens the limit
                limit = measure(left[[low[left].argmin()]])
                left = left[np.isinf(exact[left]) & (low[left] <= limit)]
        left = left[np.argsort(low[left], kind="stable")]
        for start in range(0, len(left), 8):
            some = left[start:start + 8]
            some = some[low[some] <= limit]
            if not len(some):
                break
            limit = measure(some)
        return np.argsort(exact, kind="stable")[:most]
