"""Kinds of file that are text: results, baselines, maps, records of grids, cells and runs, tables, and data."""

from __future__ import annotations

import codecs
import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import kinds as k
from kinds import EXAMPLES, Kind
from mutations import BYTES, CSV, JSON, LINES, TEXT, TOML
from torch_mutations import CHECKPOINT, OLD, SAFETENSORS

from hopeprobe.errors import HopeprobeError
from hopeprobe.model.metrics import MetricsFile, read_metrics
from hopeprobe.regression.baseline import Baseline
from hopeprobe.results import NullRow, ResultRow, Results
from hopeprobe.study.grid import read_grid
from hopeprobe.study.probed import read_probed


def _results() -> Results:
    def row(value: float, layer: int, verdict: str, **changed: Any) -> ResultRow:
        fields: dict[str, Any] = {
            "probe": "cms-similarity", "statistic": "output_cosine", "checkpoint": "step-000200.pt", "step": 200, "unit": "1",
            "ci_low": value - 0.1, "ci_high": value + 0.1, "n_tokens": 4096, "n_groups": 64, "dtype": "float32",
            "component": "fast|slow", "smallest_effect": 0.05,
        }  # fmt: skip
        return ResultRow(value=value, layer=layer, verdict=verdict, **fields | changed)

    rows = (
        row(0.25, 0, "learned"),
        row(-0.5, 1, "at-init"),
        row(2.0, 2, "inconclusive", probe="mine", note="a note"),
    )
    nulls = [
        NullRow(probe=r.probe, statistic=r.statistic, checkpoint=r.checkpoint, step=r.step, layer=r.layer,
                component=r.component, null_kind="own-init", value=0.5, low=0.4, high=0.6, n=9)
        for r in rows
    ]  # fmt: skip
    described = {
        "name": "step-000200.pt",
        "path": "runs/a/step-000200.pt",
        "seed": 3,
        "missing": ["gate: no gate"],
    }
    return Results(
        rows, nulls, checkpoint=described, data={"name": "text.jsonl", "fingerprint": "abc", "tokens": 4096}
    )


def _rendered(found: Results) -> None:
    """As every command would show it; figures where the file says so little that they are cheap."""
    from hopeprobe.cells import by_probe
    from hopeprobe.cli.tables import result_tables
    from hopeprobe.cli.terminal import console
    from hopeprobe.report import page
    from hopeprobe.report.export import as_latex, file_names

    screen = console()
    screen.file = io.StringIO()
    for table in result_tables(found):
        screen.print(table)
    assert "\x1b" not in screen.file.getvalue(), "an escape sequence reached the terminal"
    figure, page._figure = page._figure, lambda *_: ""
    try:
        text = page.as_page(found) if found.rows else ""
    finally:
        page._figure = figure
    assert "<script>alert" not in text, "a script in the page"
    found.write_csv("out/results.csv")
    for checkpoint, probe in by_probe(found):
        as_latex(found, checkpoint, probe)
    for name in file_names(f"{probe}, {one}" for one, probe in by_probe(found)).values():
        written = Path("out") / f"{name}.tex"
        assert written.resolve().parent == Path("out").resolve(), f"{name} leads out"
        written.write_text("")


def use_results(path: Path) -> Any:
    found = Results.read_json(path)
    again = found.to_json()
    assert Results.from_json(again).to_json() == again
    if found.rows:
        _rendered(found)
    return again


def _agrees_with_json(content: bytes, answer: Any) -> bool:
    """Every number and text of the rows as Python's own reader has them, defaults where the file says nothing."""
    theirs, ours = json.loads(content.decode("utf-8-sig")), json.loads(answer)
    for part in ("results", "nulls"):
        for one, other in zip(theirs[part], ours[part], strict=True):
            if any(other[name] != value for name, value in one.items()):
                return False
    return all(theirs[name] == ours[name] for name in ("hopeprobe", "torch")) and len(
        theirs["results"]
    ) == len(ours["results"])


