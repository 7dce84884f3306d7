"""What cannot be used: status 2, one line that names it, told before anything is measured, and nothing written."""

import os

import pytest

FEW = ("--split", "all", "--tokens", 600, "--probe", "surprise")


@pytest.fixture(scope="module")
def kept(trained, text, tmp_path_factory):
    """A folder with what goes wrong: a checkpoint and a baseline cut in half, an empty file and text, a baseline."""
    from hopeprobe.cli import run

    folder = tmp_path_factory.mktemp("kept")
    (folder / "folder").mkdir()
    (folder / "file").write_text("old")
    (folder / "empty.pt").touch()
    (folder / "empty.txt").touch()
    content = (trained / "step-000003.pt").read_bytes()
    (folder / "whole.pt").write_bytes(content)
    (folder / "half.pt").write_bytes(content[: len(content) // 2])
    given = ("baseline", folder / "whole.pt", "--data", text, *FEW, "--output", folder / "mech.json")
    assert run([str(word) for word in given]) == 0
    mech = (folder / "mech.json").read_bytes()
    (folder / "half.json").write_bytes(mech[: len(mech) // 2])
    return folder


@pytest.fixture
def refused(call, kept, text, monkeypatch):
    """Call a command in that folder, and see that it says why not, and leaves everything as it was."""
    monkeypatch.chdir(kept)

    def inner(*arguments):
        words = [str(text) if word == "TEXT" else word for word in arguments]
        before = {path: path.read_bytes() if path.is_file() else None for path in kept.rglob("*")}
        done = call(*words)
        assert done.code == 2, done.err
        assert done.err.startswith("hopeprobe: ")
        assert done.err.count("\n") == 1, "one line: nothing was measured before it"
        assert done.out == ""
        assert {path: path.read_bytes() if path.is_file() else None for path in kept.rglob("*")} == before
        return done.err

    return inner


def commands(checkpoint="whole.pt", data="TEXT", probe="surprise", baseline="mech.json"):
    few = ("--data", data, "--split", "all", "--tokens", 600, "--probe", probe)
    return {
        "analyze": ("analyze", checkpoint, *few, "--output", "out/o.txt"),
        "baseline": ("baseline", checkpoint, *few, "--output", "out/o.json"),
        "check": ("check", checkpoint, "--baseline", baseline, "--data", data, "--output", "out/o.tsv",
                  "--junit", "out/o.xml"),
        "report": ("report", checkpoint, *few[:2], *few[4:], "-o", "out/o.html", "--files", "out"),
        "export": ("export", checkpoint, "-o", "out/o.safetensors"),
        "train": ("train", "--preset", "nano", "--steps", 1, *few[:2], "--probe", probe, "--out", "out/run"),
    }  # fmt: skip


@pytest.mark.parametrize("command", ["analyze", "baseline", "check", "report", "export"])
@pytest.mark.parametrize(
    ("name", "why"), [("half.pt", "is damaged"), ("empty.pt", "is empty"), ("none.pt", "does not exist")]
)
def test_a_checkpoint(refused, command, name, why):
    said = refused(*commands(checkpoint=name)[command])
    assert name in said
    assert why in said


@pytest.mark.parametrize("command", ["analyze", "baseline", "report", "train"])
def test_a_probe(refused, command):
    assert "'surprize'; did you mean 'surprise'" in refused(*commands(probe="surprize")[command])


@pytest.mark.parametrize("command", ["analyze", "baseline", "check", "report", "train"])
def test_a_text(refused, command):
    assert "empty.txt is empty: it holds no document" in refused(*commands(data="empty.txt")[command])


@pytest.mark.parametrize("name", ["half.json", "empty.txt", "none.json", "folder"])
def test_a_baseline(refused, name):
    assert f"hopeprobe: {name} " in refused(*commands(baseline=name)["check"])


def test_results(refused):
    assert "half.json: not a results document" in refused("report", "half.json", "-o", "out/o.html")


OUTPUTS = [
    ("analyze", "out/o.txt"), ("baseline", "out/o.json"), ("check", "out/o.tsv"), ("check", "out/o.xml"),
    ("report", "out/o.html"), ("export", "out/o.safetensors"),
]  # fmt: skip


def written_to(command, output, place):
    return [place if word == output else word for word in commands()[command]]


@pytest.mark.parametrize(("command", "output"), OUTPUTS)
def test_a_file_to_write(refused, command, output):
    """What else the command could have written, it does not: a page without its figures, a table without JUnit's."""
    assert "cannot write folder: it is a folder" in refused(*written_to(command, output, "folder"))
    assert "cannot write file/deep/o: file is a file" in refused(*written_to(command, output, "file/deep/o"))
    assert "cannot write folder/../whole.pt: it is read" in refused(
        *written_to(command, output, "folder/../whole.pt")
    )


@pytest.mark.parametrize(("command", "output"), [*OUTPUTS, ("report", "out"), ("train", "out/run")])
def test_a_folder_that_nothing_may_be_written_in(refused, command, output, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "folder" not in str(path))
    assert "nothing may be written in folder" in refused(*written_to(command, output, "folder/new"))


@pytest.mark.parametrize(("command", "output"), [("report", "out"), ("train", "out/run")])
def test_a_folder_to_write(refused, command, output):
    assert "cannot write file: it is a file" in refused(*written_to(command, output, "file"))
    assert "cannot write file/deep: file is a file" in refused(*written_to(command, output, "file/deep"))


def test_figures_and_tables_of_an_analysis(refused):
    given = ("analyze", "whole.pt", "--data", "TEXT", *FEW)
    said = refused(*given, "--format", "json", "--output", "o.json", "--figures", "file")
    assert "cannot write file: it is a file" in said
    assert "cannot write folder: it is a folder" in refused(*given, "--format", "csv", "--output", "folder")


@pytest.mark.parametrize("command", ["analyze", "baseline", "train"])
@pytest.mark.parametrize("threshold", ["nan", "inf", "-inf"])
def test_a_threshold(refused, command, threshold):
    given = ("--gate", "absolute", "--gate-threshold", threshold)
    assert f"the gate's threshold is {threshold}, must be finite" in refused(*commands()[command], *given)


@pytest.mark.parametrize("seed", [2**63, 2**64])
def test_a_seed(refused, seed):
    assert "seed is a whole number of 6" in refused(*commands()["train"], "--seed", seed)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_what_says_that_there_are_several_processes(refused, monkeypatch, name):
    several = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for each, value in (several | {name: "x"}).items():
        monkeypatch.setenv(each, value)
    assert f"{name} is 'x' in the environment, must be a number" in refused("probes")


@pytest.mark.parametrize("record", ["[]", "{}", '{"train": []}', '{"train": 5}', "{"])
def test_the_record_of_a_run_to_resume(refused, kept, record):
    """It is looked at for the precision; that there is no run is what is wrong."""
    folder = kept / "no-run"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(record)
    given = ("train", "--preset", "nano", "--steps", 1, "--data", "empty.txt", "--resume", "--out", "no-run")
    assert "empty.txt is empty" in refused(*given)


def test_what_is_read_beside_checkpoints(refused, text):
    """The text, the baseline, and that of which the baseline says where it is."""
    few = ("--data", "TEXT", *FEW)
    assert "it is read too" in refused("analyze", "whole.pt", *few, "--output", text)
    assert "it is read too" in refused("baseline", "whole.pt", *few, "--output", text)
    assert "it is read too" in refused("report", "whole.pt", "--data", text, "-o", text)
    assert "it is read too" in refused(
        "check", "whole.pt", "--baseline", "mech.json", "--output", "mech.json"
    )
    assert "it is read too" in refused("check", "whole.pt", "--baseline", "mech.json", "--junit", text)
    twice = ("--junit", "o.xml", "--output", "./o.xml")
    assert "o.xml twice" in refused("check", "whole.pt", "--baseline", "mech.json", *twice)
