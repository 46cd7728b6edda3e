"""Clips of games of several players: how often which are drawn."""

import numpy as np
import pytest

from tests.party_squares import episode, recorded, recorded_games
from worldgym.data.party import PartySampler, open_party
from worldgym.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return recorded_games(tmp_path_factory.mktemp("games"))


def test_eventful_clips_are_weighed_back(data):
    """Half of the clips pay; weighed by ``likely``, their share is that of the recordings."""
    stores = open_party(data)
    ids = {k: np.arange(len(v)) for k, v in stores.items()}
    games = {"frames": 2, "batch": 4000, "permute": False, "with_frames": False}
    drawn = PartySampler(stores, ids, **games, eventful=0.5)(0)
    plain = PartySampler(stores, ids, **games)(0)
    for number, store in enumerate(stores.values()):
        rewards = store.take("rewards", np.arange(store.rows))
        share = (rewards != 0).any(1).sum() / store.steps
        pays, mine = (drawn["rewards"][:, -1] != 0).any(1), drawn["game"] == number
        assert 0 < share < 0.1 and pays[mine].mean() == pytest.approx(0.5 + share / 2, abs=0.04)
        back = (drawn["likely"] * pays)[mine].sum() / drawn["likely"][mine].sum()
        assert back == pytest.approx(share, rel=0.1)
        even = (plain["rewards"][:, -1] != 0).any(1)[plain["game"] == number].mean()
        assert even == pytest.approx(share, abs=0.02)
    with pytest.raises(ConfigError, match="eventful 1"):
        PartySampler(stores, ids, 2, 4, eventful=1.0)


def test_what_leads_to_an_event_is_drawn_with_it(tmp_path):
    """A player leaves in row 5 of the second episode: rows 3 to 5 of that episode are eventful."""
    store = recorded(tmp_path / "game")
    plain, leaves = episode(9, 0), episode(9, 1)
    for one in (plain, leaves):
        one["rewards"][:] = 0
    leaves["info_alive"][5:, 0] = False
    store.append([plain, leaves, plain])  # the third begins with everyone on the map again
    stores, ids = {"game": store}, {"game": np.arange(3)}
    drawn = PartySampler(stores, ids, 2, 4000, with_frames=False, eventful=0.9, soon=2)(0)
    last = drawn["rows"][:, -1] - int(store.starts[1])
    often = np.isin(last, (3, 4, 5))
    assert often.mean() == pytest.approx(0.9 + 0.1 * 3 / 27, abs=0.02)
    assert (drawn["likely"][often] < 1).all() and (drawn["likely"][~often] > 1).all()


def test_games_are_drawn_as_often_as_asked(data):
    stores = open_party(data)
    ids = {k: np.arange(len(v)) for k, v in stores.items()}
    games = {"frames": 2, "batch": 4000, "with_frames": False}
    drawn = PartySampler(stores, ids, **games, chances=(0.8, 0.2))(0)["game"]
    assert (drawn == 0).mean() == pytest.approx(0.8, abs=0.03) and set(drawn) == {0, 1}
    assert (PartySampler(stores, ids, **games, chances=(0.0, 1.0))(0)["game"] == 1).all()
    for wrong in ((0.5, 0.4), (1.5, -0.5), (1.0,)):
        with pytest.raises(ConfigError, match="chances of sum 1"):
            PartySampler(stores, ids, **games, chances=wrong)
