"""The live page in headless Chromium while vLLM's scheduler runs on the dry engine.

Checked by hand what axe-core checks by rule: language, title, landmarks, headings, captions, headers of rows and
columns, names of pictures, contrast in both colour schemes, order and visibility of focus, what a phone shows.
Skipped without Debian's ``chromium`` and ``chromium-driver``. ``SLOS_SERVE_PICTURES`` names a folder for screenshots.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from prometheus_client.parser import text_string_to_metric_families

from tests.browser import CHROMIUM, DRIVER, Browser
from tests.vllm.dry_load import starting
from tests.vllm.live_site import LiveSite

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="wants chromium and chromium-driver"),
    pytest.mark.long,
]

REFRESH_S = 1.0
# A refresh of the page, a round of the engine's feed, and what the two threads of this process take from each other.
WITHIN_S = REFRESH_S + 0.5 + 1.0
ROWS = """
const found = {};
for (const row of document.querySelectorAll(`#${arguments[0]} tbody tr`))
  found[row.cells[0].textContent] = [...row.cells].slice(1, 6).map((cell) => cell.textContent);
return found;
"""
# Text on the background it stands on: every pair of colours with its contrast.
CONTRAST = """
const light = (text) => {
  const parts = text.match(/[\\d.]+/g).map(Number);
  const [red, green, blue] = parts.slice(0, 3).map((each) => each / 255)
    .map((each) => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4);
  return .2126 * red + .7152 * green + .0722 * blue;
};
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const found = {};
for (const node of document.querySelectorAll("body *")) {
  const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!says || ["SCRIPT", "STYLE"].includes(node.tagName) || !node.checkVisibility()) continue;
  const pair = [getComputedStyle(node).color, behind(node)], lights = pair.map(light).sort((one, two) => two - one);
  found[`${node.tagName} ${pair.join(" on ")}`] = (lights[0] + .05) / (lights[1] + .05);
}
return found;
"""
STRUCTURE = """
const all = (what) => [...document.querySelectorAll(what)];
return {
  lang: document.documentElement.lang, title: document.title, h1: all("h1").length,
  landmarks: ["header", "main", "footer"].filter((name) => all(name).length !== 1),
  unnamed: all("section, [role=group]").filter((each) => {
    const by = each.getAttribute("aria-labelledby");
    return by ? !document.getElementById(by)?.textContent.trim() : !each.getAttribute("aria-label");
  }).length,
  alike: all("section").map((each) => each.getAttribute("aria-labelledby"))
    .filter((by, at, names) => names.indexOf(by) !== at),
  uncaptioned: all("table").filter((each) => !each.caption?.textContent.trim()).length,
  columns: all("thead th").filter((each) => each.scope !== "col").length,
  rows: all("#classes tbody tr, #streams tbody tr").filter((each) => each.cells[0].scope !== "row").length,
  pictures: all("svg[role=img]").filter((each) => !each.getAttribute("aria-label")).length,
  loose: all("svg:not([role=img]):not([aria-hidden=true])").length,
  levels: all("h1, h2, h3").map((each) => Number(each.tagName[1])),
  twice: all("[id]").map((each) => each.id).filter((id, at, ids) => ids.indexOf(id) !== at),
  elsewhere: performance.getEntriesByType("resource").map((each) => each.name)
    .filter((each) => !each.startsWith(location.origin)),
};
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveSite]:
    with pytest.MonkeyPatch.context() as patch:
        engines = starting(tmp_path_factory.mktemp("site"), patch)
        running = LiveSite(next(engines), patch)
        with running.running():
            yield running
        next(engines, None)