def _baseline(_: Path) -> bytes:
    rows = [
        {"probe": "surprise", "statistic": "loss", "layer": layer, "component": "", "condition": "live", "position": "",
         "unit": "nats", "values": [2.5], "verdicts": ["learned"], "ci_low": [2.4], "ci_high": [2.6],
         "smallest_effect": 0.01, "noise": 1e-6, "tolerance": 0.05}
        for layer in (None, 0, 1)
    ]  # fmt: skip
    document = {
        "kind": "hopeprobe-baseline", "schema_version": 1, "hopeprobe": "0.1.0", "torch": "2.13",
        "settings": {"probes": ["surprise"], "data": ["builtin"], "tokens": 4096, "split": "heldout", "carry": "window",
                     "gate": {"rule": "quantile", "budget": 0.5, "threshold": None, "writes": "all"}},
        "data": {"name": "builtin", "fingerprint": "ab", "tokens": 4096},
        "checkpoints": [{"name": "a.pt", "seed": 0, "step": 7, "identity": "aa"}],
        "statistics": rows, "unmeasured": [{**{k: rows[0][k] for k in ("probe", "layer", "component", "condition", "position")},
                                            "statistic": "gap"}],
    }  # fmt: skip
    return Baseline.from_json(json.dumps(document)).to_json().encode()


def use_baseline(path: Path) -> Any:
    from hopeprobe.cli.regression import _kept, _reading
    from hopeprobe.cli.terminal import console

    found = Baseline.read(path)
    screen = console()
    screen.file = io.StringIO()
    screen.print(_kept(found))
    _reading(found), found.dead, found.unresolved
    assert "\x1b" not in screen.file.getvalue(), "an escape sequence reached the terminal"
    again = found.to_json()
    assert Baseline.from_json(again) == found or "NaN" in repr(found) or "nan" in repr(found)
    return again


def _baseline_agrees(content: bytes, answer: Any) -> bool:
    theirs, ours = json.loads(content.decode("utf-8-sig")), json.loads(answer)
    pairs = zip(theirs["statistics"], ours["statistics"], strict=True)
    return all(other[name] == value for one, other in pairs for name, value in one.items())


def use_map(path: Path) -> Any:
    from hopeprobe.mapping.files import built
    from hopeprobe.mapping.spec import read_map

    found = read_map(path)
    try:
        built(found, {}, path)
    except HopeprobeError as error:
        if str(path) not in str(error):
            raise ValueError(f"it does not name the file: {error}") from None
    return repr((found.model, found.points, found.memories, found.groups))


def _grid(_: Path) -> bytes:
    return (EXAMPLES / "study/nano/ablation.json").read_bytes()


def use_grid(path: Path) -> Any:
    from hopeprobe.cli.study import show_grids
    from hopeprobe.cli.terminal import console
    from hopeprobe.study import compare
    from hopeprobe.study.writing import write_tables

    found = read_grid(path)
    compared = compare(path)
    screen = console()
    screen.file = io.StringIO()
    show_grids(compared, screen)
    assert "\x1b" not in screen.file.getvalue(), "an escape sequence reached the terminal"
    write_tables(found, Path("out"))
    return json.dumps(found.to_dict())


def _grid_agrees(content: bytes, answer: Any) -> bool:
    theirs, ours = json.loads(content.decode("utf-8-sig")), json.loads(answer)
    return all(
        ours["cells"][i][name] == value
        for i, cell in enumerate(theirs["cells"])
        for name, value in cell.items()
    )


def _cell(_: Path) -> bytes:
    cell = json.loads(_grid(Path()))["cells"][0]
    record = {**cell, "identity": "abc", "shared": {"preset": "nano", "train": {"steps": 4}, "tokens": 10, "model": {}, "data": {}},
              "evaluation": {"tokens": 10, "documents": 3}, "epochs": 0.1, "machine": {"processor": "x", "cores": 2, "device": "cpu"},
              "versions": {"hopeprobe": "0.1.0", "torch": "2"}}  # fmt: skip
    return json.dumps(record, indent=1).encode()


