"""Dynamics of CMS levels: closed forms, writes against the states of single steps, levels that are never written."""

import dataclasses
import itertools
import math
import shutil

import numpy as np
import pytest
import torch

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.errors import MeasurementError
from hopeprobe.model.config import CMSLevel, published
from hopeprobe.probes.cms_dynamics import CMSDynamics, LevelWrites, _Clock, _Watch, count_writes, parts_of
from hopeprobe.probes.sample import sampled
from hopeprobe.subject import MissingCapability, load
from hopeprobe.tokens import EvalWindows, TokenData

PROBE = CMSDynamics()


def table_of(checkpoint, settings, **options):
    results = analyze(checkpoint, [PROBE], **settings | options)
    assert not missing_from(results)
    return results.table, results.nulls


def of(table, statistic, layer, component):
    rows = table[(table.statistic == statistic) & (table.layer == layer) & (table.component == component)]
    assert len(rows) == 1, (statistic, layer, component)
    return rows.iloc[0]


def batches_of(data, batch=8):
    return sampled(EvalWindows(data, "all", context=32, tokens=1000, batch=50), 0, batch)


def due(data, period, tokens=1600):
    """Writes that the sample is due."""
    batches = sampled(EvalWindows(data, "all", context=32, tokens=tokens, batch=50), 0)
    return sum(int(b.lengths[0]) // period for b in batches)


def level(subject, layer=0, name="slow"):
    return subject.module.blocks[layer].cms.levels[name]


def test_parts_are_levels_and_what_mixes_them(subject):
    parts = parts_of(subject.parameter_groups()["cms"])
    assert {(p.layer, p.component) for p in parts} == {
        (i, c) for i in (0, 1) for c in ("fast", "slow", "mix_weight", "mix_bias")
    }
    (slow,) = (p for p in parts if p[:2] == (1, "slow"))
    assert set(slow.names) == {
        f"blocks.1.cms.levels.slow.{n}" for n, _ in level(subject, 1).named_parameters()
    }


def test_norms_and_drift_of_initialisations_have_their_closed_form(subject_of, configs, settings):
    """The study's 26.15 and 29.2, at d = 64."""
    d, h = 64, 256
    subject = subject_of(dataclasses.replace(configs["toy"], dim=d))
    with torch.no_grad():
        level(subject, 1).w_in.mul_(1.5)
    table, nulls = table_of(subject, settings, tokens=200)
    drawn = h / 3 + d / 3 + h / (3 * d) + d / (3 * h)
    assert of(table, "weight_norm", 0, "fast").value == pytest.approx(math.sqrt(d + drawn), rel=0.01)
    norms = table[table.statistic == "weight_norm"]
    assert set(norms.verdict) == {"at-init"}, "a model just made is its own initial model"
    assert (norms.ci_low == norms.value).all()
    assert (norms.ci_high == norms.value).all()
    assert norms.note.str.contains("within the range of fresh initialisations").sum() >= 2, (
        "95 in 100 of them"
    )
    assert "outside the range" in of(table, "weight_norm", 1, "slow").note
    found = (
        nulls[(nulls.layer == 0) & (nulls.component == "fast")].set_index(["statistic", "null_kind"]).value
    )
    assert found["weight_norm", "fresh-init"] == pytest.approx(math.sqrt(d + drawn), rel=0.01)
    assert found["weight_norm", "own-init"] == of(table, "weight_norm", 0, "fast").value
    assert found["displacement", "fresh-init"] == pytest.approx(math.sqrt(2 * drawn), rel=0.01)


def test_norms_and_drift_of_a_run_against_numpy(toy_run, settings):
    table, nulls = table_of(toy_run / "step-000040.pt", settings, tokens=200)
    steps, prefix = (0, 1, 2, 5, 10, 20, 40), "blocks.1.cms.levels.slow."
    vectors = []
    for step in steps:
        weights = torch.load(toy_run / f"step-{step:06d}.pt", weights_only=True)["weights"]
        vectors.append(
            np.concatenate([w.double().numpy().ravel() for n, w in weights.items() if prefix in n])
        )
    assert of(table, "weight_norm", 1, "slow").value == pytest.approx(np.linalg.norm(vectors[-1]), rel=1e-9)
    grown = np.linalg.norm(vectors[-1]) - np.linalg.norm(vectors[0])
    assert abs(grown) > 0.01 * np.linalg.norm(vectors[0])
    assert of(table, "weight_norm", 1, "slow").verdict == "learned"
    assert of(table, "distance_from_init", 1, "slow").verdict == "learned"
    early, _ = table_of(toy_run / "step-000001.pt", settings, tokens=200)
    assert of(early, "weight_norm", 1, "slow").verdict == "at-init"
    drift = table[(table.statistic == "checkpoint_drift") & (table.layer == 1) & (table.component == "slow")]
    assert list(drift.position) == [f"step {a} to {b}" for a, b in itertools.pairwise(steps)]
    null = nulls[(nulls.statistic == "checkpoint_drift") & (nulls.component == "slow")].value
    drawn = 64 / 3 + 16 / 3 + 64 / 48 + 16 / 192  # of the squared norm, beside a LayerNorm of ones
    np.testing.assert_allclose(null, math.sqrt(2 * drawn / (16 + drawn)), rtol=0.1)
    expected = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in itertools.pairwise(vectors)]
    np.testing.assert_allclose(drift.value, expected, rtol=1e-9)
    assert set(drift.verdict) == {"inconclusive"}
    assert of(table, "settled_step", 1, "slow").value == 40
    assert of(table, "distance_from_init", 1, "mix_bias").verdict == "n/a", "it starts at zero"
    assert of(table, "displacement", 1, "mix_bias").value > 0


