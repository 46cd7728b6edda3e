"""Results files and intervals."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from worldgym.agents import results
from worldgym.agents.results import Row
from worldgym.agents.stats import difference, summary
from worldgym.errors import ConfigError, DatasetError


def test_written_as_the_architecture_says(tmp_path):
    row = Row(what="dream-ppo", metric="real_return", value=812.4, ci95=(730.1, 900.2), n=100,
              unit="tics", seeds="0-99")
    path = results.write(tmp_path / "r.json", [row], command="worldgym score")
    data = json.loads(path.read_text())
    assert set(data["about"]) >= {"command", "commit", "machine", "versions", "date"}
    assert data["rows"] == [{"what": "dream-ppo", "metric": "real_return", "value": 812.4,
                             "ci95": [730.1, 900.2], "n": 100, "unit": "tics", "seeds": "0-99"}]
    assert not list(tmp_path.glob(".*"))


def test_merge_replaces_only_what_was_measured_again(tmp_path):
    path = tmp_path / "r.json"
    results.write(path, [Row(what="a", metric="m", value=1), Row(what="b", metric="m", value=2)],
                  command="first")
    results.write(path, [Row(what="a", metric="m", value=3)], command="second")
    rows = {row["what"]: row for row in results.read(path)["rows"]}
    assert rows["a"]["value"] == 3 and "about" not in rows["a"]
    assert rows["b"]["value"] == 2 and rows["b"]["about"]["command"] == "first"


def test_commands_that_end_together_keep_all_rows(tmp_path):
    def measured(i):
        for j in range(10):
            results.write(tmp_path / "r.json", [Row(what=f"{i}", metric=f"{j}", value=i * j)], "c")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(measured, range(8)))
    assert len(results.read(tmp_path / "r.json")["rows"]) == 80


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', '{"about": {}, "rows": []}',
                                  '{"about": {"command": "x"}, "rows": [{"what": "a"}]}'])
def test_broken_files_are_named(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match="Fix:"):
        results.read(path)


def test_a_result_must_be_a_number(tmp_path):
    with pytest.raises(ConfigError, match="finite"):
        results.write(tmp_path / "r.json", [Row(what="a", metric="m", value=float("nan"))])
    assert not (tmp_path / "r.json").exists()


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(15):
        s = summary(rng.exponential(100, 40))
        inside += s.low <= 100 <= s.high
    assert inside >= 11  # 95 % nominal; skewed samples of 40


def test_difference_and_degenerate_samples():
    rng = np.random.default_rng(1)
    a, b = rng.normal(10, 1, 50), rng.normal(5, 1, 50)
    gap = difference(a, b)
    assert gap.low > 4 and gap.high < 6
    assert difference(a, a, paired=True).mean == 0
    assert summary([3.0]).ci95 == (3.0, 3.0) and summary([2, 2, 2]).sd == 0
    with pytest.raises(ConfigError):
        summary([])
    with pytest.raises(ConfigError):
        difference(a, b[:-1], paired=True)