@pytest.fixture(scope="module")
def page(site: LiveSite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        browser.resize(1280, 1500)
        browser.open(f"{site.url}/slo")
        until(lambda: browser.run(ROWS, "streams"), 30.0)
        yield browser


def until(true: Callable[[], Any], seconds: float) -> Any:
    """What ``true`` returns once it is anything."""
    until_s = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until_s, "nothing came"
        time.sleep(0.1)
    return found


def promised(page: Browser) -> dict[str, tuple[int, int]]:
    """Promised and kept by class, as the page has it."""
    return {name: (int(cells[0]), int(cells[1])) for name, cells in page.run(ROWS, "classes").items()}


def counted(site: LiveSite) -> dict[str, tuple[int, int]]:
    """The same on ``/metrics``."""
    found: dict[str, dict[str, int]] = {"requests": {}, "attained": {}}
    for family in text_string_to_metric_families(httpx.get(f"{site.url}/metrics").text):
        kind = family.name.removeprefix("slos_serve:")
        for sample in family.samples:
            if kind in found and sample.name.endswith("_total") and sample.labels["verdict"] == "admitted":
                found[kind][sample.labels["slo_class"]] = int(sample.value)
    return {name: (number, found["attained"].get(name, 0)) for name, number in found["requests"].items()}


def test_numbers_move_and_agree_with_the_metrics_within_a_refresh(site: LiveSite, page: Browser) -> None:
    first = until(lambda: {name: each for name, each in promised(page).items() if each[0]}, 60.0)
    compared = 0
    for _ in range(4):
        before, metrics = promised(page), counted(site)
        time.sleep(WITHIN_S)
        after = promised(page)
        for name, (given, kept) in before.items():
            assert given <= metrics[name][0] <= after[name][0], name
            assert kept <= metrics[name][1] <= after[name][1], name
            compared += metrics[name][0] > 0
    assert compared >= 8
    assert any(promised(page)[name][0] > number for name, (number, _) in first.items()), "the numbers moved"


def test_when_nothing_ends_any_more_the_numbers_are_those_of_the_metrics(site: LiveSite, page: Browser) -> None:
    site.arrive.clear()
    until(lambda: not site.engine.scheduler.has_unfinished_requests(), 60.0)
    time.sleep(WITHIN_S)
    assert {name: each for name, each in counted(site).items() if name in promised(page)} == promised(page)
    assert page.run("return document.getElementById('running').textContent") == "0"
    site.arrive.set()
    until(lambda: page.run(ROWS, "streams"), 30.0)


def test_steps_streams_and_verdicts_are_shown(page: Browser) -> None:
    steps = page.run("return [...document.querySelectorAll('#steps tbody tr')].map((row) => row.cells[1].textContent)")
    assert len(steps) >= 20 and any(int(tokens) > 0 for tokens in steps)
    assert page.run("return document.querySelectorAll('#composition rect').length") >= 4 * 20
    assert len(page.run("return document.querySelector('#times path').getAttribute('d')")) > 100
    assert 0.3 < float(page.run("return document.getElementById('ratio').textContent")) < 3.0
    told = "return [...document.querySelectorAll('#verdicts tbody tr')].map((row) => row.cells[5].textContent)"
    verdicts = until(lambda: page.run(told), 10.0)
    assert all(": " in text for text in verdicts)
    assert page.run("return document.getElementById('status').textContent") == "Live"
    assert {"cmpl-", "prompt_token_ids"}.isdisjoint(page.run("return document.body.textContent").split())


def test_structure_for_screen_readers(page: Browser) -> None:
    found = page.run(STRUCTURE)
    assert (found.pop("lang"), found.pop("title"), found.pop("h1")) == ("en", "SLOs-Serve live", 1)
    levels = found.pop("levels")
    assert all(after - before <= 1 for before, after in pairwise(levels)), "no level is left out"
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Browser, scheme: str) -> None:
    page.prefer(prefers_color_scheme=scheme)
    try:
        found = page.run(CONTRAST)
        dark = page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(17, 22, 27)"
    finally:
        page.prefer()
    assert dark is (scheme == "dark")
    assert len(found) > 8
    assert {pair: ratio for pair, ratio in found.items() if ratio < 4.5} == {}


def test_by_keyboard_alone(page: Browser) -> None:
    page.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    names = []
    for _ in range(6):
        page.press("Tab")
        outline, width, name = page.run(
            "const at = document.activeElement, seen = getComputedStyle(at);"
            "return [seen.outlineStyle, seen.outlineWidth, at.id || at.className || at.tagName]"
        )
        names.append(name)
        assert outline != "none" and float(width.removesuffix("px")) >= 2, name
    assert names == ["skip", "pause", "wide", "SUMMARY", "wide", "wide"]
    page.run("document.getElementById('pause').focus()")
    page.press("Space")
    assert page.run("return document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    before = page.run("return document.getElementById('steps-note').textContent")
    time.sleep(2 * REFRESH_S)
    assert page.run("return document.getElementById('steps-note').textContent") == before, "paused"
    page.press("Enter")
    until(lambda: page.run("return document.getElementById('status').textContent") == "Live", 5.0)


def test_on_a_phone_and_on_a_desk(page: Browser, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SLOS_SERVE_PICTURES", tmp_path))
    for width, height in ((390, 844), (1280, 1500)):
        page.resize(width, height)
        page.run("window.scrollTo(0, 0); document.activeElement.blur()")
        time.sleep(2 * REFRESH_S)
        assert page.run("return document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
        assert page.run("return document.getElementById('pause').getBoundingClientRect().height") >= 32
        page.picture(folder / f"live-{width}.png")
        assert (folder / f"live-{width}.png").stat().st_size > 10_000


def test_reduced_motion_and_a_quiet_console(page: Browser) -> None:
    page.prefer(prefers_reduced_motion="reduce")
    moving = page.run(
        "return [...document.querySelectorAll('*')].map((each) => getComputedStyle(each))"
        ".filter((seen) => seen.transitionDuration !== '0s' || seen.animationName !== 'none').length"
    )
    page.prefer()
    assert moving == 0
    assert page.log() == []
