"""The page in a real browser: no errors, no request, every picture shown, readable light and dark and on a phone.

Skipped where no Chromium is installed (`apt install chromium` on Debian).
"""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from PIL import Image
from test_report import add_evaluation, make_run, write_finetuning

from pretrain.report.figures import summary
from pretrain.report.page import html, markdown, write_report
from pretrain.report.runs import MAX_WRONG, read_runs

SCRIPT = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>\"'><svg onload=window.hurt=1>"
PHONE, DESK = 390, 1280  # pixels
IN_BATCH = 5


def png(size: int = 48) -> bytes:
    """A picture of noise."""
    file = io.BytesIO()
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
    return file.getvalue()


def add_everything(run: Path, word: str = "plain") -> None:
    """Gives a run each part a report can have; `word` stands wherever someone could have written something."""
    add_evaluation(run)
    write_finetuning(run, "imagenet", 0.5)
    write_finetuning(run, "vtab/svhn", 0.5)
    write_finetuning(run, "vtab/long_name_of_a_task_of_the_structured_group", 0.25)
    write_finetuning(run, "other", 0.25)
    results = run / "finetune" / "other" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "task": word, "metric": word}))
    (run / "pictures").mkdir()
    (run / "pictures" / "internals.png").write_bytes(png(500))
    (run / "batch.png").write_bytes(png())
    tiles = [{"x": 4 * number, "y": 2, "caption": word} for number in range(IN_BATCH)]
    (run / "batch.json").write_text(json.dumps({"side": 24, "images": tiles}))
    item = {"name": word, "label": word, "predicted": word, "probability": 0.9}
    items = [{**item, "png_base64": base64.b64encode(png()).decode()}] * (MAX_WRONG + 5)
    of = {"data": word, "data_sha256": word, "weights_sha256": word}
    (run / "evaluation" / "wrong.json").write_text(json.dumps({**of, "items": items}))
    (run / "bad_samples.jsonl").write_text(json.dumps({"step": 3, "reason": word}) + "\n")
    start = {"step": 0, "time": word, "world_size": 2, "commit": word, "command": [word], "versions": {word: word}}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, f"val/{word}-shot": 0.5, f"val/{word}10-shot": 0.5}) + "\n")
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"\n# </pre></details>{word}\n")


