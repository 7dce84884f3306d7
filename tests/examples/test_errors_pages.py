"""The pages of errors: every example is run, says what its page says and ends as it says, and no error lacks a page.

Examples run in a copy of the folder that the index makes. Of a command both streams and the status are compared (0,
where no `echo $?` shows another), of Python what a prompt prints; `...` stands for anything, and lines may be
broken anywhere.
"""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hopeprobe.cli import run
from hopeprobe.errors import HopeprobeError
from hopeprobe.stats import Verdict

PAGES = Path(__file__).parents[2] / "examples" / "errors"
INDEX = PAGES / "README.md"
SLUGS = sorted(path.stem for path in PAGES.glob("*.md") if path != INDEX)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
INTERRUPTED = "^C\n"  # what a terminal shows first where a person pressed Ctrl-C


class Example(NamedTuple):
    command: str
    expected: str


def examples_of(block):
    """Commands behind `$ `, with what is shown under each."""
    assert block.startswith("$ "), block
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n", part).group()
        yield Example(command.replace("\\\n", "").strip(), part[len(command) :])


def same(expected, got):
    return doctest.OutputChecker().check_output(expected, got, OPTIONS)


def called(words):
    """The status and both streams, in their order."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run(words)
    return status, said.getvalue()


def interrupted(words, folder):
    """The same in a process of its own, interrupted once there is a checkpoint after the first step."""
    # What was started in the background of a shell ignores interrupts, and so would what it starts.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from hopeprobe.cli import main; main(sys.argv[1:])"
    before = set(folder.rglob("*.pt"))
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        while len(set(folder.rglob("*.pt")) - before) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    return process.returncode, INTERRUPTED + said


def run_console(block, folder):
    """Run the commands in the current folder, `folder`; yields what each says, and its status where it is ours."""
    examples = list(examples_of(block))
    last = 0
    for i, (command, expected) in enumerate(examples):
        status = None
        if command == "echo $?":
            said = f"{last}\n"
        elif command.startswith("hopeprobe "):
            words = shlex.split(command)[1:]
            stop = expected.startswith(INTERRUPTED)
            last, said = interrupted(words, folder) if stop else called(words)
            status = last
            shown = i + 1 < len(examples) and examples[i + 1].command == "echo $?"
            assert shown or status == 0, f"{command}\nends with status {status}, which is not shown\n{said}"
            assert not status or len(expected.replace("...", "").strip()) > 30, (
                f"{command}: too little is shown"
            )
        else:
            done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
            last, said = done.returncode, done.stdout + done.stderr
            assert last == 0, f"{command}\n{said}"
        assert same(expected, said), f"{command}\n--- expected\n{expected}--- got\n{said}"
        yield said, status


class Prompts(doctest.DocTestRunner):
    """Keeps what was said where it is as the page has it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.said = []

    def report_success(self, out, test, example, got):
        self.said.append(got)


def run_python(block, scope, name):
    """Run the prompts; gives what differs from the page."""
    test = doctest.DocTestParser().get_doctest(block, scope, name, None, 0)
    assert test.examples, block
    told = io.StringIO()
    runner = Prompts(verbose=False, optionflags=OPTIONS)
    result = runner.run(test, out=told.write, clear_globs=False)
    scope.update(test.globs)
    assert not result.failed, told.getvalue()
    return "".join(runner.said)


def run_page(text, folder):
    """Run all blocks from top to bottom; AssertionError where one does not do what the page says."""
    said, statuses, scope = [], [], {"__name__": "__main__"}
    for kind, block in BLOCK.findall(text):
        if kind == "python":
            said.append(run_python(block, scope, "page"))
        else:
            assert kind == "console", kind
            for shown, status in run_console(block, folder):
                said.append(shown)
                statuses += [] if status is None else [status]
    return said, statuses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the index's commands were run: what the pages begin with."""
    made = tmp_path_factory.mktemp("errors")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOPEPROBE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("GITHUB_ACTIONS", raising=False)  # where `check` says more
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as moved:
            moved.chdir(made)
            run_page(INDEX.read_text(encoding="utf-8"), made)
        yield made
        torch.set_num_threads(threads)