@pytest.mark.parametrize(("factor", "verdict"), [(1.009, "at-init"), (1.011, "learned")])
def test_the_smallest_effect_on_a_norm_is_a_share_of_it(subject_of, configs, settings, factor, verdict):
    wide = dataclasses.replace(configs["toy"], dim=64)  # of norms that differ by less than that between seeds
    subject = subject_of(wide)
    with torch.no_grad():
        for parameter in level(subject).parameters():
            parameter.mul_(factor)
    subject.trained_steps, subject.own_init = 10, lambda: subject_of(wide)
    subject.training = lambda: {"learning_rate": 1.0, "weight_decay": 0.0}
    table, _ = table_of(subject, settings, tokens=200)
    assert of(table, "weight_norm", 0, "slow").verdict == verdict
    assert of(table, "weight_norm", 0, "fast").verdict == "no-signal"


def test_the_same_weights_at_two_checkpoints_are_no_signal(toy_run, tmp_path, settings):
    run = shutil.copytree(toy_run, tmp_path / "run")
    still = torch.load(run / "step-000020.pt", weights_only=True)
    torch.save(still | {"step": 30}, run / "step-000030.pt")
    table, _ = table_of(run / "step-000040.pt", settings, tokens=200)
    drift = table[table.statistic == "checkpoint_drift"].set_index("position").verdict
    assert set(drift["step 20 to 30"]) == {"no-signal"}
    assert set(drift.drop("step 20 to 30")) == {"inconclusive"}


def test_the_weights_of_another_initialisation_in_a_run_are_asked_about(
    toy_run, tmp_path, settings, subject_of
):
    run = shutil.copytree(toy_run, tmp_path / "run")
    never_loaded = torch.load(run / "step-000020.pt", weights_only=True)
    never_loaded["weights"] = subject_of(seed=9).module.state_dict()
    torch.save(never_loaded, run / "step-000020.pt")
    table, _ = table_of(run / "step-000040.pt", settings, tokens=200)
    drift = table[(table.statistic == "checkpoint_drift") & (table.position == "step 10 to 20")]
    assert drift.note.str.contains("as far apart as two initialisations").all()


