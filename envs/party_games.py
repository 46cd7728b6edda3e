"""The mini-map games of Melting Pot as plain data: map, players, actions, changed settings.

A map has at most 10 x 8 cells of 8 pixels, so that all games share one frame; characters are those
of the substrate's own table. Action ids are the same in every game (``ACTIONS``); ``interact`` is
the number of the substrate's action that id 7 stands for.
Facts come from dm-meltingpot 2.4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from worldgym.errors import ConfigError

ACTIONS = ("noop", "forward", "backward", "left", "right", "turn_left", "turn_right", "interact")
NOOP, FORWARD, BACKWARD, LEFT, RIGHT, TURN_LEFT, TURN_RIGHT, INTERACT = range(8)
ABSENT = -1  # action of a slot without a player
SLOTS = 8  # player slots of every recording; at most 7 are taken
CELLS_HW = (8, 10)  # the common frame in cells
SPRITE_PX = 8  # pixels of a cell as the simulator draws it
COLOURS = ((45, 110, 220), (245, 65, 65), (125, 185, 65), (245, 130, 0), (205, 5, 165),
           (195, 180, 0), (35, 185, 175))  # of players, where a game is tinted

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartyGame:
    """One game.

    ``substrate``: name in Melting Pot; ``rows``: the map, top to bottom; ``players``: numbers of
    players that can play; ``roles``: repeated until there is one per player, default: the
    substrate's only role; ``interact``: the substrate's action for id 7 (0: it has none);
    ``avatar``, ``prefabs``: component -> settings to change, of every player or of one prefab;
    ``tint``: share of the player's own colour (``COLOURS``) mixed into its sprites, where the
    substrate draws several players alike; ``redraw``: colours are drawn anew for every episode;
    ``removed_for_good``: a player taken out stays out, and
    the game ends with the last ``prey``; ``max_cycles``: steps of an episode; ``about``: one
    sentence for text-conditioned models.

    For scripted players: ``solid``: characters nobody walks on; ``pickups``: colours (RGB, mean of
    the middle of a cell) of what pays when walked on, with ``own_colour`` only to a player of that
    colour; ``collect_first``: meeting others pays by what was picked up before; ``work``: kinds of
    cells (characters) to face and interact with, in turn; ``teams``: player i is in team i modulo
    this.
    """

    name: str
    substrate: str
    about: str
    rows: tuple[str, ...]
    players: tuple[int, ...]
    roles: tuple[str, ...] = ()
    interact: int = 7
    avatar: Settings = field(default_factory=dict)
    prefabs: Mapping[str, Settings] = field(default_factory=dict)
    solid: str = "W"
    pickups: tuple[tuple[int, int, int], ...] = ()
    own_colour: bool = False
    collect_first: bool = False
    work: tuple[str, ...] = ()
    teams: int = 1
    tint: float = 0.0
    redraw: bool = False
    removed_for_good: bool = False
    max_cycles: int = 300

    @property
    def cells_hw(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        return len(self.rows), len(self.rows[0])

    @property
    def offset_cells(self) -> tuple[int, int]:
        """Columns and rows of the frame to the left of and above the map."""
        height, width = self.cells_hw
        return (CELLS_HW[1] - width) // 2, (CELLS_HW[0] - height) // 2

    @property
    def text(self) -> str:
        """The map as the simulator reads it."""
        return "\n" + "\n".join(self.rows) + "\n"

    def role_of(self, players: int) -> tuple[str, ...]:
        """Roles of ``players`` players, () if there is only one role."""
        if not self.roles:
            return ()
        return (self.roles * players)[:players]

    def recipe(self) -> dict[str, Any]:
        """What makes the game what it is, as JSON values, kept with recordings: all but what
        scripted players read, so that those can learn without spoiling a recording."""
        data = asdict(self)
        for name in ("solid", "pickups", "own_colour", "collect_first", "work", "teams"):
            del data[name]
        return data | {"cells_hw": self.cells_hw, "offset_cells": self.offset_cells,
                       "frame_cells_hw": CELLS_HW}


_SEVEN = (2, 3, 4, 5, 6, 7)
_ARENA = ("WWWWWWWWWW", "WP11P 22PW", "W 11  22 W", "WP a  a PW", "W  aPPa PW", "W 22  11 W",
          "WP22P 11PW", "WWWWWWWWWW")
# steps that two who met stand still, and are then away: few enough to be seen in the frames before
# (the substrates' own 16 and 5 or 50 leave most of a short game to waiting)
_SOON = {"GameInteractionZapper": {"freezeOnInteraction": 2, "framesTillRespawn": 2}}

_ALL = (
    PartyGame(
        name="coins", substrate="coins", players=(2,), interact=0,
        about="Two players pick up coins; taking a coin of the other's colour costs the other two.",
        pickups=((175, 161, 64), (64, 106, 147), (147, 51, 106), (196, 92, 106), (36, 120, 50)),
        own_colour=True, redraw=True,
        rows=("WWWWWWWWWW", "W_CCCCCC_W", "WCCCCCCCCW", "WCCCCCCCCW", "WCCCCCCCCW", "WCCCCCCCCW",
              "W_CCCCCC_W", "WWWWWWWWWW"),
        prefabs={"coin": {"ChoiceCoinRegrow": {"regrowRate": 0.004}}}),
    PartyGame(
        name="commons_harvest", substrate="commons_harvest__open", players=_SEVEN,
        about="Players eat apples that grow back only next to other apples; a beam removes others.",
        pickups=((184, 92, 82),),
        rows=("WWWWWWWWWW", "WAAP  PAAW", "WAA A  AAW", "WP AAA  PW", "W PAAA P W", "WAA A  AAW",
              "WAAP  PAAW", "WWWWWWWWWW"),
        avatar={"Avatar": {"spawnGroup": "spawnPoints"}},
        prefabs={"apple": {"DensityRegrow": {
            "regrowthProbabilities": [0.001, 0.01, 0.02, 0.05]}}}),
    PartyGame(
        name="clean_up", substrate="clean_up", players=_SEVEN, interact=8,
        about="Apples grow only while the river is kept clean; cleaning pays nothing.",
        pickups=((184, 92, 76),), work=("HF",),
        rows=("WWWWWWWWWW", "WHFHFHHFHW", "W==+~FHf=W", "WPPP<~S>PW", "WP P<~S>PW", "W^T^;~S,^W",
              "WBBBBssBBW", "WWWWWWWWWW")),
    PartyGame(
        name="territory", substrate="territory__open", players=_SEVEN, interact=8,
        about="Players paint walls in their colour; painted walls pay their owner.",
        solid="F|=TJLR", work=("R",),
        rows=("F========T", "|,RR,,RR,|", "|P,,P,,,P|", "|,R,RR,R,|", "|,R,RR,R,|", "|P,,,P,,P|",
              "|,RR,,RRP|", "L========J")),
    PartyGame(
        name="predator_prey", substrate="predator_prey__open", players=_SEVEN,
        roles=("predator", "prey", "prey", "predator", "prey", "prey", "prey"),
        tint=0.6, about="Predators chase prey that collect apples; prey are safe in groups.",
        solid="/;,_!|~LJ", pickups=((107, 167, 84), (154, 109, 84)),
        rows=("/;______,/", "/!XaaaaX|/", "/!aaAaaa|/", "/!a''''a|/", "/!a*''*a|/", "/!****aa|/",
              "/!**aA**|/", "/L~~~~~~J/"),
        avatar={"AvatarRespawn": {"framesTillRespawn": 1000000}}, removed_for_good=True),
    PartyGame(
        name="prisoners_dilemma", substrate="prisoners_dilemma_in_the_matrix__arena",
        players=_SEVEN, tint=1.0,
        about="Players collect green or red and play prisoner's dilemmas with a beam.",
        pickups=((98, 234, 206), (234, 98, 126)), collect_first=True,
        rows=_ARENA,
        avatar=_SOON),
    PartyGame(
        name="stag_hunt", substrate="stag_hunt_in_the_matrix__arena", players=_SEVEN,
        about="Players collect stag or hare resources and meet others with a beam.",
        pickups=((98, 234, 206), (234, 98, 126)), collect_first=True,
        rows=_ARENA,
        avatar=_SOON),
    PartyGame(
        name="scissors", players=(2,), substrate="running_with_scissors_in_the_matrix__repeated",
        tint=1.0, about="Two players collect rock, paper or scissors and then play it with a beam.",
        pickups=((132, 91, 255), (255, 214, 91), (91, 214, 255)), collect_first=True,
        rows=("WWWWWWWWWW", "Wn rr   nW", "W  rrWpp W", "W    Wpp W", "W  aaW   W", "W  aa ss W",
              "Wn    ssnW", "WWWWWWWWWW"),
        avatar=_SOON),
    PartyGame(
        name="cooking_cramped", substrate="collaborative_cooking__cramped", players=(2,),
        tint=1.0, about="Two cooks bring tomatoes to the pot and serve the soup.",
        solid="#OCDT", work=("O", "C", "O", "C", "O", "C", "D", "C", "T"),
        rows=("###C###", "O P P O", "#     #", "#     #", "##D#T##")),
    PartyGame(
        name="cooking_crowded", substrate="collaborative_cooking__crowded", players=(2, 3, 4, 5, 6),
        tint=1.0, about="Several cooks share a kitchen: tomatoes, pots, dishes, the window.",
        solid="#OCDT", work=("O", "C", "O", "C", "O", "C", "D", "C", "T"),
        rows=("##########", "#OPC  C  #", "#O P ##P #", "#    ## P#", "#D P ##  #", "#D   ## P#",
              "#  P    T#", "####TT####")),
    PartyGame(
        name="coop_mining", substrate="coop_mining", players=(2, 3, 4, 5, 6),
        about="Iron can be mined alone, gold only by two players at once.",
        solid="W", pickups=((54, 54, 13), (50, 42, 42)), work=("O",),
        rows=("WWWWWWWWWW", "WPOOOOOOPW", "WOOOOOOOOW", "WOOWOOWPOW", "WOPOOOOOOW", "WOOOOOOOOW",
              "WPOOOOOOPW", "WWWWWWWWWW"),
        # 20 times the substrate's: its 538 cells of ore bring 15 in 100 steps, these 40 bring 22
        prefabs={"ore": {"FixedRateRegrow": {"liveRates": [0.004, 0.0016]}}}),
    PartyGame(
        name="mushrooms", substrate="externality_mushrooms__dense", players=(2, 3, 4, 5),
        about="Red mushrooms pay the eater, green everyone, blue the others.",
        solid="/_+'#`!|(-)", pickups=((193, 118, 179), (94, 180, 97)),
        rows=("/________+", "'########`", "! R   G  |", "!   B  R |", "!G     G |", "! R  B   |",
              "!   G  R |", "(--------)")),
    PartyGame(
        name="paintball", substrate="paintball__king_of_the_hill", players=(2, 4, 6),
        tint=0.4, about="Two teams shoot each other and colour the hill.",
        solid="WI", teams=2,
        rows=("IWWWWWWWWI", "WPP,PP,PPW", "WP,WW,,,PW", "W,GGGGGG,W", "W,GGGGGG,W", "WQ,,,WW,QW",
              "WQQ,QQ,QQW", "IWWWWWWWWI"),
        avatar={"ZappedByColor": {"framesTillRespawn": 10}}),
)
GAMES: Mapping[str, PartyGame] = MappingProxyType({g.name: g for g in _ALL})


def game_named(name: str) -> PartyGame:
    """The game of this name, or ConfigError."""
    if name not in GAMES:
        raise ConfigError("unknown mini-map game", given=repr(name), expected=f"one of {[*GAMES]}",
                          fix="check the spelling")
    return GAMES[name]
