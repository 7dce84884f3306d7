"""The command line: what it prints and writes, its statuses, and one clear error for all that can be given wrong."""

import json
import pickle
import signal
import subprocess
import sys
import zipfile

import pytest
import torch

from hopeprobe.cli.analysis import save_figures
from hopeprobe.conditions import LIVE
from hopeprobe.errors import MeasurementError
from hopeprobe.probes import PROBES
from hopeprobe.probes.integrity import Integrity
from hopeprobe.results import ResultRow, Results


def analyze(call, checkpoint, text, *more):
    return call("analyze", checkpoint, "--data", text, "--split", "all", "--tokens", 4000, *more)


def test_help_names_every_command(call):
    done = call("--help")
    assert done.code == 0
    for command in (
        "demo",
        "train",
        "analyze",
        "baseline",
        "check",
        "ablate",
        "sweep",
        "compare",
        "hooks",
        "probes",
        "params",
    ):
        assert command in done.out


def test_version(call):
    assert call("--version").out.startswith("hopeprobe 0")


def test_table_shows_values_nulls_and_verdicts(call, trained, text):
    done = analyze(call, trained / "step-000003.pt", text, "--probe", "cms-similarity")
    assert done.code == 0, done.err
    for word in (
        "output_cosine",
        "delta_cosine",
        "own-init",
        "fresh-init",
        "shuffled",
        "analytic",
        "verdict",
        "95 %",
    ):
        assert word in done.out


def test_an_untrained_checkpoint_is_called_so(call, trained, text, tmp_path):
    probes = ("--probe", "integrity", "--probe", "cms-similarity")
    check_untrained(call, trained, text, tmp_path / "untrained.json", *probes)


@pytest.mark.slow  # every condition of every probe is run on twelve models
@pytest.mark.timeout(1800)
def test_no_probe_finds_that_an_untrained_checkpoint_has_learned(call, trained, text, tmp_path):
    rows = check_untrained(call, trained, text, tmp_path / "untrained.json", "--all")
    assert {r["probe"] for r in rows} == set(PROBES)
    assert "learned" not in {r["verdict"] for r in rows}


def check_untrained(call, trained, text, out, *probes):
    done = analyze(
        call, trained / "step-000000.pt", text, *probes, "--tokens", 2100, "--format", "json", "--output", out
    )
    assert done.code == 0, done.err
    rows = json.loads(out.read_text())["results"]
    assert {r["verdict"] for r in rows if r["probe"] == "integrity" and r["statistic"] == "frozen_loss"} == {
        "untrained"
    }
    assert {r["verdict"] for r in rows if r["probe"] == "cms-similarity"} == {"at-init"}
    return rows


def test_json_is_one_strict_document_with_the_fingerprint(call, trained, text):
    done = analyze(call, trained / "step-000003.pt", text, "--probe", "integrity", "--format", "json")
    document = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {"schema_version", "hopeprobe", "torch", "checkpoint", "data", "results", "nulls"} <= set(document)
    assert "fingerprint" in json.dumps(document["data"])


def test_csv_is_two_tables(call, trained, text, tmp_path):
    done = analyze(
        call,
        trained / "step-000003.pt",
        text,
        "--probe",
        "cms-similarity",
        "--format",
        "csv",
        "--output",
        tmp_path / "r.csv",
    )
    assert done.code == 0, done.err
    assert (tmp_path / "r.csv").read_text().startswith("probe,statistic,checkpoint,step,layer")
    assert "null_kind" in (tmp_path / "r.nulls.csv").read_text()


def test_table_to_a_file_and_a_figure(call, trained, text, tmp_path):
    done = analyze(
        call,
        trained / "step-000003.pt",
        text,
        "--probe",
        "cms-similarity",
        "--output",
        tmp_path / "t.txt",
        "--figures",
        tmp_path,
    )
    assert done.code == 0, done.err
    assert "delta_cosine" in (tmp_path / "t.txt").read_text()
    assert (tmp_path / "cms-similarity.png").stat().st_size > 10_000


