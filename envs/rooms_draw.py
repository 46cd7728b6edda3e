"""Four rooms and a ray-caster: a small 3-D world with exact poses, drawn in numpy.

Shapes: M wall piece, H W pixels. The plane is (x, z), heights are measured downward from the eye,
as in ``worldgym.camera``; a room is ``ROOM`` wide, its walls stand half a unit above and below the
eye. Walls face one way: the two sides of a wall are two pieces, each its room's.
"""

from dataclasses import dataclass

import numpy as np

ROOM, HALF = 2.0, 0.5
DOOR = 0.9  # width
PILLAR = 0.12  # half its side
RADIUS = 0.15  # how near to a wall one can go
REACH = 0.45  # how near to the goal one must come
FOV = 75.0  # degrees, width of the view
GOAL = (255.0, 0.0, 255.0)  # nothing else has this colour
COLOURS = np.array([
    (214, 64, 52), (238, 152, 44), (236, 222, 84), (112, 190, 70), (58, 168, 160), (66, 122, 220),
    (236, 236, 236), (150, 104, 66), (90, 90, 110), (168, 214, 250)], float)
PATTERNS = 5  # plain, upright stripes, level stripes, chequers, a band


@dataclass(frozen=True, slots=True)
class Layout:
    """Walls: piece m lies at ``at`` on axis ``axis`` (0: x, 1: z) from ``low`` to ``high`` on the
    other, and is seen from the side of ``facing`` (+1: larger coordinates)."""

    axis_M: np.ndarray
    at_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray
    facing_M: np.ndarray
    paint_M23: np.ndarray  # two colours
    pattern_M: np.ndarray
    floor_223: np.ndarray  # colour of each room's floor, by (x, z)
    goal: tuple[float, float]

    def blocked(self, x: float, z: float) -> bool:
        """Whether one cannot stand there."""
        here, there = np.where(self.axis_M == 0, x, z), np.where(self.axis_M == 0, z, x)
        along = np.maximum(np.maximum(self.low_M - there, there - self.high_M), 0)
        near = np.hypot(here - self.at_M, along).min() < RADIUS
        return bool(near or not (0 < x < 2 * ROOM and 0 < z < 2 * ROOM))


def make_layout(rng: np.random.Generator) -> Layout:
    """Four rooms in a square, joined by three or four doors; colours, pillars and goal at random.
    """
    pieces: list[tuple] = []
    floors = COLOURS[rng.permutation(len(COLOURS))[:4]].reshape(2, 2, 3) * 0.6
    shut = int(rng.integers(8))  # above 3: no inner wall is shut
    doors = rng.uniform(0.65, ROOM - 0.65, 4)

    def wall(axis: int, at: float, low: float, high: float, facing: int, paint: np.ndarray,
             pattern: int) -> None:
        pieces.append((axis, at, low, high, facing, paint, pattern))

    for i in range(2):
        for j in range(2):
            for axis in (0, 1):
                cell, other = ((i, j), (j, i))[axis]
                for side in (0, 1):
                    paint = COLOURS[rng.choice(len(COLOURS), 2, replace=False)]
                    pattern = int(rng.integers(PATTERNS))
                    at, low = (cell + side) * ROOM, other * ROOM
                    facing, number = 1 - 2 * side, 2 * axis + other
                    if cell == side or number == shut:  # an outer wall, or an inner one without
                        wall(axis, at, low, low + ROOM, facing, paint, pattern)
                    else:
                        middle = low + doors[number]
                        wall(axis, at, low, middle - DOOR / 2, facing, paint, pattern)
                        wall(axis, at, middle + DOOR / 2, low + ROOM, facing, paint, pattern)
    spots = []
    for room in rng.permutation(4)[:3]:  # the first pillar is the goal
        x, z = (ROOM * np.array(divmod(int(room), 2)) + ROOM / 2
                + rng.choice([-0.55, 0.55], 2) + rng.uniform(-0.05, 0.05, 2))
        spots.append((float(x), float(z)))
        paint = np.array([GOAL, GOAL]) if len(spots) == 1 else (
            COLOURS[rng.choice(len(COLOURS), 2, replace=False)])
        pattern = 0 if len(spots) == 1 else int(rng.integers(1, PATTERNS))
        for axis, (here, there) in enumerate(((x, z), (z, x))):
            for facing in (-1, 1):
                wall(axis, here + facing * PILLAR, there - PILLAR, there + PILLAR, facing, paint,
                     pattern)
    axes, spot, lows, highs, sides, paints, patterns = map(np.array, zip(*pieces, strict=True))
    return Layout(axes, spot, lows, highs, sides, paints, patterns, floors, spots[0])


