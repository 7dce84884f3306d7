"""`hopeprobe report`: of runs, checkpoints and results, and of what is none of these."""

import json
import shutil

import pytest

import hopeprobe.cli.reporting


@pytest.fixture
def few(text):
    return "--data", text, "--tokens", 200, "--probe", "surprise"


def test_a_run_is_its_last_checkpoint_with_its_curve(call, trained, few, tmp_path):
    done = call("report", trained, *few, "-o", tmp_path / "report.html", "--files", tmp_path / "files")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert "step-000003.pt" in page
    assert f"Training: {trained.name}" in page
    assert f"<title>{trained.name}</title>" in page
    assert f"wrote {tmp_path / 'report.html'}" in done.out
    assert (tmp_path / "files" / "surprise.svg").exists()
    assert (tmp_path / "files" / f"training-{trained.name}.png").exists()


def test_results_are_not_measured_again_and_go_together(call, trained, few, tmp_path):
    for step in (0, 3):
        path = tmp_path / f"{step}.json"
        checkpoint = trained / f"step-00000{step}.pt"
        assert call("analyze", checkpoint, *few, "--format", "json", "--output", path).code == 0
    both = (tmp_path / "0.json", tmp_path / "3.json")
    done = call("report", *both, "--title", "two steps", "--output", tmp_path / "report.html")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert "surprise · step-000000.pt" in page
    assert "surprise · step-000003.pt" in page
    assert "<title>two steps</title>" in page
    twice = call("report", both[0], both[0], "-o", tmp_path / "twice.html")
    assert twice.code == 2
    assert "two rows have the key" in twice.err
    assert not (tmp_path / "twice.html").exists()


def test_two_runs_do_not_become_one(call, trained, few, tmp_path, monkeypatch):
    """Two runs' checkpoints have one name, and each its own probes: the page would show rows of both as of one."""
    other = tmp_path / "other" / "step-000003.pt"
    other.parent.mkdir()
    shutil.copy(trained / "step-000003.pt", other)
    path, page = tmp_path / "results.json", tmp_path / "report.html"
    asked = (*few[:4], "--probe", "integrity", "--format", "json", "--output")
    assert call("analyze", other, *asked, path).code == 0
    assert (
        call(
            "analyze", trained / "step-000003.pt", *few, "--format", "json", "--output", tmp_path / "b.json"
        ).code
        == 0
    )
    monkeypatch.setattr(
        hopeprobe.cli.reporting, "analyze", lambda *_, **__: pytest.fail("measured before it was refused")
    )
    for targets in ((path, tmp_path / "b.json"), (trained, path), (path, trained / "step-000003.pt")):
        done = call("report", *targets, "-o", page)
        assert done.code == 2, targets
        assert str(trained / "step-000003.pt") in done.err
        assert str(other) in done.err
        assert not page.exists()


def test_two_runs_in_folders_of_one_name_have_a_curve_each(call, trained, few, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name / "run")
    done = call("report", tmp_path / "a" / "run", tmp_path / "b" / "run", *few, "-o", tmp_path / "report.html",
                "--files", tmp_path / "files")  # fmt: skip
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    for name in ("a", "b"):
        assert f"Training: {name}/run" in page
        assert (tmp_path / "files" / f"training-{name}-run.svg").exists()


def test_what_is_missing_is_status_3_and_on_the_page(call, trained, few, tmp_path):
    path = tmp_path / "results.json"
    assert call("analyze", trained / "step-000003.pt", *few, "--format", "json", "--output", path).code == 0
    document = json.loads(path.read_text())
    document["checkpoint"]["missing"] = ["surprise: a hook never fired"]
    path.write_text(json.dumps(document))
    done = call("report", path, "-o", tmp_path / "report.html")
    assert done.code == 3
    assert "a hook never fired" in done.err
    assert "a hook never fired" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "option", [("--probe", "integrity"), ("--all",), ("--data", "builtin"), ("--tokens", 32_768)]
)
def test_results_are_not_measured_as_asked_without_a_word(call, trained, few, tmp_path, option):
    """Some say what the default is: they were typed all the same."""
    path, page = tmp_path / "results.json", tmp_path / "report.html"
    assert call("analyze", trained / "step-000003.pt", *few, "--format", "json", "--output", path).code == 0
    done = call("report", path, *option, "--output", page)
    assert done.code == 2
    assert done.err == (
        f"hopeprobe: {option[0]}: results are not measured again: leave it out, or name the checkpoints in place of "
        "results\n"
    )
    assert not page.exists()


def test_what_cannot_be_reported(call, trained, few, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "step-000001.pt").touch()
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for target, message in [
        (tmp_path / "empty", "it is no folder of a run\n"),
        (tmp_path / "runs", f"there are runs in it, for instance {tmp_path / 'runs' / 'a'}"),
        (tmp_path / "empty.json", "not a results document"),
        (tmp_path / "binary.json", "is no text"),
        (tmp_path / "none.pt", "none.pt"),
        (tmp_path / "none.json", "none.json"),
    ]:
        done = call("report", target, *few, "-o", tmp_path / "report.html")
        assert done.code == 2, target
        assert message in done.err, done.err
        assert "Traceback" not in done.err
        assert not (tmp_path / "report.html").exists()