class Broken(Integrity):
    """Cannot be measured."""

    name = "broken"

    def conditions(self, subject):
        return (LIVE,)

    def accumulator(self, subject, condition, windows):
        made = super().accumulator(subject, condition, windows)
        made.update = self.update
        return made

    def update(self, cache, losses, scored, batch):
        raise MeasurementError("planted: not finite at 3 of 600 tokens")

    def of_model(self, subject, initial, windows):
        return ()


@pytest.fixture
def broken_first(monkeypatch):
    """One probe that cannot be measured and one that can: --all takes both."""
    for name in list(PROBES):
        monkeypatch.delitem(PROBES, name)
    for probe in (Broken(), Integrity()):
        monkeypatch.setitem(PROBES, probe.name, probe)


def analyze_quickly(call, trained, text, *more):
    return call(
        "analyze", trained / "step-000003.pt", "--data", text, "--split", "all", "--tokens", 600, *more
    )


def test_a_probe_that_fails_leaves_the_others_results_and_status_3(
    call, trained, text, tmp_path, broken_first
):
    out, figures = tmp_path / "out.json", tmp_path / "figures"
    options = ("--all", "--format", "json", "--output", out, "--figures", figures)
    done = analyze_quickly(call, trained, text, *options)
    assert done.code == 3
    message = "step-000003.pt: broken (live): planted: not finite at 3 of 600 tokens"
    assert f"not measured: {message}" in done.err
    assert "Traceback" not in done.err
    document = json.loads(out.read_text())
    assert document["checkpoint"]["missing"] == [message]
    assert {row["probe"] for row in document["results"]} == {"integrity"}
    assert {"frozen_loss", "distance_from_init"} <= {row["statistic"] for row in document["results"]}
    assert [path.name for path in figures.iterdir()] == ["integrity.png"]


def test_where_nothing_could_be_measured_nothing_is_written(call, trained, text, tmp_path, broken_first):
    out = tmp_path / "out.json"
    done = analyze_quickly(call, trained, text, "--probe", "broken", "--format", "json", "--output", out)
    assert done.code == 3
    assert "nothing could be measured" in done.err
    assert "planted" in done.err
    assert not out.exists()


@pytest.mark.slow
def test_train_then_resume(call, text, tmp_path):
    options = ("train", "--preset", "nano", "--data", text, "--batch", 1, "--out", tmp_path / "run")
    assert call(*options, "--steps", 1).code == 0
    again = call(*options, "--steps", 2)
    assert (again.code, "--resume" in again.err) == (2, True)
    assert call(*options, "--steps", 2, "--resume").code == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    changed = call(*options, "--steps", 3, "--resume", "--learning-rate", 0.5)
    assert changed.code == 2
    assert "learning_rate was 0.003, is 0.5" in changed.err