def opened(browser: Browser, page: Path, **view: Any) -> None:
    """Opens the page and checks that nothing went wrong and nothing was asked of anyone."""
    browser.open(page, **view)
    assert browser.evaluate("document.readyState") == "complete"
    wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in browser.events if event["method"] in wrong]
    sent = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert sent and not [url for url in sent if url != page.as_uri() and not url.startswith("data:")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs with all parts, and of one with none."""
    folder = tmp_path_factory.mktemp("report")
    names = ["first", "a_run_with_a_rather_long_name_" * 3, "bare"]
    runs = [make_run(folder, name, points=points) for name, points in zip(names, (300, 40, 2))]
    for run in runs[:2]:
        add_everything(run)
    return write_report(read_runs(runs), folder / "out")[0]


IMAGES = "[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width])"
BOXES = """[...document.querySelectorAll(".scroll")].map(
  b => [b.scrollWidth, b.clientWidth, b.getBoundingClientRect().right])"""
# How far the texts of diagrams stick out of these, where they are cut.
CUT = """Math.max(...[...document.querySelectorAll(".panel text, .chart text")].map(t => {
  const [text, svg] = [t, t.closest("svg")].map(e => e.getBoundingClientRect());
  return Math.max(svg.left - text.left, text.right - svg.right);
}))"""
TEXT_HEIGHT = "Math.min(...[...document.querySelectorAll('.panel text')].map(t => t.getBoundingClientRect().height))"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_is_shown_whole(browser: Browser, page: Path, width: int, scheme: str) -> None:
    """Every picture has pixels, a batch of two runs is there once; nothing is wider than the screen, and wide tables
    scroll in boxes of their own."""
    opened(browser, page, width=width, scheme=scheme)
    sizes = browser.evaluate(IMAGES)
    assert len(sizes) == IN_BATCH + 2 * (1 + MAX_WRONG) and all(natural > 0 and shown > 0 for natural, shown in sizes)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser.evaluate(BOXES)
    assert all(right <= width for *_, right in boxes)
    assert width == DESK or sum(inside > outside for inside, outside, _ in boxes) >= 3
    assert browser.evaluate(TEXT_HEIGHT) >= 10 and browser.evaluate(CUT) <= 0


FIRST = """(() => {
  const bottom = selector => document.querySelector(selector).getBoundingClientRect().bottom;
  const label = document.querySelector(".first svg").getAttribute("aria-label");
  return [bottom(".first .state"), bottom(".first svg"), label];
})()"""


@pytest.mark.parametrize(("width", "height"), [(PHONE, 844), (DESK, 900)])
@pytest.mark.parametrize("few_shot", [True, False])
def test_the_first_screen_has_a_sentence_and_a_chart(
    browser: Browser, tmp_path: Path, width: int, height: int, few_shot: bool
) -> None:
    """What was trained and the result, and a chart of it, before anyone scrolls."""
    run = make_run(tmp_path)
    add_evaluation(run)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    kinds = ("trained", "random weights", "raw pixels") if few_shot else ("trained",)
    results["rows"] += [{"model": kind, "metric": "5-shot", "value": 0.5, "n": 101} for kind in kinds]
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    path = tmp_path / "page.html"
    path.write_text(html_of(run))
    opened(browser, path, width=width, height=height)
    sentence_ends, chart_ends, chart = browser.evaluate(FIRST)
    assert 0 < sentence_ends < chart_ends < height or width == DESK and 0 < max(sentence_ends, chart_ends) < height
    assert ("few-shot" in chart) == few_shot
    assert "ViT of width 32" in browser.evaluate("document.querySelector('.first').textContent")


CONTRAST = r"""
(() => {
  const rgb = text => {
    const parts = text.match(/[\d.]+/g).map(Number);
    return parts.length > 3 && parts[3] === 0 ? null : parts.slice(0, 3);
  };
  const light = color => color.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    const color = rgb(getComputedStyle(e).backgroundColor);
    return color || ground(e.parentElement);
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const lowest = (selector, property) => Math.min(...[...document.querySelectorAll(selector)].map(
    e => ratio(rgb(getComputedStyle(e)[property]), ground(e))));
  return {
    text: lowest("h1, h2, h3, p, b, td, th, dt, dd, a, code, pre, summary, figcaption, li", "color"),
    labels: lowest("svg text", "fill"),
    curves: lowest(".panel path.curve, .chart path.curve", "stroke"),
    page: light(ground(document.body)),
  };
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(browser: Browser, page: Path, scheme: str) -> None:
    """The page is light or dark as asked; text has the contrast of WCAG AA (4.5), curves that of graphics (3)."""
    opened(browser, page, width=DESK, scheme=scheme)
    found = browser.evaluate(CONTRAST)
    assert (found["page"] > 0.9) if scheme == "light" else (found["page"] < 0.1), found
    assert found["text"] >= 4.5 and found["labels"] >= 4.5 and found["curves"] >= 3, found


COLORS = """(() => {
  const pairs = (selector, name, property, part = e => e) => [...document.querySelectorAll(selector)].map(
    e => [name(e).trim().split(",")[0], getComputedStyle(part(e))[property]]);
  const swatch = e => e.querySelector(".swatch");
  return [
    ...pairs(".legend li:not(.kind)", e => e.textContent, "borderTopColor", swatch),
    ...pairs(".card", e => e.querySelector("h2").textContent, "borderLeftColor"),
    ...pairs("th:has(.swatch)", e => e.textContent, "borderTopColor", swatch),
    ...pairs(".panel path:has(title)", e => e.textContent, "stroke"),
    ...pairs(".panel circle", e => e.textContent, "stroke"),
  ];
})()"""


def test_a_run_has_one_colour_everywhere(browser: Browser, page: Path) -> None:
    """In the legend, its card, its rows, and by the names that curves and dots tell; another run has another one."""
    opened(browser, page, width=DESK)
    pairs = {tuple(pair) for pair in browser.evaluate(COLORS)}
    assert len(pairs) == len({name for name, _ in pairs}) == len({color for _, color in pairs}) == 3


def hostile_page(folder: Path) -> Path:
    """The report of runs with a script in every name; two runs of the same name are shown with their paths."""
    places = [folder / "<script>window.hurt=1<" / "script>", folder]
    runs = [make_run(place).rename(place / "<img src=x onerror=window.hurt=1>") for place in places]
    for run in runs:
        add_everything(run, SCRIPT)
    return write_report(read_runs(runs), folder / "out")[0]


def without_policy(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if "Content-Security-Policy" not in line)


def test_nothing_that_others_wrote_is_run(browser: Browser, tmp_path: Path) -> None:
    """Classes, tasks, causes, metrics, commits and runs named like scripts are text, also without the page's policy."""
    page = hostile_page(tmp_path)
    bare = page.with_name("bare.html")
    bare.write_text(without_policy(page.read_text()))
    for path in (page, bare):
        opened(browser, path, width=DESK)
        assert browser.evaluate("window.hurt") is None
        assert browser.evaluate("document.querySelectorAll('script, [onerror], [onload]').length") == 0
    shown = browser.evaluate("document.body.textContent")
    assert shown.count("<script>window.hurt = 1</script>") > 2 * MAX_WRONG
    assert "script>/<img" in shown  # the folders of the first run


def test_the_policy_stops_what_slips_through(browser: Browser, page: Path) -> None:
    """A script that got into the page all the same would do nothing; without the policy it would."""
    slipped = page.with_name("slipped.html")
    text = page.read_text().replace("<main>", "<main><script>window.hurt = 1</script>")
    for content, hurt in ((text, None), (without_policy(text), 1)):
        slipped.write_text(content)
        browser.open(slipped, width=DESK)
        assert browser.evaluate("window.hurt") == hurt


def html_of(run: Path) -> str:
    """The page alone: curves.png takes seconds."""
    runs = read_runs([run])
    return html(runs, [summary(of_run) for of_run in runs])


def test_damaged_and_foreign_pictures_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no picture is told and not shown; a path out of the run's folder is not followed."""
    run = make_run(tmp_path)
    (run / "pictures").mkdir()
    (run / "pictures" / "half.png").write_bytes(png()[:900])
    (run / "pictures" / "page.png").write_bytes(b"<svg onload=alert(1)>")
    (run / "pictures" / "whole.png").write_bytes(png())
    (tmp_path / "private.png").write_bytes(png())
    (run / "evaluation").mkdir()
    (run / "evaluation" / "inside.png").write_bytes(png())
    item = {"name": "x", "label": "a", "predicted": "b"}
    others: list[dict[str, Any]] = [{"path": "../../private.png"}, {"png_base64": "!"}, {"path": "inside.png"}, {}]
    (run / "evaluation" / "wrong.json").write_text(json.dumps({"items": [{**item, **other} for other in others]}))
    found = read_runs([run])[0]
    assert [picture.name for picture in found.pictures] == ["whole"]
    assert [wrong.picture is not None for wrong in found.wrong.shown] == [False, False, True, False]
    told = capsys.readouterr().err
    for reason in ("half.png: not a picture", "page.png: not a picture", "no file ../../private.png", "not base64"):
        assert reason in told
    assert html_of(run).count("<img ") == 2


def test_what_is_missing_names_the_command_that_adds_it(tmp_path: Path) -> None:
    """A bare run: one line per part; gone once the part is there."""
    run = make_run(tmp_path)
    text = html_of(run)
    commands = [f"python tools/{tool}.py {run} --" for tool in ("finetune", "evaluate", "visualize")]
    commands.append(f"python tools/evaluate.py {run} --fewshot TRAIN TEST</pre>")
    assert all(command in text for command in commands) and "wrong.json" in text and "Never validated" not in text
    assert text.count("tools/finetune.py") == 1  # that nothing was fine-tuned says that no score is the paper's
    tuned = make_run(tmp_path, "tuned")
    config = (tuned / "config.yaml").read_text()
    (tuned / "config.yaml").write_text(config.replace("init_from: null", "init_from: weights"))
    text = html_of(tuned)
    assert "tools/visualize.py" in text and not [
        word for word in ("--task", "few-shot", "fine-tuned yet") if word in text
    ]
    add_evaluation(run)
    assert "No few-shot accuracy over steps" not in html_of(run)  # its last weights were measured
    shutil.rmtree(run / "evaluation")
    add_everything(run)
    text = html_of(run)
    assert not [command for command in commands if command in text] and "wrong.json" not in text
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    text = html_of(run)
    assert "Never validated" in text and ">1</text>" in text and "m</text>" not in text  # no thousandths of a step


def test_confusion_of_classes_is_shown(browser: Browser, tmp_path: Path) -> None:
    """Of a run that tools/evaluate.py has scored: a picture and the most frequent mistakes, within the screen."""
    run = make_run(tmp_path)
    add_evaluation(run)
    classes = [f"{SCRIPT} {number}" for number in range(40)]
    pairs = [[n, n, 5] for n in range(40)] + [[n, (n + 1) % 40, 1 + n] for n in range(40)]
    wrong = {"items": [{"name": "x", "label": "a", "predicted": "b"}], "classes": classes, "confusion": pairs}
    wrong |= {"data": "sets/<b>" + "x" * 100, "data_sha256": "a" * 64, "weights_sha256": "0123456789abcdef" * 4}
    (run / "evaluation" / "wrong.json").write_text(json.dumps(wrong))
    path = tmp_path / "page.html"
    path.write_text(html_of(run))
    opened(browser, path, width=PHONE)
    assert browser.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert browser.evaluate("window.hurt") is None
    cells = browser.evaluate("document.querySelectorAll('.confusion rect').length")
    page, of = browser.evaluate("document.body.innerText"), f"on {wrong['data']}, weights 0123456789ab"
    assert cells >= 30 and f"what is taken for what {of}\n" in page and f"wrong predictions {of}\n" in page
    text = markdown([summary(of_run) for of_run in read_runs([run])])
    assert f"Taken for another class most often {of.replace('<', '&lt;')}: " in text and "(40 of 45)" in text


def test_markdown_keeps_names_as_text(tmp_path: Path) -> None:
    """No tag begins in report.md."""
    text = hostile_page(tmp_path).with_name("report.md").read_text()
    assert "&lt;script>" in text and "<" not in text
