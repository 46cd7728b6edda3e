"""A report in headless Chromium: offline, from disk, without an error; numbers, sorting, films."""

import json
import os
import shutil

import pytest

import tests.agent_toys as toys
from worldgym.agents.evaluate import evaluate
from worldgym.agents.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine "
                                "(Debian: apt install chromium)")
CELLS = """rows => rows.map(row => [...row.cells].map(
    cell => ({text: cell.innerText, value: cell.dataset.value ?? null})))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    world = toys.tiny_folder(tmp_path_factory.mktemp("tiny") / "world")
    out = tmp_path_factory.mktemp("evaluation")
    evaluate(world, {"<i>random</i>": "random", "lazy": "noop", "sweep": "sweep:5"}, episodes=3,
             real=True, out=out, progress=False)
    write_report(out / "report.html", evaluation=out)
    return out


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        found = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] * (
            os.getuid() == 0))
        yield found
        found.close()


@pytest.fixture
def page(browser, folder):
    """The loaded page; when a test is over nothing was fetched and nothing went wrong."""
    with browser.new_context(offline=True, viewport={"width": 360, "height": 740}) as context:
        shown, asked, wrong = context.new_page(), [], []
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("console", lambda said: wrong.append(said.text) if said.type in (
            "error", "warning") else None)
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        address = (folder / "report.html").as_uri()
        shown.goto(address)
        yield shown
        assert address in asked and not wrong
        assert all(url == address or url.startswith("data:") for url in asked)


def cells(page, name):
    return page.eval_on_selector_all(f"#{name} tbody tr", CELLS)


def test_the_rendered_numbers_are_those_of_the_json(page, folder):
    data = json.loads((folder / "evaluation.json").read_text())
    assert json.loads(page.inner_text("#data"))["evaluation"] == data
    assert data["world"] == page.inner_text("h1")
    shown = {row[0]["text"]: row for row in cells(page, "policies")}
    assert set(shown) == {"<i>random</i>", "lazy", "sweep"}
    for policy in data["policies"]:
        row = shown[policy["name"]]
        for column, value in ((2, policy["dream"]["mean"]), (7, policy["real"]["mean"]),
                              (12, policy["optimism"]["value"])):
            assert float(row[column]["value"]) == value
            assert float(row[column]["text"]) == pytest.approx(value, rel=0.006, abs=0.001)
    best = max(data["policies"], key=lambda p: p["real"]["mean"])
    assert f"real game {best['name']} " in page.inner_text("#verdict")
    assert page.locator("i").count() == 0  # a name is text, never markup


def test_tables_sort_both_ways(page):
    head = page.locator("#policies th", has_text="dream return").locator("button")
    values = []
    for way in ("ascending", "descending"):
        head.click()
        assert page.locator("#policies th[aria-sort]").get_attribute("aria-sort") == way
        values.append([float(row[2]["value"]) for row in cells(page, "policies")])
    assert values[0] == sorted(values[0]) and values[1] == sorted(values[1], reverse=True)
    assert len(set(values[0])) > 1
    page.locator("#pairs th button").first.click()
    first = [row[0]["text"] for row in cells(page, "pairs")]
    assert first == sorted(first) and len(set(first)) > 1


def test_what_is_undefined_sorts_last(page):
    head = page.locator("#pairs th button", has_text="episodes needed").first
    page.eval_on_selector("#pairs tbody tr td:nth-child(7)",
                          "cell => { delete cell.dataset.value; cell.innerText = 'undefined'; }")
    for _ in range(2):
        head.click()
        assert cells(page, "pairs")[-1][6]["value"] is None


def test_pictures_and_films_are_shown(page):
    loaded = page.eval_on_selector_all("img", "all => all.map(img => img.naturalWidth)")
    assert len(loaded) == 2 and min(loaded) > 100
    assert page.locator("video").count() == 4
    if not page.evaluate("document.createElement('video').canPlayType("
                         "'video/mp4; codecs=\"avc1.640028\"')"):
        pytest.skip("this Chromium was built without H.264")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState > 0)")
    seconds = page.eval_on_selector_all("video", "all => all.map(v => v.duration)")
    assert 0 < min(seconds) and max(seconds) <= 6.1


def test_the_page_fits_a_phone_and_follows_the_colour_scheme(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(21, 24, 28)"]


def test_the_numbers_can_be_downloaded(page, folder, tmp_path):
    with page.expect_download() as waiting:
        page.click("#download")
    waiting.value.save_as(tmp_path / "numbers.json")
    assert waiting.value.suggested_filename == "worldgym-report.json"
    told = json.loads((tmp_path / "numbers.json").read_text())
    assert told["evaluation"] == json.loads((folder / "evaluation.json").read_text())
