"""What a world is, as plain data: sizes, rates, actions, licence facts."""

from dataclasses import asdict, dataclass, field

from worldgym.actions import ActionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """Licence facts that training and shipping respect."""

    name: str = "MIT"
    may_ship_weights: bool = True
    may_train_on_outputs: bool = True
    territory: str = "worldwide"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldSpec:
    """Shapes and rates of one world.

    ``frame_hw``: pixel height and width; ``latent_chw``: one latent frame; ``frames_per_chunk``:
    pixel frames made by one ``step``; ``fps``: pixel frames per second of game time;
    ``context_frames``: the most past latent frames a start may carry and a step can see.
    """

    name: str
    frame_hw: tuple[int, int]
    latent_chw: tuple[int, int, int]
    action: ActionSpec
    fps: float = 8.75
    frames_per_chunk: int = 1
    latents_per_chunk: int = 1
    context_frames: int = 8
    subjects: int = 0
    licence: Licence = field(default_factory=Licence)

    def to_json(self) -> dict:
        """Plain dict that ``from_json`` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "WorldSpec":
        """Inverse of ``to_json``."""
        data = dict(data)
        data["action"] = ActionSpec.from_json(data["action"])
        data["licence"] = Licence(**data["licence"])
        data["frame_hw"] = tuple(data["frame_hw"])
        data["latent_chw"] = tuple(data["latent_chw"])
        return cls(**data)