@pytest.fixture
def workplace(folder, tmp_path, monkeypatch):
    """A copy of it for one page, of hard links: pages add files and change none."""
    shutil.copytree(folder, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def errors(monkeypatch):
    """All errors made from here on."""
    made = []

    def remember(self, *arguments):
        Exception.__init__(self, *arguments)
        made.append(self)

    monkeypatch.setattr(HopeprobeError, "__init__", remember)
    return made


def page(slug):
    return (PAGES / f"{slug}.md").read_text(encoding="utf-8")


def flat(text):
    return " ".join(text.split())


def subjects_of(text):
    """Names and statuses in the line under a page's title: errors, verdicts, `status N`."""
    line = text.splitlines()[2]
    return set(re.findall(r"`([\w/-]+)`", line)), set(map(int, re.findall(r"[Ss]tatus (\d+)", line)))


def package_errors():
    """Every kind of error meant for people that the package defines, by its name."""
    for package in ("hopeprobe", "hopeprobe.model", "hopeprobe.cli"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    found, waiting = {}, [HopeprobeError]
    while waiting:
        kinds = [k for k in waiting.pop().__subclasses__() if k.__module__.startswith("hopeprobe.")]
        found.update((kind.__name__, kind) for kind in kinds)
        waiting += kinds
    return found


STOPPING = {str(verdict) for verdict in Verdict} - {"learned", "at-init"}


def check_page(text, workplace, errors):
    """Run the page; AssertionError where it is not true, or its examples do not show what the line under it names."""
    names, statuses = subjects_of(text)
    assert statuses, "the line under the title names no status"
    said, ended = run_page(text, workplace)
    shown, kinds = flat(" ".join(said)), package_errors()
    for name in names:
        if name in STOPPING:
            assert name in shown, name
        else:
            assert kinds[name].exit_code in statuses, name
            assert any(type(e) is kinds[name] and flat(str(e)) in shown for e in errors), (
                f"no example shows {name}"
            )
    assert set(ended) - {0} <= statuses
    assert statuses - set(ended) <= {kinds[n].exit_code for n in names if n in kinds}


@pytest.mark.parametrize("slug", SLUGS)
def test_a_page_is_short_and_says_why_and_what_to_do(slug):
    lines = page(slug).splitlines()
    assert lines[0].startswith("# ")
    assert [line for line in lines if line.startswith("## ")] == ["## Why", "## What to do", "## See it"]
    assert len(lines) <= 60
    assert max(len(line) for line in lines) <= 120


@pytest.mark.slow  # the index trains models for them
@pytest.mark.parametrize("slug", SLUGS)
def test_a_page_is_true(slug, workplace, errors):
    check_page(page(slug), workplace, errors)


def test_every_page_is_in_the_index_and_every_message_there_on_its_page():
    index = INDEX.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\D.*) \| \[([\w-]+)\]\(([\w-]+)\.md\) \|$", index, re.MULTILINE)
    assert sorted(slug for _, slug, _ in rows) == SLUGS
    for said, slug, target in rows:
        assert slug == target
        told = flat(page(slug))
        for message in re.findall(r"`([^`]+)`", said):
            for part in message.split("..."):
                assert part.strip(" ,") in told, (slug, message)
    linked = {path for text in map(page, SLUGS) for path in re.findall(r"\]\(([^)]+)\)", text)}
    linked |= set(re.findall(r"\]\(([^)]+)\)", index))
    assert all((PAGES / path).exists() for path in linked)
    assert "](examples/errors/README.md)" in (PAGES.parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_error_every_verdict_that_stops_and_every_status_has_a_page():
    named = [subjects_of(page(slug)) for slug in SLUGS]
    kinds = package_errors()
    assert {"BadInputError", "MissingCapability", "HookNeverFiredError"} < set(kinds)
    assert set().union(*(names for names, _ in named)) == set(kinds) | STOPPING
    assert set().union(*(statuses for _, statuses in named)) == {0, 1, 2, 3, 4, 130}
    assert {kind.exit_code for kind in kinds.values()} <= {2, 3, 4}
    stated = set(map(int, re.findall(r"^\| (\d+) \|", INDEX.read_text(encoding="utf-8"), re.MULTILINE)))
    assert stated == {0, 1, 2, 3, 4, 130}


FALSE = {
    "another message": "$ hopeprobe probes surprize\nhopeprobe: no probe is called 'surprise' ...\n$ echo $?\n2\n",
    "another status": "$ hopeprobe probes surprize\nhopeprobe: no probe is called 'surprize'...\n$ echo $?\n3\n",
    "a status that is not shown": "$ hopeprobe probes surprize\nhopeprobe: no probe is called 'surprize'...\n",
    "no error any more": "$ hopeprobe probes surprise\nhopeprobe: no probe is called 'surprise'...\n$ echo $?\n2\n",
    "an error under dots alone": "$ hopeprobe probes surprize\n...\n$ echo $?\n2\n",
    "a command that fails": "$ cat nowhere\n...\n",
    "another exception": ">>> import hopeprobe\n>>> hopeprobe.load('x')\nTraceback (most recent call last):\n"
    "    ...\nhopeprobe.errors.MeasurementError: x does not exist...\n",
    "no exception any more": ">>> int('3')\nTraceback (most recent call last):\n    ...\nValueError: ...\n",
    "another value": ">>> 1 + 1\n3\n",
}


@pytest.mark.parametrize("what", FALSE)
def test_a_page_that_is_not_true_is_found(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = "python" if FALSE[what].startswith(">>>") else "console"
    with pytest.raises(AssertionError):
        run_page(f"# A page\n\n```{kind}\n{FALSE[what]}```\n", tmp_path)


TRUE = "$ hopeprobe probes surprize\nhopeprobe: no probe is called 'surprize'...\n$ echo $?\n2\n"
SHOWN = f"# A page\n\n{{}}\n\n```console\n{TRUE}```\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("`MissingCapability`, status 3.", "no example shows MissingCapability"),
        ("`BadInputError`, status 3.", "BadInputError"),
        ("`BadInputError`.", "names no status"),
        ("Verdict `collapsed`, status 2.", "collapsed"),
        ("`BadInputError`, status 2; status 4.", "4"),
        ("Status 4.", "2"),
    ],
)
def test_a_page_that_names_what_it_does_not_show_is_found(line, problem, tmp_path, monkeypatch, errors):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=problem):
        check_page(SHOWN.format(line), tmp_path, errors)
    check_page(SHOWN.format("`BadInputError`, status 2."), tmp_path, errors)


def test_a_page_that_is_true_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, statuses = run_page(f"```console\n{TRUE}```\n\n```python\n>>> 1 + 1\n2\n```\n", tmp_path)
    assert statuses == [2]
    assert said[0].startswith("hopeprobe: no probe is called 'surprize'; did you mean 'surprise'")
    assert said[1:] == ["2\n", "2\n"]
