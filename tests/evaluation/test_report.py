"""The page: what stands in it, and in a real browser whether it is drawn."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from ragkv.evaluation import Plan, evaluate, parse_arms
from ragkv.evaluation.report import page, tables
from ragkv.evaluation.report.scatter import BUDGET, TTFT, plot
from ragkv.evaluation.report.series import looks
from ragkv.evaluation.summary import METRICS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "input"}


class Elements(HTMLParser):
    """Reads a page; fails where tags are not closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes), list(self.open)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name, **wanted):
        wanted = {key.replace("_", "-"): value for key, value in wanted.items()}
        return [attributes for tag, attributes, _ in self.found if tag == name and wanted.items() <= attributes.items()]


@pytest.fixture(scope="module")
def result(loaded, tmp_path_factory, small_case):
    from ragkv import PromptTemplate, bundled
    from ragkv.evaluation import Bench
    from ragkv.testing import tiny_model

    bench = Bench(tiny_model(vocab_size=1792), loaded[1], PromptTemplate(**bundled.TEMPLATE), max_new_tokens=4)
    arms = parse_arms(
        ["full-prefill", "full-documents", "no-context", "reuse", "lego-link", "cache-blend", "random"], [0.1, 0.3]
    )
    arms += parse_arms(["cache-blend:check_layer=9@alone"], [])
    cases = [
        small_case("<a&b>", question='Who is "<b>Anna</b>"?'),
        small_case("b", kind="direct"),
        small_case("c", answers=()),
    ]
    plan = Plan("tiny <model>", "ours", cases, arms, orders=2, timed=1, command="ragkv eval --model 'tiny <model>'")
    return evaluate(bench, plan, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(result):
    return page(result.summary, result.tokens, METRICS["kl_chunks"])


def test_every_plot_is_there(html, result):
    found = Elements(html)
    slices = list(result.summary["slices"])
    assert slices == ["all", "cross", "direct", "order as given", "order shuffled"]
    points = len([arm for arm in result.summary["arms"] if arm["cost"]]) - 2  # two are lines, not points
    for axis in (BUDGET, TTFT):
        assert [svg["data-slice"] for svg in found.all("svg", data_plot=axis.name)] == slices
    dots = [tag for tag, attributes, _ in found.found if attributes.get("class") in ("dot", "dot hollow")]
    assert len(dots) == 2 * len(slices) * points and {"circle", "rect"} == set(dots)
    assert len(found.all("svg", data_plot="stages")) == len(found.all("svg", data_plot="tokens")) == 1
    assert found.all("path", **{"class": "front"})


@pytest.mark.parametrize("axis", [BUDGET, TTFT], ids=lambda axis: axis.name)
def test_a_name_covers_no_point(result, axis):
    arms = [
        arm for arm in copy.deepcopy(result.summary["arms"]) if arm["name"].startswith(("lego-link", "cache-blend:r"))
    ]
    for place, arm in enumerate(arms[:2]):  # the second one, up and to the right, where the first one's name would be
        arm["cost"] |= {"budget": 0.1 + 0.02 * place, "ttft_ms": 10 + place}
        arm["scores"]["all"]["em"] = (0.7 + 0.01 * place, 0.6, 0.8, 9)
    drawn = plot(arms[:2], looks(result.summary), METRICS["em"], "all", axis)
    assert len(drawn["labels"]) == 2
    for left, y, name in drawn["labels"]:
        right = left + 6 * len(name)
        assert not [point for point in drawn["points"] if left < point.x < right and y - 11 < point.y < y + 3]


def test_every_arm_gate_and_condition_is_told(html, result):
    words = " ".join(Elements(html).texts)
    for arm in result.summary["arms"]:
        assert arm["name"] in words
    for gate in result.summary["gates"]:
        assert gate["name"] in words
    for name in ("torch", "transformers", "dtype", "seed", "command"):
        assert name in words
    assert "cases left out: no answer" in words
    assert "2 cases about 1 document, up to 2 orders" in words
    assert "check_layer 9 of a model with 4 layers" in words


def test_the_page_stands_alone(html):
    found = Elements(html)
    names = {name for name, _, _ in found.found}
    assert not names & {"script", "link", "img", "iframe", "object"}
    for _, attributes, _ in found.found:
        assert not {"src", "href", "xlink:href", "onclick", "onload"} & set(attributes)
    assert not re.search(r"https?://|@import|url\(", html)


def test_what_comes_from_data_is_escaped(html):
    assert "<b>Anna</b>" not in html and "&lt;b&gt;Anna&lt;/b&gt;" in html
    assert "tiny <model>" not in html and "tiny &lt;model&gt;" in html


def test_what_comes_from_data_is_escaped_everywhere(result):
    """Whatever text a summary holds, none of it becomes an element."""
    marked = json.loads(json.dumps([result.summary, result.tokens]).replace("reuse@alone", "<i id='x'>&amp;"))
    summary, tokens = marked
    tokens["question"] = tokens["kind"] = tokens["tokens"][0] = tokens["answers"][0] = "</p><script>"
    summary["conditions"]["command"] = summary["gates"][0]["note"] = '"><script>'
    summary["left_out"] = summary["arms"][0]["refused"] = {"</td><script>": 1}
    found = Elements(page(summary, tokens, METRICS["em"]))
    assert not found.all("script") and not found.all("i", id="x")
    assert any("<i id='x'>&amp;" in text for text in found.texts)


def test_costs_that_were_not_measured_are_dashes(result):
    summary = copy.deepcopy(result.summary)
    stages = {"place": 1.0, "select": 0.0, "compute": 2.25}
    cost = {"budget": 0.125, "tokens": 1234.0, "ttft_ms": 12.34, "ttft_p95_ms": 20.0, "stages_ms": stages, "timed": 1}
    arm = next(arm for arm in summary["arms"] if arm["cost"])
    arm["cost"] = {**cost, "bytes_read": 3 << 20}
    html = page(summary, result.tokens, METRICS["em"])
    shown = Elements(
        html[html.index("<h2>Cost</h2>") : html.index("<h2>Left out and refused</h2>")].rpartition("</")[0]
    )
    texts = [text for text in shown.texts if text.strip()]
    row = texts[texts.index(arm["name"]) + 1 :][:12]
    assert row[:7] == ["12.5%", "1,234", "12.3 ms", "20.0 ms", "1.0", "0.0", "2.2"]
    assert row[7:] == ["\u2013", "3.0 MiB", "\u2013", "\u2013", "\u2013"]
    refused = {arm["name"] for arm in summary["arms"] if not arm["cost"]}
    assert refused and not refused & set(texts)


@pytest.mark.parametrize(("metric", "best"), [("em", "lego-link:k=30%@alone"), ("kl_chunks", "lego-link:k=10%@alone")])
def test_the_time_is_shown_of_the_best_arm(result, metric, best):
    """Which is the one of the least divergence, but of the most right answers."""
    summary = copy.deepcopy(result.summary)
    names = ("lego-link:k=10%@alone", "lego-link:k=30%@alone")
    for arm in summary["arms"]:
        if arm["name"] in names:
            score = 0.25 + 0.5 * names.index(arm["name"])
            arm["scores"]["all"][metric] = (score, score, score, 2)
    html = page(summary, result.tokens, METRICS[metric])
    texts = Elements(re.search(r'<svg[^>]*data-plot="stages".*?</svg>', html, re.DOTALL)[0]).texts
    assert [name for name in texts if name in names] == [best]


def test_the_figures_in_markdown(result):
    written = tables(result.summary, METRICS["kl_chunks"])
    found = [block.splitlines() for block in written.split("\n\n") if block.startswith("|")]
    ran = [arm for arm in result.summary["arms"] if arm["cost"]]
    assert [len(table) for table in found] == [2 + len(ran)] * 2
    for table in found:
        assert len({line.count("|") for line in table}) == 1
        assert [line.split("`")[1] for line in table[2:]] == [arm["name"] for arm in ran]
    assert written.startswith("`ragkv eval --model 'tiny <model>'`, 2 cases about 1 document, ")
    assert "\n\ncases left out: no answer: 1\n\ncache-blend:check_layer=9@alone refused (4 prompts): " in written


def test_a_mean_over_fewer_cases_says_so_and_is_the_best_of_nothing(result):
    """Whoever was refused the hard cases alone is right more often."""
    summary = copy.deepcopy(result.summary)
    arms = {arm["name"]: arm for arm in summary["arms"]}
    refused = arms["reuse@document"]
    refused["n"], refused["refused"] = 1, {"too long": 2}
    refused["scores"]["all"]["em"] = (1.0, 1.0, 1.0, 1)
    written = tables(summary, METRICS["em"])
    mine = [line for line in written.splitlines() if line.startswith("| `reuse@document` ")]
    assert "| 1 | 100.0 (100.0 to 100.0) |" in mine[0] and "| 100.0 (100.0 to 100.0) n = 1 |" in mine[1]
    assert "reuse@document refused (2 prompts): too long" in written
    drawn = plot(summary["arms"], looks(summary), METRICS["em"], "all", BUDGET)
    assert "reuse@document" in {point.arm["name"] for point in drawn["points"]} - {
        point.arm["name"] for point in drawn["front"]
    }
    (tile,) = re.findall(r"best within a budget of 10%.*?</div>", page(summary, {}, METRICS["em"]), re.DOTALL)
    assert "reuse@document" not in tile


MEASURE = """<script>
const shown = [...document.querySelectorAll('svg[data-plot]')].filter(svg => svg.getBoundingClientRect().width > 0);
const inside = (svg, mark) => {
  const outer = svg.getBoundingClientRect(), inner = mark.getBoundingClientRect();
  return inner.width > 0 && inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && inner.top >= outer.top - 1
    && inner.bottom <= outer.bottom + 1;
};
const marks = 'circle, rect, text';
document.body.innerHTML = '<pre id="measured">' + JSON.stringify({
  plots: shown.map(svg => ({name: svg.dataset.plot, width: svg.getBoundingClientRect().width,
    height: svg.getBoundingClientRect().height, circles: svg.querySelectorAll('circle').length,
    outside: [...svg.querySelectorAll(marks)].filter(mark => !inside(svg, mark)).map(mark => mark.outerHTML)})),
  wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  coloured: [...document.querySelectorAll('.tokens span')]
    .filter(span => getComputedStyle(span).backgroundColor !== 'rgba(0, 0, 0, 0)').length,
}).replaceAll('<', '&lt;') + '</pre>';
</script></body>"""


@pytest.mark.skipif(
    BROWSER is None, reason="chromium is not installed: the page is not drawn, only its structure is looked at"
)
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_draws_the_plots(html, tmp_path, width):
    path = tmp_path / "page.html"
    path.write_text(html.replace("</body>", MEASURE))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    ]
    run = subprocess.run([BROWSER, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="measured">(.*)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr[-2000:]
    measured = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert [plot["name"] for plot in measured["plots"]] == ["budget", "ttft", "stages", "tokens"]
    for drawn in measured["plots"]:
        assert drawn["width"] >= 760 and drawn["height"] > 50
        assert drawn["outside"] == []
    assert measured["plots"][0]["circles"] > 5
    assert measured["wider"] <= 0, "the page scrolls sideways"
    assert measured["coloured"] > 10