def by_steps(subject, layer, name, tokens):
    """Positions at which one window's level changes, and its size in the end: from the states of single steps."""
    meta = [
        m.detach().double().numpy()
        for m in (level(subject, layer, name).w_in, level(subject, layer, name).w_out)
    ]
    state, before, changed = subject.init_state(1), [np.zeros(1)] * 2, []
    with torch.no_grad():
        for end in range(8, len(tokens), 8):
            piece = torch.from_numpy(tokens[None, end - 8 : end + 1])
            _, state = subject.step(state, piece[:, :-1], piece[:, -1])
            held = state.layers[layer].cms[["fast", "slow"].index(name)]
            now = [held.w_in[0].double().numpy(), held.w_out[0].double().numpy()]
            if any((a != b).any() for a, b in zip(now, before, strict=True)):
                changed.append(end)
            before = now
    size = math.sqrt(sum((x**2).sum() for x in before)) / math.sqrt(sum((m**2).sum() for m in meta))
    return changed, size


@pytest.mark.parametrize("threshold", [0.02, 4.7])
def test_writes_agree_with_the_states_of_single_steps(subject_of, configs, toy_data, threshold):
    subject = subject_of(dataclasses.replace(configs["toy"], surprise_threshold=threshold))
    batches = batches_of(toy_data)[:2]
    counts = count_writes(subject, batches)
    rows = [(t[: n + 1], int(n)) for b in batches for t, n in zip(b.tokens, b.lengths, strict=True)]
    for layer, name, period in ((0, "fast", 8), (1, "slow", 32)):
        found = counts[layer, name]
        expected = [by_steps(subject, layer, name, tokens) for tokens, _ in rows]
        assert found.period == period
        assert found.length == [n for _, n in rows]
        assert found.due == [n // period for _, n in rows]
        assert found.done == [len(changed) for changed, _ in expected]
        assert sum(found.stray) == 0
        np.testing.assert_allclose(found.size, [size for _, size in expected], rtol=1e-4, atol=1e-7)
    total = sum(counts[0, "fast"].done)
    assert (total == sum(counts[0, "fast"].due)) == (threshold == 0.02)
    assert total > 0
    assert counts[0, "fast"].opened == counts[0, "fast"].done


def test_batches_side_by_side_give_the_same(subject, toy_data):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = count_writes(subject, batches_of(toy_data, 4))
        torch.set_num_threads(3)
        assert count_writes(subject, batches_of(toy_data, 4)) == alone
    finally:
        torch.set_num_threads(before)


def test_rows_of_writes(toy_run, toy_data, settings):
    table, nulls = table_of(toy_run / "step-000040.pt", settings, tokens=1000)
    for layer in (0, 1):
        writes, size = of(table, "writes", layer, "fast"), of(table, "write_size", layer, "fast")
        assert (writes.value, writes.ci_low, writes.ci_high, writes.verdict) == (1, 1, 1, "at-init")
        assert size.ci_low < size.value < size.ci_high
        assert (size.n_groups, size.n_tokens) == (32, 1000)
        slow = of(table, "writes", layer, "slow")
        assert (slow.value, slow.verdict) == (1, "inconclusive"), "few documents are as long as its period"
        assert slow.n_tokens == 32 * due(toy_data, 32, 1000)
    n = due(toy_data, 8, 1000)
    assert n > 100
    assert (
        f"{n} of {n} writes due every 8 tokens, {n} with an open gate" in of(table, "writes", 0, "fast").note
    )
    kinds = nulls[nulls.statistic == "writes"].null_kind
    assert set(kinds) == {"own-init", "fresh-init", "analytic"}


def test_a_level_that_writes_nothing_through_an_open_gate_is_no_signal(
    subject_of, configs, toy_data, settings
):
    """Its learning rate is 0: the gate says that it is written."""
    n = due(toy_data, 32)
    levels = (CMSLevel("fast", 8), CMSLevel("slow", 32, 0.0))
    table, _ = table_of(subject_of(dataclasses.replace(configs["toy"], cms_levels=levels)), settings)
    for layer in (0, 1):
        writes, size = of(table, "writes", layer, "slow"), of(table, "write_size", layer, "slow")
        assert (writes.verdict, writes.value) == ("no-signal", 0)
        assert f"0 of {n} writes due every 32 tokens, {n} with an open gate" in writes.note
        assert (size.verdict, size.value) == ("no-signal", 0)
        assert "its fast weights are its meta weights to the last bit" in size.note
        assert of(table, "writes", layer, "fast").verdict == "at-init"
        assert of(table, "write_size", layer, "fast").verdict != "no-signal"


def test_a_level_whose_gate_never_opens_is_no_signal(subject, toy_data, settings):
    level(subject, 1).hook_write_gate = lambda gate: gate * 0
    table, _ = table_of(subject, settings)
    writes = of(table, "writes", 1, "slow")
    assert (writes.verdict, writes.value) == ("no-signal", 0)
    assert f"0 of {due(toy_data, 32)} writes due every 32 tokens, 0 with an open gate" in writes.note
    assert of(table, "write_size", 1, "slow").verdict == "no-signal"
    assert of(table, "writes", 0, "slow").value == 1


def test_a_window_that_is_not_written_stays_so_beside_others(subject_of, configs, toy_data):
    subject = subject_of(dataclasses.replace(configs["toy"], dim=64))
    level(subject, name="fast").hook_write_gate = lambda gate: gate * (torch.arange(len(gate))[:, None] != 1)
    (batch, *_) = batches_of(toy_data)
    found = count_writes(subject, [batch])[0, "fast"]
    assert found.done == [0 if r == 1 else n for r, n in enumerate(found.due)]
    assert sum(found.opened) == 0, "nobody sees this gate: the writes are seen all the same"
    assert found.size[1] < 1e-6 < min(found.size[:1] + found.size[2:])


def test_a_gate_that_nothing_passes_is_no_signal_everywhere(subject_of, configs, settings):
    subject = subject_of(dataclasses.replace(configs["toy"], surprise_threshold=1e9))
    table, _ = table_of(subject, settings)
    assert set(table[table.statistic.isin(["writes", "write_size"])].verdict) == {"no-signal"}


@pytest.mark.parametrize(("opens", "opened"), [(8, [1]), (32, [1]), (40, [0]), (None, [0])])
def test_a_period_is_open_when_one_of_its_ticks_is(opens, opened):
    """A window of 40 tokens, written every 32: the tick that ends at 40 belongs to a period that never ends."""
    watch = _Watch(_Clock(), [torch.ones(2, 2)] * 2)
    watch.open = {end: np.array([end == opens]) for end in range(8, 48, 8)}
    watch.size = watch.change = {32: np.ones((1, 2))}
    writes = LevelWrites(32)
    watch.finish(writes, [40], "slow")
    assert (writes.opened, writes.done, writes.due) == (opened, [1], [1])


@pytest.mark.parametrize("told", [8, 24])
def test_writes_at_other_times_than_told_are_counted(subject, toy_data, settings, monkeypatch, told):
    monkeypatch.setattr(subject, "write_periods", lambda: {"cms.fast": 8, "cms.slow": told})
    table, _ = table_of(subject, settings)
    row = of(table, "writes", 0, "slow")
    n = due(toy_data, 32)
    assert f"{n if told == 8 else 0} of {due(toy_data, told)} writes due every {told} tokens" in row.note
    assert (f"{n} where none was due" in row.note) == (told == 24)
    assert (row.verdict == "no-signal") == (told == 24)
    assert row.value < 0.5


def test_windows_shorter_than_a_period_leave_its_level_out(subject, settings):
    documents = [np.arange(i, i + 20) % 97 for i in range(70)]
    text = TokenData.from_documents(documents, name="short", vocab_size=97, end_of_text=0)
    table, _ = table_of(subject, settings, data=text, tokens=None)
    row = of(table, "writes", 0, "slow")
    assert (row.verdict, row.note) == ("n/a", "no window is as long as its period of 32 tokens")
    assert of(table, "write_size", 0, "slow").verdict == "n/a"
    assert of(table, "writes", 0, "fast").value == 1


def test_weights_that_are_all_zero_are_collapsed(subject_of, settings):
    subject = subject_of()
    with torch.no_grad():
        for parameter in level(subject).parameters():
            parameter.zero_()
    table, _ = table_of(subject, settings, tokens=200)
    row = of(table, "weight_norm", 0, "slow")
    assert (row.verdict, row.value, row.note) == ("collapsed", 0, "all its weights are zero")
    assert of(table, "weight_norm", 1, "slow").verdict == "at-init"
    row = of(table, "write_size", 0, "slow")
    assert (row.verdict, row.note) == ("n/a", "its meta weights are zero")


def test_what_is_not_finite_is_refused(subject, toy_data):
    def spoil(gate):
        return gate * torch.inf

    level(subject).hook_write_gate = spoil
    with pytest.raises(MeasurementError, match=r"not finite"):
        count_writes(subject, batches_of(toy_data)[:1])


def test_without_initial_weights_the_norm_has_its_fresh_null_and_the_rest_says_why(
    toy_run, settings, monkeypatch
):
    subject = load(toy_run / "step-000040.pt")

    def refuse():
        raise MissingCapability("lost")

    monkeypatch.setattr(subject, "own_init", refuse)
    table, nulls = table_of(subject, settings, tokens=1000)
    norm = of(table, "weight_norm", 0, "fast")
    assert norm.value > 0
    assert set(nulls[nulls.statistic == "weight_norm"].null_kind) == {"fresh-init"}
    rest = table[table.statistic.isin(["checkpoint_drift", "distance_from_init", "settled_step"])]
    assert (len(rest), set(rest.verdict)) == (3, {"n/a"})
    assert rest.note.str.contains("initial weights are not known").all()
    assert "own-init: the run's own initial weights are not known" in of(table, "writes", 0, "fast").note


def test_no_hook_is_left_and_nothing_is_changed(subject, toy_data):
    before = {name: p.detach().clone() for name, p in subject.module.named_parameters()}
    count_writes(subject, batches_of(toy_data)[:1])
    assert not any(point.active for point in subject.module.hook_dict.values())
    assert all(bool((p == before[name]).all()) for name, p in subject.module.named_parameters())


def test_other_models(subject_of, configs, settings):
    table, _ = table_of(subject_of(dataclasses.replace(configs["toy"], variant="transformer")), settings)
    assert list(table.statistic) == list(PROBE.statistics)
    assert set(table.verdict) == {"n/a"}
    table, _ = table_of(subject_of(published(configs["toy"])), settings, tokens=200)
    assert of(table, "writes", 1, "fast").value == 1
    assert set(table.component[table.statistic == "weight_norm"]) == {"fast", "slow"}


def test_a_last_bit_is_no_write():
    """A model may assemble the fast weights of a window anew because another in its batch was written."""
    meta = torch.linspace(0.1, 1, 12).view(3, 4)
    flipped = torch.nextafter(meta, torch.tensor(2.0))
    written = meta + 1e-4
    clock = _Clock()
    watch, counted = _Watch(clock, [meta, meta]), LevelWrites(8)
    clock.read = 8
    for which in (0, 1):
        watch.fast(which, torch.stack([flipped, written]), None)
    watch.finish(counted, [8, 8], "level")
    assert counted.done == [0, 1]
    assert counted.size == pytest.approx(
        [0, 1e-4 * math.sqrt(24) / (math.sqrt(2) * float(meta.norm()))], abs=1e-6
    )