def focal(frame_hw: tuple[int, int]) -> float:
    """Focal length in pixels."""
    return frame_hw[1] / 2 / np.tan(np.deg2rad(FOV) / 2)


def intrinsics(frame_hw: tuple[int, int]) -> np.ndarray:
    """Pixel intrinsics (3, 3) of the eye."""
    f = focal(frame_hw)
    return np.array([[f, 0, frame_hw[1] / 2], [0, f, frame_hw[0] / 2], [0, 0, 1]])


def draw(layout: Layout, c2w_44: np.ndarray, frame_hw: tuple[int, int]) -> np.ndarray:
    """What an eye at this (level) pose sees, uint8 (H, W, 3)."""
    (h, w), f = frame_hw, focal(frame_hw)
    px, pz = c2w_44[0, 3], c2w_44[2, 3]
    across = (np.arange(w) + 0.5 - w / 2) / f
    dx = across * c2w_44[0, 0] + c2w_44[0, 2]  # one unit ahead: t is depth, not distance
    dz = across * c2w_44[2, 0] + c2w_44[2, 2]
    upright = layout.axis_M == 0
    toward = np.where(upright, dx[:, None], dz[:, None])
    toward = np.where(np.abs(toward) < 1e-9, 1e-9, toward)
    t = (layout.at_M - np.where(upright, px, pz)) / toward
    along = np.where(upright, pz, px) + t * np.where(upright, dz[:, None], dx[:, None])
    there = (t > 1e-3) & (toward * layout.facing_M < 0) & (along >= layout.low_M) & (
        along <= layout.high_M)
    t = np.where(there, t, 1e9)
    which = t.argmin(1)
    columns = np.arange(w)
    depth = np.minimum(t[columns, which], 10.0)
    u = along[columns, which]
    down = ((np.arange(h) + 0.5 - h / 2) / f)[:, None]  # per unit of depth
    v = down * depth
    wall = np.abs(v) < HALF
    second = _pattern(layout.pattern_M[which], u[None], v)
    paint = layout.paint_M23[which]
    colour = np.where(second[..., None], paint[None, :, 1], paint[None, :, 0])
    far = np.where(wall, depth, HALF / np.maximum(np.abs(down), 1e-6))
    x, z = px + far * dx, pz + far * dz
    room = layout.floor_223[np.clip(x // ROOM, 0, 1).astype(int),
                            np.clip(z // ROOM, 0, 1).astype(int)]
    chequer = ((np.floor(2 * x) + np.floor(2 * z)) % 2)[..., None]
    ground = np.where((down > 0)[..., None], room * (0.75 + 0.25 * chequer), 0.5 * room + 60)
    out = np.where(wall[..., None], colour, ground) / (1 + 0.12 * far[..., None])
    return out.astype(np.uint8)


def _pattern(kind_W: np.ndarray, u_1W: np.ndarray, v_HW: np.ndarray) -> np.ndarray:
    """Where the second colour is (H, W)."""
    stripes = np.floor(u_1W / 0.4) % 2 == 1
    level = np.floor((v_HW + HALF) / 0.34) % 2 == 1
    band = np.abs(v_HW + 0.1) < 0.12
    kinds = (np.zeros(v_HW.shape, bool), stripes | (v_HW > 9), level, stripes ^ level, band)
    return np.choose(np.broadcast_to(kind_W, v_HW.shape), kinds)
