"""The README's tables are the results files, and nothing else."""

from pathlib import Path

import pytest

from worldgym.agents import results, tables
from worldgym.agents.results import Row
from worldgym.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_readme_shows_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    assert tables.MARKER.search(text), "README.md has no table markers"
    assert tables.filled(text, ROOT / "results") == text, "run `make tables`"


def test_every_table_is_in_the_readme():
    names = {m[1] for m in tables.MARKER.finditer((ROOT / "README.md").read_text())}
    assert names == set(tables.TABLES)


def test_a_table_follows_its_file(tmp_path):
    readme = "x\n<!-- table:transfer -->\n<!-- /table -->\ny\n"
    assert "Not measured" in tables.filled(readme, tmp_path)
    rows = [Row(what="random", metric="real_return", value=292, ci95=(250, 330), n=100, sd=151),
            Row(what="random", metric="dream_return", value=300, n=100),
            Row(what="world", metric="psnr_1", value=30.5)]
    results.write(tmp_path / "take_cover_transfer.json", rows, command="test")
    filled = tables.filled(readme, tmp_path)
    assert "292 ± 151 (250 to 330; n = 100)" in filled and "+8" in filled and "30.5" in filled
    assert tables.filled(filled, tmp_path) == filled
    page = tmp_path / "README.md"
    page.write_text(readme)
    assert tables.update(page, tmp_path) and not tables.update(page, tmp_path)


def test_unknown_table(tmp_path):
    with pytest.raises(ConfigError, match="unknown table"):
        tables.render("nonsense", tmp_path)