def use_cell(path: Path) -> Any:
    from hopeprobe.cli.study import grid_of
    from hopeprobe.model.grid import known_cells

    whole = json.loads(_cell(Path()))
    target = path.parent / "full/seed-0/cell.json"
    target.parent.mkdir(parents=True)
    path.rename(target)
    try:
        records = known_cells(path.parent, whole["shared"])
        if records:
            records[0]["shared"] |= json.loads(_grid(Path()))  # what this toy record lacks of a grid's
            return repr(grid_of(records, path.parent).cells)
    except HopeprobeError as error:
        told = str(error).replace(str(path.parent / "*/seed-*/cell.json"), str(path))
        raise type(error)(told.replace(str(target), str(path))) from None
    finally:
        target.unlink()
        target.parent.rmdir()
        target.parent.parent.rmdir()
    return "none that fits"


def _metrics(_: Path) -> bytes:
    lines = [
        {"step": i, "loss": 10 / i, "surprise_min": 0.1, "tokens_per_s": 1e3, "held_out_live": 3.0}
        for i in range(1, 9)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def use_metrics(path: Path) -> Any:
    from hopeprobe.errors import MeasurementError
    from hopeprobe.plots.loss import _points, _records

    target = path.with_name("metrics.jsonl")
    path.rename(target)
    try:
        found = [(step, line) for step, line, _ in read_metrics(target)]
        for key in ("loss", "held_out_live"):
            _points(_records(target), key)
        assert MetricsFile(target.parent, 5).kept == [line for step, line in found if step <= 5]
        return repr(found)
    except MeasurementError:
        return "nothing to draw"
    except HopeprobeError as error:
        raise type(error)(str(error).replace(str(target), str(path))) from None
    finally:
        target.unlink(missing_ok=True)


def _metrics_agree(content: bytes, answer: Any) -> bool:
    theirs = []
    text, used = codecs.utf_8_decode(content, "strict", False)  # as far as characters are whole
    if used < len(content):  # the last line is cut off within one
        text = text[: text.rfind("\n") + 1]
    for line in text.removeprefix("\ufeff").split("\n"):
        try:
            theirs.append((json.loads(line)["step"], line))
        except (ValueError, RecursionError):
            continue
    return bool(answer == repr(theirs))


def use_run_json(path: Path) -> Any:
    from hopeprobe.model.cell import _began

    return _began(path)["first_batch"]


def use_probed(path: Path) -> Any:
    target = path.with_name("probes.csv")
    path.rename(target)
    try:
        return repr([dataclasses.asdict(row) for row in read_probed(target)])
    except HopeprobeError as error:
        raise type(error)(str(error).replace(str(target), str(path))) from None
    finally:
        target.unlink()


def _probed(_: Path) -> bytes:
    lines = (EXAMPLES / "study/tiny/probes.csv").read_bytes().split(b"\n")
    return b"\n".join([*lines[:40], b""])


def use_data(path: Path) -> Any:
    from hopeprobe.tokens import load_tokens
    from hopeprobe.tokens.sources import read_documents

    found = load_tokens(str(path), cache_dir="cache/tokens", max_tokens=20_000)
    assert found.n_tokens() == len(found.tokens) <= 20_000
    assert int(found.tokens.max()) < found.vocab_size
    found.identity()
    answer = [document.text for _, document in zip(range(2000), read_documents(str(path)), strict=False)]
    Path("cache/tokens").joinpath(next(p.name for p in Path("cache/tokens").glob("*.tokens"))).unlink()
    return repr(answer)


def _jsonl_agrees(content: bytes, answer: Any) -> bool:
    lines = content.decode().split("\n")
    texts = [
        json.loads(line.removeprefix("\ufeff"))["text"]
        for line in lines
        if line.removeprefix("\ufeff").strip()
    ]
    return bool(answer == repr([text for text in texts if text is not None][:2000]))


def _txt(_: Path) -> bytes:
    return ("Some text, as it is: ünïcödé, 日本語, \U0001f600.\n" * 20).encode()


def _parquet(_: Path) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    table = pa.table({"text": [f"document {i} with some words" for i in range(50)], "n": list(range(50))})
    pq.write_table(table, file)
    return file.getvalue()


def change_columns(content: bytes, rng: random.Random) -> bytes:
    """Another table that is whole: text of another type, nested, missing, and texts that a dictionary repeats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    deep: Any = 1
    for _ in range(rng.choice([2, 40])):
        deep = [deep]
    columns = rng.choice([
        {"text": [1, 2]}, {"text": [["a"], ["b"]]}, {"txt": ["a b"]}, {}, {"text": [b"\xff\xfe", b"a"]}, {"text": [None, None]},
        {"text": ["x" * 300_000] * 3000}, {"text": [""] * 5}, {"text": [deep]}, {"text": pa.array(["a b", "c d"]).dictionary_encode()},
        {"text": pa.array(["a b c"], pa.large_string())}, {"text": ["a\x00b", "\ud7ff"]}, {"text": pa.nulls(9)},
    ])  # fmt: skip
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression=rng.choice(["snappy", "zstd", "gzip", "none"]))
    return file.getvalue()


def _parquet_agrees(content: bytes, answer: Any) -> bool:
    import pyarrow.parquet as pq

    texts = [
        t for t in pq.read_table(io.BytesIO(content), columns=["text"]).column(0).to_pylist() if t is not None
    ]
    return bool(answer == repr(texts[:2000]))


KINDS: dict[str, Kind] = {
    "checkpoint": Kind("a.pt", k._saved(False), k.use_checkpoint, {**BYTES, **CHECKPOINT}, k._agrees_with_torch, exact=True),
    "resumed checkpoint": Kind("a.pt", k._saved(True), k.use_resumed, {**BYTES, **CHECKPOINT}, None, exact=True,
                               instead=("nothing to resume",), resealed=("change_content", "change_pickle")),
    "state dict in the old format": Kind("a.pt", k._old, k.use_state_dict, {**BYTES, **OLD}, k._agrees_with_torch_alone),
    "safetensors": Kind("a.safetensors", k._exported, k.use_checkpoint, {**BYTES, **SAFETENSORS}, k._agrees_with_header, exact=True),
    "token cache": Kind("a.tokens", k._token_file, k.use_token_cache,
                        {**BYTES, "change_footer": k.change_footer, "change_tables": k.change_tables}, None, exact=True),
    "null cache": Kind("a.json", k._null_file, k.use_null_cache, {**BYTES, **JSON, "change_payload": k.change_payload}, None, exact=True,
                       instead=("None",), resealed=("change_payload",)),
    "results": Kind("a.json", lambda _: _results().to_json().encode(), use_results, {**BYTES, **JSON}, _agrees_with_json),
    "baseline": Kind("a.json", _baseline, use_baseline, {**BYTES, **JSON}, _baseline_agrees),
    "map": Kind("a.toml", lambda _: k.MAP.encode(), use_map, {**BYTES, **TOML}),
    "record of a grid": Kind("a.json", _grid, use_grid, {**BYTES, **JSON}, _grid_agrees),
    "record of a cell": Kind("a.json", _cell, use_cell, {**BYTES, **JSON}),
    "metrics.jsonl": Kind("a.jsonl", _metrics, use_metrics, {**BYTES, **LINES}, _metrics_agree),
    "run.json": Kind("a.json", lambda _: json.dumps({"first_batch": "ab", "model": {"dim": 8}}).encode(), use_run_json, {**BYTES, **JSON}),
    "probes.csv": Kind("a.csv", _probed, use_probed, {**BYTES, **CSV}),
    "text .jsonl": Kind("a.jsonl", lambda _: k.TEXT_LINES.encode(), use_data, {**BYTES, **LINES}, _jsonl_agrees),
    "text .txt": Kind("a.txt", _txt, use_data, {**BYTES, **TEXT}, lambda c, a: a == repr([c.decode().removeprefix("\ufeff")])),
    "text .parquet": Kind("a.parquet", _parquet, use_data, {**BYTES, "change_columns": change_columns}, _parquet_agrees),
}  # fmt: skip
"""Every kind, by what reports call it."""
