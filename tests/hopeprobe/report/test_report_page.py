"""The page: what it holds, that it needs nothing else, and how it behaves in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.plots import draw_loss_curve
from hopeprobe.report import as_page, write_page
from hopeprobe.results import NullRow, ResultRow, Results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)


def row(value=0.25, probe="cms-similarity", layer=0, component="fast|slow", **changed):
    fields = {
        "statistic": "output_cosine", "checkpoint": "step-000200.pt", "step": 200, "unit": "1", "ci_low": value - 0.1,
        "ci_high": value + 0.1, "n_tokens": 4096, "n_groups": 64, "dtype": "float32", "verdict": "learned",
    }  # fmt: skip
    return ResultRow(probe=probe, value=value, layer=layer, component=component, **fields | changed)


def results_of(*rows, missing=()):
    nulls = [
        NullRow(
            probe=one.probe, statistic=one.statistic, checkpoint=one.checkpoint, step=one.step, layer=one.layer,
            component=one.component, condition=one.condition, null_kind="own-init", value=0.5, n=9,
        )
        for one in rows
    ]  # fmt: skip
    checkpoint = {
        "name": "step-000200.pt",
        "seed": 3,
        "missing": list(missing),
        "path": None,
        "gate": {"rule": "random"},
    }
    return Results(rows, nulls, checkpoint=checkpoint, data={"name": "text.jsonl", "fingerprint": "abc"})


SEVERAL = (
    row(0.25), row(-3.0, layer=1, verdict="at-init"), row(12.5, layer=2, verdict="untrained"),
    row(float("nan"), layer=3, ci_low=float("nan"), ci_high=float("nan"), n_tokens=0, verdict="n/a"),
    row(1.0, probe="my-probe", statistic="mine", component="<script>alert(1)</script>", note='a "note" & <b>'),
)  # fmt: skip


class Tags(HTMLParser):
    """Every tag and address of a page, and whether what is opened is closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_needs_nothing_from_anywhere():
    page = Tags(as_page(results_of(*SEVERAL)))
    assert page.addresses
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert page.tags.count("script") == 1
    text = as_page(results_of(*SEVERAL))
    assert not re.search(r"https?://|@import|url\(", text.split("<pre>")[0])


def test_verdicts_come_first_then_a_section_a_probe():
    text = as_page(results_of(*SEVERAL), title="my runs")
    page = Tags(text)
    assert page.tags.count("section") == 4, "verdicts, two probes, identity"
    assert text.index('id="verdicts"') < text.index('id="cms-similarity-') < text.index('id="my-probe-')
    assert "<title>my runs</title>" in text
    assert "Do the levels of the CMS repeat each other?" in text
    assert "canonical correlation, effective rank, by layer and pair" in text, "its definition"
    for word in ("own-init", "0.25", "[0.15, 0.35]", "abc", "gate.rule", "random"):
        assert word in text
    assert "step-000200.pt: what is measured of them is what" in " ".join(text.split())


def test_every_text_is_escaped():
    text = as_page(results_of(*SEVERAL, missing=["<img src=x onerror=alert(1)>"]), title="<i>t</i>")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<img src=x" not in text
    assert "<i>t</i>" not in text
    assert "a &#34;note&#34; &amp; &lt;b&gt;" in text


def test_what_could_not_be_measured_is_at_the_top():
    text = as_page(results_of(*SEVERAL, missing=["surprise: a hook never fired"]))
    assert text.index("surprise: a hook never fired") < text.index('id="verdicts"')
    assert "Not measured" not in as_page(results_of(*SEVERAL))


def test_several_checkpoints_are_told_apart():
    rows = (row(), row(checkpoint="other.pt"))
    text = as_page(results_of(*rows))
    assert "cms-similarity · other.pt" in text
    assert text.count("<figure>") == 2


def test_each_link_leads_to_a_section_of_its_own():
    names = ("a b.pt", "a-b.pt", "a/b.pt")
    text = as_page(results_of(*(row(checkpoint=name) for name in names)))
    sections = re.findall(r'<section class="probe" id="(.*?)">\s*<h2>cms-similarity · (.*?)</h2>', text)
    links = re.findall(r'<a href="#(.*?)">cms-similarity</a></td><td class="text">(.*?)</td>', text)
    assert links == sections
    assert [name for _, name in sections] == list(names)
    assert len({anchor for anchor, _ in sections}) == 3


def test_nothing_to_report_is_no_page(tmp_path):
    with pytest.raises(MeasurementError, match="nothing to report"):
        write_page(Results(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot write"):
        write_page(results_of(row()), tmp_path / "file" / "report.html")


def browse(path, *options):
    """What Chromium says of a page, and its document after scripts have run."""
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        *options,
    ]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    curve = draw_loss_curve([{"step": step, "loss": 10 / step} for step in (1, 2, 3)])
    return write_page(results_of(*SEVERAL), path, "a report", {"run": curve})


@needs_chromium
@pytest.mark.slow  # a browser
def test_a_browser_shows_every_section_without_an_error(page):
    done = browse(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<section") == 5
    assert done.stdout.count("<img") == 3
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace('"use strict";', '"use strict"; nothing.here();'))
    assert "CONSOLE" in browse(broken, "--dump-dom").stderr, "an error would be seen"


SORT = """<script>
const table = document.querySelectorAll("table.sortable")[0], head = table.tHead.rows[0].cells[3];
const seen = () => [...table.tBodies[0].rows].map(row => row.cells[3].textContent).join(" ");
const found = [seen()];
for (let i = 0; i < 3; i++) { head.querySelector("button").click(); found.push(head.ariaSort + ": " + seen()); }
dispatchEvent(new Event("beforeprint"));
found.push([...document.querySelectorAll("details")].every(fold => fold.open));
found.push([...document.images].every(image => image.complete && image.naturalWidth > 0));
document.title = found.join(" | ");
</script></body>"""


@needs_chromium
@pytest.mark.slow  # a browser
def test_tables_sort_and_unfold_on_paper_in_a_browser(page):
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text().replace("</body>", SORT))
    (title,) = re.findall(r"<title>(.*?)</title>", browse(acted, "--dump-dom").stdout)
    assert title.split(" | ") == [
        "0.25 -3 12.5 –", "ascending: -3 0.25 12.5 –", "descending: 12.5 0.25 -3 –", "null: 0.25 -3 12.5 –",
        "true", "true",
    ]  # fmt: skip


@needs_chromium
@pytest.mark.slow  # a browser
def test_it_prints(page, tmp_path):
    browse(page, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")


@needs_chromium
@pytest.mark.slow  # a browser
def test_names_that_are_scripts_do_nothing_in_a_browser(tmp_path):
    names = (
        "<img src=x onerror=document.title='owned'>", "<script>document.title='owned'</script>",
        "\"><svg/onload=document.title='owned'>",
        "javascript:document.title='owned'", "</title><script>document.title='owned'</script>", "{{ 7 * 7 }}",
    )  # fmt: skip
    rows = [row(checkpoint=name, component=name, note=name, statistic=name) for name in names]
    path = write_page(results_of(*rows, missing=names), tmp_path / "report.html", names[0])
    done = browse(path, "--dump-dom")
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    assert title == "&lt;img src=x onerror=document.title='owned'&gt;"
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "{{ 7 * 7 }}" in done.stdout
    acted = tmp_path / "acted.html"
    acted.write_text(path.read_text().replace("</body>", f"{names[1]}</body>"))
    assert "<title>owned</title>" in browse(acted, "--dump-dom").stdout, (
        "a script that was let in would be seen"
    )
