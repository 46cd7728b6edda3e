"""worldgym report: the page holds the numbers of the JSON; what is broken is refused by name."""

import base64
import json
import shutil

import imageio_ffmpeg
import pytest

import tests.agent_toys as toys
from tests.known_world import known_task, record
from tests.report_tools import Page, by_hand
from worldgym.agents import cli
from worldgym.agents.diagnose import diagnose
from worldgym.agents.diagnose_plots import plot
from worldgym.agents.evaluate import evaluate
from worldgym.agents.report import write_report
from worldgym.agents.report_films import disagreements
from worldgym.agents.report_words import told_apart, verdict
from worldgym.errors import CheckpointError, DatasetError

NASTY = "</script><img src=x onerror=alert(1)>&\"'{{ 1 }}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toys.tiny_folder(tmp_path_factory.mktemp("tiny") / "world")


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    cast = {NASTY: "random", "lazy": "noop", "sweep": "sweep:5"}
    return evaluate(world, cast, episodes=4, real=True, slots=20, progress=False,
                    out=tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def told(found, tmp_path_factory):
    """A diagnosis that says it is of the evaluated world."""
    out = tmp_path_factory.mktemp("diagnosis")
    store = record(out / "walks", episodes=8)
    made = diagnose(known_task(), store, steps=6, clips=6, forks=2, window=2, hold=1)
    made.settings["fingerprint"] = json.loads(
        (found.folder / "settings.json").read_text())["fingerprint"]
    made.write(out / "diagnosis.json")
    plot(made, out)
    return out


@pytest.fixture(scope="module")
def page(found, told):
    return Page(write_report(found.folder / "report.html", evaluation=found.folder,
                             diagnosis=told))


def content(folder, name="evaluation.json"):
    return json.loads((folder / name).read_text())


def changed(folder, to, name="evaluation.json", **changes):
    """A copy of a folder in which one file has other entries."""
    shutil.copytree(folder, to)
    (to / name).write_text(json.dumps(content(folder, name) | changes))
    return to


def test_the_page_holds_all_numbers_of_the_json(page, found, told):
    data = content(found.folder)
    assert page.data["evaluation"] == data
    assert page.data["diagnosis"] == content(told, "diagnosis.json")
    link = next(a for a in page.addresses if a.startswith("data:application/json"))
    assert json.loads(base64.b64decode(link.split(",")[1])) == page.data
    rows = {row[0][0]: [value for _, value in row] for row in page.rows("policies")}
    assert list(rows) == [p["name"] for p in sorted(data["policies"],
                                                    key=lambda p: -p["real"]["mean"])]
    for policy in data["policies"]:
        row = rows[policy["name"]]
        for first, place in ((2, "dream"), (7, "real")):
            at = policy[place]
            assert [float(v) for v in row[first:first + 5]] == [
                at["mean"], at["ci95"][0], at["sd"], at["n"], at["truncated"] / at["n"]]
        assert [float(v) for v in row[12:]] == [policy["optimism"]["value"],
                                                policy["optimism"]["ci95"][0]]
    assert [[c[0] for c in row[:2]] for row in page.rows("pairs")] == [
        [p["first"], p["second"]] for p in data["pairs"]]
    assert [float(row[3][1]) for row in page.rows("pairs")] == [
        p["difference"] for p in data["pairs"]]
    assert [row[1][1] and float(row[1][1]) for row in page.rows("agreement")] == [
        figure and figure["value"] for figure in data["agreement"].values()]
    assert [float(row[0][1]) for row in page.rows("drift")] == [a["step"] for a in data["drift"]]


def test_the_diagnosis_is_told(page, told):
    by_step = content(told, "diagnosis.json")["diagnosis"]["by_step"]
    rows = page.rows("frames")
    assert [int(row[0][1]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(row[2][1]) for row in rows] == by_step["psnr"]
    assert [float(row[6][1]) for row in rows] == by_step["ssim_copy"]
    for name in ("rewards", "ends", "reliability", "uncertainty", "actions", "idling"):
        assert page.rows(name), name
    assert "PSNR" in page.texts["verdict"] and "forks differ" in page.texts["verdict"]


def test_nothing_is_loaded_and_names_stay_names(page):
    assert all(a.startswith("data:") for a in page.addresses)
    pictures = [a for a in page.addresses if a.startswith("data:image/png")]
    assert len(pictures) == page.tags.count("img") == 6
    assert page.tags.count("script") == 2 and "iframe" not in page.tags
    assert any(row[0][0] == NASTY for row in page.rows("policies"))
    said = " ".join(page.texts[k] for k in ("verdict", "notes", "films", "diagnosis"))
    for word in ("nan", "None", "True", "False"):
        assert word not in said.split()


def test_films_are_the_end_of_evaluated_episodes(page, found, world, tmp_path):
    from worldgym.envs.tasks import load_task

    shots = page.data["films"]
    films = [a for a in page.addresses if a.startswith("data:video/mp4")]
    assert [s["kind"] for s in shots] == ["most"] * 2 + ["least"] * 2 and len(films) == 4
    spec = load_task(world).world.spec
    keep = int(6 * spec.fps)
    for shot, film in zip(shots, films, strict=True):
        played = found.played[shot["policy"]]["real"]
        length = int(played.lengths[shot["episode"]])
        assert shot["seed"] == played.seeds[shot["episode"]]
        frames = min(length + 1, keep)
        assert shot["steps"] == shot["real_return"] == frames - min(spec.context_frames, frames - 1)
        assert shot["real_ended"] != played.truncated[shot["episode"]]
        assert shot["policy"] in page.texts["films"]
        path = tmp_path / "film.mp4"
        path.write_bytes(base64.b64decode(film.split(",")[1]))
        count, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
        assert count == frames and seconds <= 6.1
    gaps = [abs(s["real_return"] - s["dream_return"]) for s in shots]
    assert min(gaps[:2]) >= max(gaps[2:])


def test_without_films_the_page_says_why(found, world, tmp_path):
    from worldgym.envs.tasks import load_task

    out = tmp_path / "report.html"
    page = Page(write_report(out, evaluation=found.folder, films=False))
    assert "not asked for" in page.texts["no-films"] and "video" not in page.tags
    settings = content(found.folder, "settings.json")
    other = changed(found.folder, tmp_path / "other", "settings.json", fingerprint="else")
    page = Page(write_report(out, evaluation=other))
    assert "not the world that was evaluated" in page.texts["no-films"]
    with pytest.raises(CheckpointError, match="evaluate again"):
        disagreements(content(found.folder), settings | {"fingerprint": "else"})
    swapped = [[name, source, "0123"] for name, source, _ in settings["policies"]]
    with pytest.raises(CheckpointError, match="not the policy that was evaluated"):
        disagreements(content(found.folder), settings | {"policies": swapped}, load_task(world))
    gone = changed(found.folder, tmp_path / "gone", "settings.json", world="nowhere")
    assert "unknown world" in Page(write_report(out, evaluation=gone)).texts["no-films"]
    page = Page(write_report(out, evaluation=gone, task=load_task(world)))
    assert len(page.data["films"]) == 4
    (gone / "drift.png").unlink()
    page = Page(write_report(out, evaluation=gone, films=False))
    assert "drift.png is not in the folder" in out.read_text() and page.tags.count("img") == 1


def test_the_commands(world, tmp_path, capsys):
    folder = tmp_path / "made"
    assert cli.main(["evaluate", "--world", str(world), "--policy", "random", "noop",
                     "--episodes", "2", "--out", str(folder)]) == 0
    page = Page(folder / "report.html")
    assert "real game was not played" in page.texts["verdict"]
    assert "real game was not played" in page.texts["no-films"]
    assert set(page.tables) == {"policies", "pairs"} and "img" not in page.tags
    out = tmp_path / "deep" / "page.html"
    assert cli.main(["report", "--evaluation", str(folder), "--out", str(out),
                     "--no-videos"]) == 0
    assert str(out) in capsys.readouterr().out and Page(out).data["films"] == []
    assert cli.main(["report", "--evaluation", str(tmp_path)]) == 2
    assert "DatasetError: no evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("text", [
    "", "{", "[1]", "{}", '{"rows": []}', '"evaluation"', '{"episodes": NaN}', "\udcff"])
