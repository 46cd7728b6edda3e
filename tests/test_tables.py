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


def test_tables_of_several_players(tmp_path):
    def made(name, file, rows, **extra):
        results.write(tmp_path / file, rows, command="test", extra=extra)
        return tables.render(name, tmp_path)

    rows = [Row(what=what, metric=metric, value=value, ci95=(0.5, 0.9), n=700)
            for what in ("model", "pooled", "model/coins")
            for metric, value in (("ma_4", 0.81234), ("sp_4", 0.75))]
    text = made("binding", "party_binding.json", rows, pooled=["coins"], games=["coins"])
    assert text.count("0.812 (0.50 to 0.90)") == 3 and "| coins |" in text and "700" in text
    rows = [Row(what=f"coins/{team}", metric=f"{place}_return", value=value, sd=1.0, n=20,
                ci95=(1.0, 9.0)) for team, value in (("dream", 8.0), ("real", 9.0), ("random", 0.2))
            for place in ("real", "dream")]
    rows.append(Row(what="coins/dream", metric="gain_share", value=0.886, ci95=(0.7, 1.0)))
    text = made("party_transfer", "party_transfer.json", rows)
    assert text.count("| coins |") == 3 and "0.886 (0.70 to 1.00)" in text
    assert "8.0 ± 1.0 (1.0 to 9.0; 20)" in text
    rows = [Row(what="nano", metric="seven_over_two_players", value=1.0432),
            Row(what="nano", metric="real_joint_steps_per_s", value=1234.5)]
    text = made("party_bench", "party_bench.json", rows)
    assert "| 1.04 |" in text and "| 1,234 |" in text


def test_unknown_table(tmp_path):
    with pytest.raises(ConfigError, match="unknown table"):
        tables.render("nonsense", tmp_path)
