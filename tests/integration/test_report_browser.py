"""The report in a real browser: no error, no request, both widths, both color schemes, search, order and keyboard."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from reported import END, Examples, Tokens, add_to_entries, make_run
from tiny import byte_tokenizer

from spin_plugin.args import SpinArgs
from spin_plugin.report.write import write_report
from spin_plugin.run.directory import RunDir

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'spin-plugin[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium; .ci/run installs Debian's")

TOKENIZER = byte_tokenizer()
PHONE, DESKTOP = (390, 844), (1400, 900)
PROMPTS = 70
HOSTILE = {
    "script": "</script><script>window.broken = 1</script>",
    "comment": "<!-- <script> -->",
    "attribute": "<img src=https://example.com/x onerror='window.broken = 1'> &lt;b&gt; {{ 7 * 7 }}",
    "controls": "nul \x00 escape \x1b[31mred bidi \u202eevil\u202c joined \u200d end",
    "separators": "line \u2028 paragraph \u2029 mark \ufeff",
    "emoji": "👩\u200d👩\u200d👧 ﷽ Z̸̢͎͚a̷l̵g̶o̷",
    "line": "x" * 100_000,
    "lines": "y\n" * 10_000,
}


def tokens(text: str) -> Tokens:
    return [*TOKENIZER.encode(text, add_special_tokens=False), END]


def words(number: int) -> str:
    return f"answer {number} has some words that say nothing of weight, {'again and ' * (number % 9)}again"


def healthy(split: str, example: int, iteration: int) -> list[Tokens]:
    """A third of the responses equal the real ones; the first of each split is truncated."""
    text = words(example) if example % 3 == 1 else words(example).replace("nothing", f"little {iteration}")
    return [tokens(text)[: None if example else -1]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    examples = Examples(
        [(tokens(f"question {number}"), tokens(words(number))) for number in range(PROMPTS - 10)],
        [(tokens(f"held-out question {number}"), tokens(words(number))) for number in range(10)],
    )
    run = make_run(tmp_path_factory.mktemp("healthy") / "run", TOKENIZER, examples, healthy, iterations=5)
    comparison = {"prompts": 32, "before": -0.05, "after": -0.15, "difference": -0.1, "interval": [-0.12, -0.08]}
    finding = {
        "name": "equal",
        "message": "Most responses equal the real ones.",
        "advice": "Set `a_very: long_option`.",
    }
    stages = {"generate": {"seconds": 75.0, "tokens": 1500}, "train": {"seconds": 7500.0, "tokens": 150_000}}
    add_to_entries(run, held_out=comparison, findings=[finding], stages=stages, precision="bf16 with fp32 masters")
    write_report(run, SpinArgs(iterations=6))
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    texts = [tokens(text) for text in HOSTILE.values()]
    broken = [[195, 40, 237, 160, 128, 255, END]]  # bytes that are no UTF-8, a lone surrogate among them
    examples = Examples([(text, text) for text in texts + broken], [])
    shuffled = texts[1:] + texts[:1] + broken
    run = make_run(
        tmp_path_factory.mktemp("hostile") / "run", TOKENIZER, examples, lambda _s, n, _t: [shuffled[n]], iterations=2
    )
    write_report(run, SpinArgs(iterations=2))
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a report; at the end of the test, no page may have requested or reported anything."""
    problems: list[str] = []

    def opened(run: RunDir, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        address = run.report.as_uri()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.extend([request.url] if request.url != address else []))
        page.goto(address)
        return page

    yield opened
    assert problems == []
    for context in browser.contexts:
        context.close()


def tags(page: Any) -> list[str]:
    """Return split and number of each row that is drawn."""
    return page.locator(".row .tag").all_inner_texts()


def stored(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.report.with_suffix(".jsonl").read_text().splitlines()]


def tag(row: dict[str, Any]) -> str:
    return f"{'held out' if row['split'] == 'eval' else 'train'} {row['example']}"


# Every text against the background that is behind it, as WCAG 2 computes it.
CONTRAST = """() => {
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const element of document.body.querySelectorAll("*")) {
    const own = Array.from(element.childNodes).some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.matches(":disabled, script, style")) continue;
    const style = getComputedStyle(element);
    const front = parse(element instanceof SVGElement ? style.fill : style.color);
    const [one, other] = [front, behind(element)].map(luminance);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) found[`${element.tagName}.${element.getAttribute("class")}`] = contrast;
  }
  return found;
}"""