def test_a_file_that_is_no_evaluation_is_named(tmp_path, text):
    (tmp_path / "evaluation.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match="evaluation.json.*Fix: run worldgym evaluate"):
        write_report(tmp_path / "report.html", evaluation=tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"policies": []}, "policies: none"), ({"episodes": "12"}, "episodes: no whole number"),
    ({"episodes": True}, "episodes: no whole number"), ({"notes": None}, "notes: no list"),
    ({"about": {"command": "x"}}, "about: without commit"),
    ({"pairs": [{"first": "a"}]}, "pairs.0: without second"),
    ({"agreement": {}}, "agreement: without pearson_r"), ({"drift": None}, "drift: no list")])
def test_another_format_is_named_with_its_place(found, tmp_path, change, words):
    folder = changed(found.folder, tmp_path / "copy", **change)
    with pytest.raises(DatasetError, match=f"another format.*{words}"):
        write_report(tmp_path / "report.html", evaluation=folder)


def test_a_diagnosis_that_does_not_belong_is_named(found, told, tmp_path):
    out, given = tmp_path / "report.html", {"evaluation": found.folder, "films": False}
    with pytest.raises(DatasetError, match="no diagnosis.*worldgym diagnose"):
        write_report(out, diagnosis=tmp_path, **given)
    data = content(told, "diagnosis.json")["diagnosis"]
    for change, words in (
            ({"settings": data["settings"] | {"fingerprint": "else"}}, "another world.*else"),
            ({"by_step": data["by_step"] | {"psnr": [1.0]}}, "different lengths"),
            ({"by_step": {}}, "by_step: without n"),
            ({"response": {"pairs": [{"actions": [1]}]}}, "pairs.0: without action_distance"),
            ({"response": {"pairs": [data["response"]["pairs"][0] | {"actions": [1]}]}},
             "1 values for 2")):
        (tmp_path / "diagnosis.json").write_text(json.dumps(
            content(told, "diagnosis.json") | {"diagnosis": data | change}))
        with pytest.raises(DatasetError, match=words):
            write_report(out, diagnosis=tmp_path, **given)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(found.folder / "evaluation.json", bare)
    with pytest.raises(DatasetError, match="no settings of the evaluation"):
        write_report(out, evaluation=bare, diagnosis=told)
    assert not out.exists()


