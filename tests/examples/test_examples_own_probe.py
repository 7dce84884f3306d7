"""The example of a probe of one's own: short, right, told in the guide as it is, and run as a reader would run it."""

import ast
import dataclasses
import importlib.util
import io
import json
import random
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

import hopeprobe
from hopeprobe.model.config import ModelConfig
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.subject import HopeSubject
from hopeprobe.model.train import TrainConfig, train
from hopeprobe.tokens import EvalWindows, TokenData, load_tokens

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_probe.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("own_probe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_probe"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own_probe"]


CONFIG = ModelConfig(vocab_size=61, dim=16, layers=2, context=32, heads=2)


@pytest.fixture(scope="module")
def data():
    """Documents of 40 random tokens: three hundred."""
    rng = np.random.default_rng(0)
    documents = [[int(t) for t in rng.integers(61, size=40)] for _ in range(300)]
    return TokenData.from_documents(documents, name="toy", vocab_size=61, end_of_text=0)


@pytest.fixture
def subject():
    return HopeSubject(HopeModel(CONFIG, 0))


def batches(data):
    return EvalWindows(data, "all", context=32, tokens=2000, batch=64)


def test_it_is_short():
    """Lines that hold code: neither blank, nor a comment, nor a docstring."""
    source = EXAMPLE.read_text(encoding="utf-8")
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    found = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, node.end_lineno + 1))
    assert 25 < len(found) < 40


def test_the_guide_tells_it_as_it_is():
    page = ROOT / "examples" / "guide" / "own-probe.md"
    source, told = EXAMPLE.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    classes = source[source.index("class LayerUpdate") : source.index("if __name__")].rstrip()
    assert classes in told
    imports = source[source.index("import re") : source.index("class LayerUpdate")]
    for line in imports.split("\n"):
        assert line in told or line == "import sys"


def test_its_numbers_are_those_of_a_plain_loop(example, subject, data, tmp_path):
    options = {"data": data, "split": "all", "tokens": 2000, "fresh": 3, "cache_dir": tmp_path}
    results = hopeprobe.analyze(subject, example.LayerUpdate(), **options)
    assert results.missing == []
    ratios = {0: [], 1: []}
    for batch in batches(data):
        with subject.module.caching(["blocks.*.hook_resid_*"]) as cache:
            out = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths))
        for layer, found in ratios.items():
            before, after = (cache[f"blocks.{layer}.hook_resid_{side}"].double() for side in ("pre", "post"))
            for row, column in np.argwhere(out.scored.numpy()):
                change = after[row, column] - before[row, column]
                found.append(float(change.norm() / before[row, column].norm()))
    assert [row.layer for row in results.rows] == [0, 1]
    for row in results.rows:
        assert row.value == pytest.approx(np.mean(ratios[row.layer]), rel=1e-5)
        assert (row.n_tokens, row.unit, row.probe) == (2000, "1", "layer-update")
        assert row.ci_low < row.value < row.ci_high
        assert set(results.nulls_by_row()[row.key]) == {"own-init", "fresh-init"}
        assert row.verdict == "at-init"
    assert results.plot("layer-update").get_suptitle().startswith("layer-update: ")


def test_a_layer_that_adds_nothing_is_seen(example, subject, data):
    probe, before = example.LayerUpdate(), {}
    accumulator = probe.accumulator(subject, "live", None)
    (batch, *_) = batches(data)
    hooks = [
        ("blocks.1.hook_resid_pre", lambda x, hook: before.update(x=x)),
        ("blocks.1.hook_resid_post", lambda x, hook: before["x"]),
    ]
    with subject.module.hooks(hooks), subject.module.caching(probe.hooks(subject)) as cache:
        out = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths))
    accumulator.update(cache, out.losses, out.scored, batch)
    values = {place.layer: value for (_, place), value in accumulator.plug_ins().items()}
    assert values[1] == 0.0
    assert values[0] > 0.0


@pytest.mark.slow
def test_it_runs_as_a_script(tmp_path, monkeypatch):
    monkeypatch.setenv("HOPEPROBE_CACHE", str(tmp_path / "cache"))
    rng, text = random.Random(0), tmp_path / "text.jsonl"
    lines = (json.dumps({"text": " ".join(f"w{rng.randrange(40)}" for _ in range(40))}) for _ in range(1700))
    text.write_text("\n".join(lines), encoding="utf-8")
    config = dataclasses.replace(CONFIG, vocab_size=ModelConfig().vocab_size)
    train(config, TrainConfig(steps=2, batch=2, eval_tokens=64), load_tokens(str(text)), tmp_path)
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "step-000002.pt", text],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.strip().splitlines()
    assert header.split() == ["layer", "value", "ci_low", "ci_high", "verdict"]
    assert len(rows) == 2
    assert (tmp_path / "layer-update.png").stat().st_size > 5000
