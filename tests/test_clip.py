"""``worldgym clip`` on a tiny folder: films, rules, rounding, resuming."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
for package in ("diffusers", "transformers", "sentencepiece", "ftfy", "pyarrow", "PIL",
                "imageio_ffmpeg"):
    pytest.importorskip(package)

import scope_folder as layout  # noqa: E402
from test_gamepad import columns, write  # noqa: E402

from worldgym.agents import cli, clip  # noqa: E402
from worldgym.models.scope import ScopeDiT  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return layout.write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in ("b", "a"):
        picture = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{name}.png")
    write(tmp_path / "rows.parquet", columns(9))
    return tmp_path


def command(model, place, *more, image="images/a.png", actions="rows.parquet"):
    return ["clip", "--model", str(model), "--image", str(place / image), "--actions",
            str(place / actions), "--prompt", "the quick fox", "--out", str(place / "out"),
            "--height", "32", "--width", "64", "--steps", "2", "--device", "cpu", *more]


def frames_of(path):
    import imageio.v2

    return [np.asarray(f) for f in imageio.v2.get_reader(path)]


def test_a_folder_of_images_and_again(model, place, capsys):
    argv = command(model, place, image="images")
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert "step 2 of 2" in first
    for name in ("a", "b"):
        film = frames_of(place / "out" / f"{name}.mp4")
        assert len(film) == 9 and film[0].shape == (32, 64, 3)
        told = json.loads((place / "out" / f"{name}.json").read_text())
        assert told["frames"] == 9 and told["guidance"] == 5.0
    assert sorted(p.name for p in (place / "out").iterdir()) == [
        "a.json", "a.mp4", "b.json", "b.mp4"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert cli.main([*argv, "--seed", "1"]) == 0
    assert "step 1 of 2" in capsys.readouterr().out


def test_a_film_of_other_weights_is_made_anew(model, place, capsys, tmp_path_factory):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model, other)
    assert cli.main([*command(model, place), "--steps", "1"]) == 0
    for shard in other.glob("model-*"):
        save_file({k: -v.clone() for k, v in load_file(shard).items()}, shard)
    capsys.readouterr()
    assert cli.main([*command(other, place), "--steps", "1"]) == 0
    assert "step 1 of 1" in capsys.readouterr().out


def test_an_interrupted_clip_goes_on(model, place, capsys, monkeypatch):
    argv = command(model, place, "--steps", "3", "--dtype", "float32")
    finals = []
    old = clip.to_uint8
    monkeypatch.setattr(clip, "to_uint8", lambda x: finals.append(old(x)) or finals[-1])
    assert cli.main([*argv[:-2], "--dtype", "float32", "--out", str(place / "whole")]) == 0
    calls, forward = [], ScopeDiT.forward

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ScopeDiT, "forward", failing)
    assert cli.main(argv) == 130
    assert (place / "out" / ".a.part.safetensors").is_file()
    capsys.readouterr()
    assert cli.main([*argv, "--seed", "5"]) == 0
    assert "starting anew" in capsys.readouterr().out
    calls.clear()
    (place / "out" / "a.mp4").unlink()
    assert cli.main(argv) == 130
    (place / "out" / "..a.part.safetensors.77.tmp").touch()  # of a run killed while it wrote
    assert cli.main(argv) == 0
    assert sorted(p.name for p in (place / "out").iterdir()) == ["a.json", "a.mp4"]
    out = capsys.readouterr().out
    assert "going on after step 1" in out and len(calls) == 8  # 3 done, 1 failed, then 4 more
    assert np.array_equal(finals[0], finals[-1])


def test_switches(model, place, monkeypatch):
    """Offload changes places only; one batch for both passes changes last bits; unipc the film."""
    seen, old = [], clip.make_latents
    monkeypatch.setattr(clip, "make_latents", lambda *a, **k: seen.append(old(*a, **k)) or seen[-1])
    for more in ([], ["--offload"], ["--together"], ["--solver", "unipc"]):
        (place / "out" / "a.json").unlink(missing_ok=True)
        assert cli.main([*command(model, place), "--dtype", "float32", *more]) == 0
    plain, offloaded, together, unipc = seen
    assert (offloaded == plain).all() and abs(together - plain).max() < 1e-4
    assert abs(unipc - plain).max() > 1e-4
    assert json.loads((place / "out" / "a.json").read_text())["solver"] == "unipc"


@pytest.mark.parametrize("more,words", [
    (["--solver", "heun"], "unknown solver"), (["--frames", "8"], "use 5 or 9"),
    (["--height", "40"], "use 64 x 64"),
    (["--frames", "13"], "differ in length"), (["--steps", "0"], "number of steps"),
    (["--dtype", "int8"], "unknown precision"), (["--model", "/nowhere"], "not a SCOPE folder")])
def test_mistakes_are_told_before_anything_is_loaded(model, place, capsys, more, words):
    assert cli.main([*command(model, place), *more]) == 2
    assert words in capsys.readouterr().err and not (place / "out").exists()


def test_mistakes_in_files_are_told_before_anything_is_loaded(model, place, capsys):
    """Of every file of a folder, not only of the first."""
    def told(words, **where):
        assert cli.main(command(model, place, **where)) == 2
        assert words in capsys.readouterr().err and not (place / "out").exists()

    data = columns(9)
    del data["south"]
    write(place / "wrong.parquet", data)
    told("lacks columns", actions="wrong.parquet")
    write(place / "wide.parquet", {**columns(9), "j_left": [[0.0] * 3] * 9})
    told("wrong width", actions="wide.parquet")
    write(place / "far.parquet", {**columns(9), "j_right": [[0.0, 2.0]] * 9})
    told("outside its range", actions="far.parquet")
    (place / "rows").mkdir()
    write(place / "rows" / "a.parquet", columns(9))
    told("b.parquet", image="images", actions="rows")
    (place / "images" / "b.png").write_bytes(b"no picture")
    told("cannot be read", image="images")


def test_rounding_is_asked_for(model, place):
    from PIL import Image

    assert cli.main([*command(model, place), "--frames", "8", "--height", "20", "--round"]) == 0
    film = frames_of(place / "out" / "a.mp4")
    assert len(film) == 5 and film[0].shape == (32, 64, 3)
    assert Image.open(place / "images" / "a.png").size == (70, 50)


def test_jobs(place):
    rows = place / "rows"
    rows.mkdir()
    for name in ("a", "b"):
        write(rows / f"{name}.parquet", columns(5))
    made = clip.jobs(place / "images", rows, place / "out")
    assert [(j.image.name, j.actions.name, j.out.name) for j in made] == [
        ("a.png", "a.parquet", "a.mp4"), ("b.png", "b.parquet", "b.mp4")]
    assert clip.jobs(place / "images" / "b.png", rows, place / "x.mp4")[0].out.name == "x.mp4"
    for wrong in ((place / "images", rows, place / "x.mp4"), (place / "no", rows, place),
                  (rows, rows, place)):
        with pytest.raises(ValueError):
            clip.jobs(*wrong)
    (place / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        clip.read_picture(place / "images" / "a.png")