def said(*args, **changes):
    return " ".join(verdict(by_hand(*args, **changes)))


def test_the_verdict_says_what_the_numbers_carry():
    means = {"good": (70.0, 90.0), "poor": (80.0, 40.0)}
    sure = said(means, {("good", "poor"): [30.0, 60.0]})
    assert "In the real game good is the best of 2 policies" in sure and "beyond chance" in sure
    assert "90.0 tics (95% interval 89.0 to 91.0, n = 20)" in sure
    assert "The dream puts poor first, which is number 2 in the real game." in sure
    assert "Pearson's r is 0.500 (95% interval 0.100 to 0.900)" in sure
    assert "Kendall's tau is undefined" in sure and "orders 0 of 1 pairs" in sure
    assert "10.0 tics more than the real game" in sure and "may be chance" in sure
    assert "from -20.0 (good) to +40.0 (poor)" in sure
    for interval in ([-1.0, 60.0], [50.0, 50.0], None):
        unsure = said(means, {("good", "poor"): interval})
        assert "do not tell it apart from poor" in unsure and "best" not in unsure
    assert "puts the same policy first" in said({"a": (3.0, 2.0), "b": (1.0, 1.0)})
    assert "shared by a, b" in said({"a": (3.0, 2.0), "b": (3.0, 1.0)})
    assert "pays as much as" in said({"a": (2.0, 2.0), "b": (1.0, 1.0)})


def test_the_verdict_without_a_real_game_or_rivals():
    dream = said({"a": (1.0, None), "b": (2.0, None)}, sequential={
        "looks": [5, 20], "stopped_at": 5, "pairs_separated": 1, "pairs": 1})
    assert "In the dream b has the highest mean" in dream
    assert "nothing here says how far to believe the dream" in dream and "Pearson" not in dream
    assert "told 1 of 1 pairs apart in the dream after 5 of at most 20 episodes" in dream
    assert "nothing to compare it with" in said({"a": (1.0, 2.0)})


def test_told_apart():
    assert told_apart({"separated": None, "ci95": [-2.0, -1.0]}) is True
    assert told_apart({"separated": None, "ci95": [-2.0, 1.0]}) is False
    assert told_apart({"separated": False, "ci95": [1.0, 2.0]}) is False
    assert told_apart({"separated": None, "ci95": None}) is None
    assert told_apart({"separated": None, "ci95": [3.0, 3.0]}) is None


def test_undefined_values_are_called_undefined(tmp_path):
    data = by_hand({"a": (1.0, 2.0), "b": (2.0, 1.0)})
    (tmp_path / "evaluation.json").write_text(json.dumps(data))
    page = Page(write_report(tmp_path / "report.html", evaluation=tmp_path))
    cells = {row[0][0]: row[1] for row in page.rows("agreement")}
    assert cells["Kendall's tau"] == ["undefined", None] and cells["Pearson's r"][0] == "0.500"
    assert page.rows("drift")[0][5] == ["undefined", None]  # nothing is divided by zero
    assert [row[7][0] for row in page.rows("pairs")] == ["undefined"] * 2
    assert "no settings" in page.texts["no-films"]