# By its outline, or for a row, which its cells would cover, by a frame before it.
VISIBLE_FOCUS = """() => {
  const focused = document.activeElement, frame = getComputedStyle(focused, "::after");
  return parseFloat(getComputedStyle(focused).outlineWidth) >= 3 || parseFloat(frame.borderTopWidth) >= 3;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("kind", ["run", "hostile"])
def test_page_fits_and_is_legible(
    kind: str, size: tuple[int, int], scheme: str, open_page: Any, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(kind), size, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert page.evaluate(CONTRAST) == {}
    page.evaluate("document.documentElement.style.fontSize = '20px'")  # larger letters
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]


def test_real_response_and_headings_stay_in_place(run: RunDir, open_page: Any) -> None:
    page = open_page(run)
    place = "[...document.querySelectorAll('.columns, .truth')].slice(0, 2).map((e) => e.getBoundingClientRect())"
    (before, real), _ = page.evaluate(place), page.evaluate("document.querySelector('.grid').scrollBy(300, 40)")
    heading, moved = page.evaluate(place)
    assert heading["y"] == before["y"]
    assert moved["x"] == real["x"]
    assert moved["y"] == real["y"] - 40


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("before", [0, 900, 5000])
def test_closed_row_shows_what_the_prompt_asks_and_an_open_one_the_whole(
    before: int, size: tuple[int, int], tmp_path: Path, open_page: Any
) -> None:
    """The end of a prompt is visible, its beginning only in an open row."""
    system = "<|im_start|>system\n" + "You answer well.\n" * (before // 17)
    prompt = tokens(f"{system}<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")[:-1]
    run = make_run(tmp_path / "run", TOKENIZER, Examples([(prompt, tokens("it"))], []), healthy, iterations=1)
    write_report(run, SpinArgs(iterations=1))
    page = open_page(run, size)
    shown = """(word) => {
      const cell = document.querySelector(".prompt"), range = document.createRange();
      const box = cell.getBoundingClientRect();
      const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
      for (let node; (node = walk.nextNode()); ) {
        const at = node.data.indexOf(word);
        if (at < 0) continue;
        range.setStart(node, at);
        range.setEnd(node, at + word.length);
        const place = range.getBoundingClientRect();
        return place.top >= box.top && place.bottom <= box.bottom;
      }
      return false;
    }"""
    assert page.evaluate(shown, "What is it?")
    assert page.evaluate(shown, "system") is (before == 0)
    page.locator(".row").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(shown, "What is it?")
    assert page.evaluate(shown, "system" if before < 5000 else "earlier characters")


def test_search_and_filters(run: RunDir, open_page: Any) -> None:
    page = open_page(run)
    assert page.inner_text("#count") == f"{PROMPTS} of {PROMPTS} prompts"
    page.fill("#search", "ANSWER 17 ")
    assert tags(page) == ["train 17"]
    page.fill("#search", "nowhere to be found")
    assert page.inner_text(".grid .empty") == "No prompt matches."
    page.fill("#search", "")
    page.select_option("#split", "eval")
    assert tags(page) == [f"held out {number}" for number in range(10)]
    page.select_option("#kind", "equal")
    assert tags(page) == [f"held out {number}" for number in (1, 4, 7)]
    page.select_option("#kind", "differ")
    assert tags(page) == [f"held out {number}" for number in (0, 2, 3, 5, 6, 8, 9)]
    page.select_option("#kind", "truncated")
    assert tags(page) == ["held out 0"]


@pytest.mark.parametrize("order", ["lowest_real", "lowest_margin", "longest"])
def test_orders(order: str, run: RunDir, open_page: Any) -> None:
    page = open_page(run)
    page.select_option("#sort", order)
    sign = -1 if order == "longest" else 1
    rows = sorted(stored(run), key=lambda row: (sign * row[order], row["split"] == "eval", row["example"]))
    assert tags(page) == [tag(row) for row in rows][: len(tags(page))]
    assert len(tags(page)) >= 20


def test_orders_by_rewards_are_off_without_rewards(run: RunDir, tmp_path: Path, open_page: Any) -> None:
    copy = RunDir(shutil.copytree(run.root, tmp_path / "run"))
    for file in copy.root.glob("iteration-*/pairs/rewards-*"):
        file.unlink()
    write_report(copy, SpinArgs(iterations=5))
    page = open_page(copy)
    assert page.locator("#sort option:disabled").count() == 2
    assert page.locator(".rewards span").count() == 0


def test_differing_words_are_marked(run: RunDir, open_page: Any) -> None:
    page = open_page(run)
    cell = page.locator(".row").nth(2).locator(".answers .cell").nth(3)
    assert cell.locator("mark").all_inner_texts() == ["little 3 "]
    assert cell.locator("del").count() == 0
    page.check("#missing")
    cell = page.locator(".row").nth(2).locator(".answers .cell").nth(3)
    assert cell.locator("del").all_inner_texts() == ["nothing "]
    assert page.locator(".row").nth(1).locator("mark").count() == 0  # equal to the real response


@pytest.mark.parametrize(
    ("real", "synthetic", "parts"),
    [
        ("a b c", "a x c", [["same", "a "], ["missing", "b "], ["added", "x "], ["same", "c"]]),
        ("a b", "a  b", [["same", "a"], ["missing", " "], ["added", "  "], ["same", "b"]]),
        ("", "new words", [["added", "new words"]]),
        ("all gone", "", [["missing", "all gone"]]),
        ("f(x) = 1", "f(y) = 1", [["same", "f("], ["missing", "x"], ["added", "y"], ["same", ") = 1"]]),
        ("abcd", "abxd", [["same", "ab"], ["missing", "c"], ["added", "x"], ["same", "d"]]),
        ("日本語です", "日本人です", [["same", "日本"], ["missing", "語"], ["added", "人"], ["same", "です"]]),
    ],
)
def test_compared_texts(real: str, synthetic: str, parts: list[list[str]], run: RunDir, open_page: Any) -> None:
    assert open_page(run).evaluate("([real, synthetic]) => compare(real, synthetic)", [real, synthetic]) == parts


def test_compared_texts_are_complete_whatever_they_are(run: RunDir, open_page: Any) -> None:
    """Without the added parts it is the real text, without the missing ones the synthetic one."""
    page, random = open_page(run), Random(0)
    for letters in ("ab ", "xy\n  .", "ab") * 40:
        real, synthetic = ("".join(random.choices(letters, k=random.randrange(30))) for _ in range(2))
        parts = page.evaluate("([real, synthetic]) => compare(real, synthetic)", [real, synthetic])
        assert "".join(text for kind, text in parts if kind != "added") == real
        assert "".join(text for kind, text in parts if kind != "missing") == synthetic
    parts = page.evaluate("compare('same ' + 'a '.repeat(3000) + 'end', 'same ' + 'b '.repeat(3000) + 'end')")
    assert [kind for kind, _ in parts] == ["same", "missing", "added", "same"]


def test_rewards_stand_beside_each_response(run: RunDir, open_page: Any) -> None:
    page = open_page(run)
    response = next(row for row in stored(run) if tag(row) == "train 5")["iterations"]["4"][0]
    texts = page.locator(".row").nth(5).locator(".answers .cell").nth(4).locator(".rewards").inner_text().split()
    shown = [float(text.replace("−", "-")) for text in texts if text not in ("r", "r′")]
    assert shown == pytest.approx([response["reward_real"], response["reward_synthetic"]], abs=5e-4)


def test_keyboard_walks_over_rows_and_reaches_every_control(run: RunDir, open_page: Any) -> None:
    page = open_page(run)

    def focused() -> str:
        return page.evaluate("document.activeElement.querySelector('.tag')?.textContent ?? document.activeElement.id")

    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(focused())
        assert page.evaluate(VISIBLE_FOCUS), seen
    assert [name for name in seen if name] == ["search", "sort", "split", "kind", "missing", "train 0", "more"]
    page.keyboard.press("/")
    assert focused() == "search"
    page.keyboard.type("/j question 1")
    assert page.input_value("#search") == "/j question 1"
    page.keyboard.press("Escape")
    assert (page.input_value("#search"), focused()) == ("", "train 0")
    for key, expected in [("j", 1), ("ArrowDown", 2), ("k", 1), ("ArrowUp", 0), ("k", 0)]:
        page.keyboard.press(key)
        assert focused() == f"train {expected}"
    page.keyboard.press("Enter")
    assert page.locator(".row.open").count() == 1
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.grid').scrollLeft > 100")
    for _ in range(PROMPTS + 5):  # over all rows, of which the first ones are drawn
        page.keyboard.press("j")
    assert focused() == "held out 9"
    row, grid = (page.locator(name).last.bounding_box() for name in (".row", ".grid"))
    assert grid["y"] <= row["y"] < row["y"] + row["height"] <= grid["y"] + grid["height"] + 1
    page.keyboard.press("Home")
    assert focused() == "train 0"


def test_charts_read_out_their_values(run: RunDir, open_page: Any) -> None:
    page = open_page(run)
    figure = page.locator("figure").first
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2)
    text = figure.locator("output").inner_text()
    log = run.iteration(int(text[4])).read_log()
    entry = log[int(text.split()[4].rstrip(":")) - 100 * int(text[4]) - 1]
    assert f"reward_real {entry['spin/reward_real']:.4g}".rstrip("0") in text
    page.mouse.move(5, 5)
    assert not figure.locator("output").inner_text().strip()
    assert not figure.locator(".cursor").is_visible()


def test_hostile_responses_change_nothing_but_text(hostile: RunDir, open_page: Any) -> None:
    page = open_page(hostile)
    assert page.evaluate("window.broken") is None
    assert page.locator("script").count() == 3
    assert page.locator(".grid img").count() == 0
    rows = page.locator(".row .truth .text").all_text_contents()
    assert len(rows) == len(HOSTILE) + 1
    shown = dict(zip(HOSTILE, rows, strict=False))
    for name in ("script", "comment", "attribute"):
        assert shown[name] == HOSTILE[name] + "</s>"
    assert shown["controls"].startswith("nul U+0000 escape U+001B[31mred bidi U+202Eevil")
    assert shown["line"].startswith("x" * 3000)
    assert shown["line"].endswith(" … 97,004 more characters")
    assert "\ufffd" in rows[-1]
    page.fill("#search", "</script>")
    assert len(tags(page)) == 2