def test_export_writes_safetensors(call, trained, tmp_path):
    done = call("export", trained / "step-000003.pt", "-o", tmp_path / "weights.safetensors")
    assert done.code == 0
    assert (tmp_path / "weights.safetensors").stat().st_size > 1000
    wrong = call("export", trained / "step-000004.pt", "-o", tmp_path / "none.safetensors")
    assert wrong.code == 2
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.slow
def test_probes_run_while_it_trains(call, text, tmp_path):
    given = (
        "train",
        "--preset",
        "nano",
        "--steps",
        2,
        "--batch",
        1,
        "--data",
        text,
        "--out",
        tmp_path / "run",
    )
    done = call(*given, "--probe", "surprise", "--probe-every", 2, "--probe-tokens", 100)
    assert done.code == 0, done.err
    assert "probes every 2 steps" in done.out
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["probes" in line for line in logged] == [False, True]
    assert logged[1]["probes"]["surprise/mean_loss/live"]["value"] > 0
    wrong = call(*given[:-1], tmp_path / "other", "--probe", "surprize")
    assert wrong.code == 2
    assert "did you mean 'surprise'" in wrong.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("command", "option", "value", "lacking"),
    [
        ("train", "--probe-every", 100, "--probe"),
        ("train", "--probe-tokens", 5, "--probe"),
        ("ablate", "--probe-steps", 1, "--probes"),
        ("ablate", "--probe-tokens", 5, "--probes"),
    ],
)
def test_how_to_probe_says_nothing_without_a_probe(call, text, tmp_path, command, option, value, lacking):
    done = call(command, "--data", text, "--steps", 1, "--out", tmp_path / "run", option, value)
    assert done.code == 2
    assert f"{option}: no probe runs: name" in done.err
    assert done.err.endswith(f"with {lacking}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # four analyses
def test_a_gate_is_trained_with_kept_and_replaced(call, text, tmp_path):
    out = tmp_path / "run"
    gate = ["--gate", "excess", "--budget", "0.25"]
    done = call("train", "--preset", "nano", "--data", text, "--steps", "2", "--out", out, *gate)
    assert done.code == 0, done.err
    written = json.loads((out / "run.json").read_text())["model"]["gate"]
    assert (written["rule"], written["budget"]) == ("excess", 0.25)
    rates = [json.loads(line)["gate_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0.2 < rate < 0.3 for rate in rates)
    ckpt = out / "step-000002.pt"
    asked = [
        "analyze",
        ckpt,
        "--probe",
        "gate-selectivity",
        "--data",
        text,
        "--tokens",
        "512",
        "--format",
        "json",
    ]

    def rate(*options):
        done = call(*asked, *options)
        assert done.code == 0, done.err
        document = json.loads(done.out)
        rows = [r for r in document["results"] if (r["statistic"], r["component"]) == ("pass_rate", "in use")]
        return rows[0]["value"], document["checkpoint"]

    own, described = rate()
    assert 0.2 < own < 0.3
    assert "gate" not in described
    other, described = rate("--gate", "quantile", "--budget", "0.5")
    assert 0.45 < other < 0.55
    assert described["gate"] == {"rule": "quantile", "budget": 0.5, "threshold": None, "writes": "all"}
    assert rate("--gate", "absolute", "--gate-threshold", "100")[0] == 0.0
    resumed = call("train", "--preset", "nano", "--data", text, "--steps", "3", "--out", out, "--resume")
    assert resumed.code == 2
    assert "another model configuration" in resumed.err
    assert (
        call(
            "train", "--preset", "nano", "--data", text, "--steps", "3", "--out", out, "--resume", *gate
        ).code
        == 0
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gate", "quantil", "--budget", "0.1"], "did you mean 'quantile'"),
        (["--gate", "quantile"], "needs a budget"),
        (
            ["--gate", "zscore", "--budget", "0.1", "--gate-threshold", "1"],
            "a budget or a threshold, one of the two",
        ),
        (["--gate", "absolute", "--budget", "0.1"], "'quantile' writes a budget"),
        (["--gate", "oracle", "--budget", "0.1"], "no model can gate by it"),
        (["--budget", "0.1"], "--budget is about a gate"),
        (["--gate-writes", "cms"], "--gate-writes is about a gate"),
        (["--gate", "random", "--budget", "1.5"], "must be above 0 and at most 1"),
        (["--gate", "quantile", "--budget", "0.1", "--gate-writes", "titans"], "no writes of 'titans'"),
    ],
)
def test_gates_that_cannot_be(call, trained, text, tmp_path, options, expected):
    done = call(
        "train", "--preset", "nano", "--data", text, "--steps", "2", "--out", tmp_path / "run", *options
    )
    assert done.code == 2
    assert expected in done.err
    assert not (tmp_path / "run").exists()
    ckpt = trained / "step-000003.pt"
    done = call("analyze", ckpt, "--probe", "surprise", "--data", text, "--tokens", "512", *options)
    assert done.code == 2
    assert expected in done.err
    assert "Traceback" not in done.err


def test_hooks_probes_params(call, trained):
    hooks = call("hooks", trained / "step-000003.pt", "--pattern", "*.cms.fast.*")
    assert (hooks.code, "blocks.0.cms.fast.hook_delta" in hooks.out) == (0, True)
    assert call("hooks", trained / "step-000003.pt", "--format", "markdown").out.startswith(
        "| name | shape |"
    )
    listed = call("probes").out
    assert [name for name in PROBES if name not in listed] == []
    told = call("probes", "surprise", "cms-similarity")
    assert told.code == 0
    for name in ("surprise", "cms-similarity"):
        assert PROBES[name].describe() in told.out
    wrong = call("probes", "surprise", "surprize")
    assert (wrong.code, "did you mean 'surprise'" in wrong.err, wrong.out) == (2, True, "")
    params = call("params").out
    assert all(size in params for size in ("~19M", "~73.1M", "23.13M", "80.37M"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


BAD_FILES = ("empty", "half", "text", "pickle", "torch-code", "foreign", "missing", "folder")


def bad_file(kind, folder, good):
    path = folder / f"{kind}.pt"
    content = good.read_bytes()
    if kind == "empty":
        path.touch()
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(folder / "executed")))
    elif kind == "torch-code":
        torch.save({"format": "hopeprobe-hope", "x": Evil(folder / "executed")}, path)
    elif kind == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("command", ["analyze", "hooks"])
def test_bad_checkpoint_files(call, trained, text, tmp_path, kind, command):
    path = bad_file(kind, tmp_path, trained / "step-000003.pt")
    more = ("--probe", "integrity", "--data", text, "--format", "json", "--output", tmp_path / "out.json")
    done = call(command, path, *(more if command == "analyze" else ()))
    assert done.code == 2
    assert path.name in done.err
    assert done.err.count("hopeprobe: ") == 1
    assert "Traceback" not in done.err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out.json").exists()


def test_a_checkpoint_with_a_byte_changed_inside(call, trained, text, tmp_path):
    """The zip's checksum sees a flipped bit in a weight; nothing may be measured on it."""
    path = tmp_path / "flipped.pt"
    content = bytearray((trained / "step-000003.pt").read_bytes())
    with zipfile.ZipFile(trained / "step-000003.pt") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 0x40
    path.write_bytes(bytes(content))
    done = call("analyze", path, "--probe", "integrity", "--data", text, "--split", "all", "--tokens", 500)
    assert done.code == 2
    assert "flipped.pt" in done.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--probe", "cms-similarty"], "cms-similarity"),
        (["--all", "--probe", "cms-similarty"], "cms-similarity"),
        (["--probe", "integrity", "--tokens", 10**9], "tokens"),
        (["--probe", "integrity", "--split", "heldot"], "heldout"),
        (["--probe", "integrity", "--format", "jsn"], "json"),
        (["--probe", "integrity", "--format", "csv"], "--output"),
        (["--probe", "integrity", "--carry", "windw"], "window"),
        ([], "--all"),
    ],
)
def test_bad_options_offer_what_was_meant(call, trained, text, options, expected):
    done = call("analyze", trained / "step-000003.pt", "--data", text, *options)
    assert done.code == 2
    assert expected in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("one.txt", b"a"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 50),
        ("broken.jsonl", b'{"text": "a b c"'),
    ],
)
def test_bad_text(call, trained, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for command in (
        ("analyze", trained / "step-000003.pt", "--probe", "integrity"),
        ("train", "--steps", 1, "--out", tmp_path / "run"),
    ):
        done = call(*command, "--data", tmp_path / name)
        assert done.code == 2
        assert name in done.err
        assert not (tmp_path / "run").exists()


def test_a_wrong_hook_name(call, trained):
    done = call("hooks", trained / "step-000003.pt", "--pattern", "blocks.0.cms.fast.hook_detla")
    assert done.code == 2
    assert "hook_delta" in done.err


@pytest.mark.parametrize(
    "command",
    [
        ("analyze", "CKPT", "--probe", "integrity", "--format", "json", "--output", "file/out"),
        ("analyze", "CKPT", "--probe", "integrity", "--figures", "file"),
        ("baseline", "CKPT", "--output", "file/out"),
        ("check", "CKPT", "--baseline", "none.json", "--output", "file/out"),
        ("check", "CKPT", "--baseline", "none.json", "--junit", "file/out"),
        ("report", "CKPT", "--output", "file/out"),
        ("report", "CKPT", "--output", "page.html", "--files", "file"),
    ],
    ids=lambda command: f"{command[0]} {command[-2]}",
)
def test_an_output_that_cannot_be_written_is_told_before_anything_is_measured(
    call, trained, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    done = call(*(trained / "step-000003.pt" if word == "CKPT" else word for word in command))
    assert done.code == 2
    what = "it" if command[-1] == "file" else "file"
    assert (
        done.err
        == f"hopeprobe: cannot write {command[-1]}: {what} is a file, not a folder; choose another place\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_path_is_printed_as_it_is(call, text, tmp_path):
    folder = tmp_path / "runs[lr3]"
    done = call("train", "--preset", "nano", "--data", text, "--batch", 1, "--steps", 1, "--out", folder)
    assert done.code == 0, done.err
    assert f"next: hopeprobe analyze {folder}/step-000001.pt" in done.out


@pytest.mark.slow
def test_tokenising_does_not_print_a_line_a_document(call, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "empty"))
    options = ("--preset", "nano", "--batch", 1, "--steps", 1)
    done = call("train", "--data", text, *options, "--out", tmp_path / "run")
    assert done.err.count("tokenising") <= 2


@pytest.mark.parametrize("command", ["analyze", "hooks"])
def test_a_name_too_long_for_the_system(call, command):
    done = call(command, "x" * 5000, *(("--probe", "integrity") if command == "analyze" else ()))
    assert done.code == 2
    assert "too long" in done.err


@pytest.mark.slow
def test_several_checkpoints_have_a_figure_each(call, trained, text, tmp_path):
    done = call(
        "analyze", trained / "step-000001.pt", trained / "step-000003.pt", "--probe", "cms-similarity",
        "--data", text, "--split", "all", "--tokens", 2000, "--figures", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "cms-similarity-step-000001.png",
        "cms-similarity-step-000003.png",
    }


def test_figures_whose_names_are_one_file_are_several(tmp_path):
    names = ("a b.pt", "a-b.pt", "A/b.pt")
    rows = [
        ResultRow(
            probe="surprise", statistic="mean_loss", checkpoint=name, value=1.0, unit="nats", n_tokens=9, n_groups=1,
            dtype="float32", verdict="inconclusive",
        )
        for name in names
    ]  # fmt: skip
    written = save_figures(Results(rows), tmp_path)
    assert [path.name for path in written] == ["surprise-a-b.png", "surprise-a-b-2.png", "surprise-A-b-3.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_a_full_disk_while_metrics_are_written(call, text, tmp_path, monkeypatch):
    import json as module

    import hopeprobe.model.metrics as metrics

    class Full:
        def __getattr__(self, name):
            return getattr(module, name)

        def dumps(self, content, **more):
            if "step" in content:
                raise OSError(28, "No space left on device")
            return module.dumps(content, **more)

    monkeypatch.setattr(metrics, "json", Full())
    done = call("train", "--data", text, "--batch", 1, "--steps", 2, "--out", tmp_path / "run")
    assert done.code == 2
    assert "metrics.jsonl" in done.err
    assert "No space left" in done.err


def test_debug_shows_the_traceback(call):
    from hopeprobe.errors import BadInputError

    with pytest.raises(BadInputError):
        call("hooks", "nowhere.pt", "--debug")


def test_divergence_is_status_4(call, text, tmp_path):
    done = call(
        "train",
        "--data",
        text,
        "--steps",
        40,
        "--batch",
        1,
        "--learning-rate",
        1e30,
        "--out",
        tmp_path / "run",
    )
    assert done.code == 4
    assert "step" in done.err
    assert "last good checkpoint" in done.err


def test_an_interrupt_is_status_130(monkeypatch, call, text, tmp_path):
    import hopeprobe.cli.training as training

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    done = call("train", "--data", text, "--out", tmp_path / "run")
    assert done.code == 130
    assert "interrupted" in done.err


def test_a_second_interrupt_waits_for_nothing(monkeypatch):
    import hopeprobe.cli as cli

    left = []
    monkeypatch.setattr("os._exit", left.append)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            cli._interrupt(signal.SIGINT, None)
        assert not left
        signal.raise_signal(signal.SIGINT)
        assert left == [130]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("hopeprobe", ("torch", "pandas", "datasets", "seaborn", "scipy")),
        ("hopeprobe.cli.app", ("torch", "pandas", "datasets", "seaborn")),
    ],
)
def test_what_starts_quickly_imports_little(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
