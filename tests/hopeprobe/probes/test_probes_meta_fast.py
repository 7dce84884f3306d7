"""Fast against meta weights: known answers, a per-token reference in float64, planted defects."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hopeprobe.analysis import analyze, missing_from
from hopeprobe.conditions import LIVE, as_tensors
from hopeprobe.hooks import HookPoint
from hopeprobe.model.config import CMSLevel, ModelConfig, published
from hopeprobe.model.hope import HopeModel
from hopeprobe.model.reference import reference_losses
from hopeprobe.model.subject import HopeSubject
from hopeprobe.probes import get_probe
from hopeprobe.probes.base import Place
from hopeprobe.probes.meta_fast_memories import MOST_POSITIONS, memories_of, positions_of, products
from hopeprobe.probes.meta_fast_moments import _text_written, ratios
from hopeprobe.probes.passes import run_pass
from hopeprobe.subject import Subject
from hopeprobe.tokens import EvalWindows, TokenData

PROBE = get_probe("meta-fast")
VOCAB = 37
CONFIG = ModelConfig(vocab_size=VOCAB, dim=8, layers=2, context=40, heads=2, embed_std=0.5)
LONG = dataclasses.replace(CONFIG, context=72)  # two positions, 32 and 64
ZERO = dataclasses.replace(CONFIG, decay_target="zero")
MEMORIES = ("memory", "q", "k", "v", "eta", "alpha")


def make(config=CONFIG, seed=0, dtype=torch.float32):
    return HopeSubject(HopeModel(config, seed, dtype))


def text(lengths, seed=0):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, VOCAB, n + 1) for n in lengths]
    return TokenData.from_documents(documents, name="text", vocab_size=VOCAB, end_of_text=0)


TEXT = text([40] * 34 + [38, 5, 33])
FEW = text([72, 33, 64, 5, 40, 72, 70, 31, 72])


def windows_of(data=TEXT, batch=16, context=40):
    return EvalWindows(data, "all", context=context, tokens=None, batch=batch)


def accumulated(subject, windows=None):
    result = run_pass(subject, windows or windows_of(context=subject.context), [PROBE], LIVE)
    assert result.failed == {}
    return result.accumulators[PROBE.name]


def values_of(accumulator):
    return {place: value for (_, place), value in accumulator.plug_ins().items()}


def rows_of(subject, tmp_path, **options):
    settings = {"data": TEXT, "tokens": None, "split": "all", "fresh": 2, "cache_dir": tmp_path} | options
    results = analyze(subject, [PROBE], **settings)
    return results, {Place(r.statistic, r.layer, r.component, r.position): r for r in results.rows}


def place(name, component="selfmod.k", position=32, layer=0):
    return Place(name, layer, component, str(position) if position else "")


def silence_alpha(subject, bias):
    """M_alpha answers 0, and no write changes that: its slope is that of a matrix of zeros. So alpha is the bias's."""
    with torch.no_grad():
        for block in subject.module.blocks:
            memory = block.selfmod.memories["alpha"]
            memory.w1.zero_()
            memory.skip.zero_()
            block.selfmod.alpha_bias.fill_(bias)
    return subject


# -- where ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([4, 6, 8, 16, 32]), min_size=1, max_size=3), st.integers(1, 2000))
def test_positions_are_equally_spaced_and_everything_is_written_there(periods, context):
    class Periods(Subject):
        def write_periods(self):
            return {str(i): period for i, period in enumerate(periods)}

    subject = Periods()
    subject.context = context
    found, period = positions_of(subject), math.lcm(*periods)
    assert len(found) == min(context // period, len(found)) <= MOST_POSITIONS
    assert found or context < period
    assert all(0 < p <= context and p % period == 0 for p in found)
    assert len(set(np.diff([0, *found]))) <= 1
    if found:
        assert context - found[-1] < found[0], "to the end of the context"


def test_positions_of_the_presets():
    assert positions_of(make(LONG)) == [32, 64]
    assert positions_of(make(dataclasses.replace(CONFIG, context=512))) == list(range(64, 513, 64))


# -- a reference, token by token ---------------------------------------------------------------------------------------


def split_token_by_token(meta, retentions):
    """What decay alone leaves of the meta weights, one token after the other."""
    left = {name: w.copy() for name, w in meta.items()}
    for alpha in retentions:
        left = {name: alpha * w for name, w in left.items()}
    return left


def as_vector(weights):
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def arrays(weights):
    return {name: w.detach().numpy() for name, w in weights.items()}


def reference(model, tokens, position):
    """Every value of one window, by place: from full matrices that were written one token at a time."""
    _, traces = reference_losses(model, torch.from_numpy(tokens[: position + 1]))
    found = {}
    for layer, trace in enumerate(traces):
        retentions = [float(alpha) for _, _, _, alpha in trace.waiting]
        assert len(retentions) == position
        found[place("retention", "selfmod", position, layer)] = math.prod(retentions)
        cms = [{"w_in": lv.w_in, "w_out": lv.w_out} for lv in model.blocks[layer].cms.level_list()]
        pairs = {f"selfmod.{name}": (trace.meta[name], trace.fast[name]) for name in trace.meta}
        names = [level.name for level in model.config.cms_levels]
        pairs |= {
            f"cms.{n}": pair for n, pair in zip(names, zip(cms, trace.cms_fast, strict=True), strict=True)
        }
        for component, (meta, fast) in pairs.items():
            meta, fast = arrays(meta), arrays(fast)
            m, f = as_vector(meta), as_vector(fast)
            size = np.linalg.norm(m)
            values = {
                "relative_drift": np.linalg.norm(f - m) / size,
                "fast_meta_cosine": f @ m / np.linalg.norm(f) / size,
                "norm_ratio": np.linalg.norm(f) / size,
            }
            if component.startswith("selfmod"):
                zero = model.config.decay_target == "zero"
                left = as_vector(split_token_by_token(meta, retentions)) if zero else m
                values["decay_part"] = np.linalg.norm(left - m) / size
                values["write_part"] = np.linalg.norm(f - left) / size
            found |= {place(name, component, position, layer): v for name, v in values.items()}
    return found


LONG_ZERO = dataclasses.replace(LONG, decay_target="zero")
REFERENCES = {
    "default": LONG,
    "decay-to-zero": dataclasses.replace(LONG_ZERO, alpha_bias=3.0),
    "long-chunks": dataclasses.replace(LONG_ZERO, chunk=16, chunk_memory=32, alpha_bias=4.0),
    "static-query": dataclasses.replace(LONG, query="static", alpha_bias=1.0),
    "selective-gate": dataclasses.replace(LONG_ZERO, surprise_threshold=3.6),
    "dot": dataclasses.replace(LONG_ZERO, alpha_bias=2.0, objective="dot"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_full_matrices_written_token_by_token(name):
    config = dataclasses.replace(REFERENCES[name], write_grad="stop")  # an outer gradient is not asked for
    subject = make(config, dtype=torch.float64)
    windows = windows_of(text([66, 40, 31], seed=3), batch=2, context=72)
    found = values_of(accumulated(subject, windows))
    expected = {}
    for batch in windows:
        for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
            for position in (p for p in (32, 64) if p <= length):
                for where, value in reference(subject.module, tokens, position).items():
                    expected.setdefault(where, []).append(value)
    assert {p for p in found if p.position} == set(expected)
    assert {p.position: len(v) for p, v in expected.items()} == {"32": 2, "64": 1}
    for where, values in expected.items():
        assert found[where] == pytest.approx(np.mean(values), rel=1e-9, abs=1e-12), where


def test_the_half_life_is_that_of_every_scored_token_before_the_gate():
    subject = make(dataclasses.replace(LONG, surprise_threshold=3.6, alpha_bias=2.0), dtype=torch.float64)
    found = values_of(accumulated(subject, windows_of(FEW, context=72)))
    for layer in (0, 1):
        logs = []
        for batch in windows_of(FEW, context=72):
            with subject.module.caching(f"blocks.{layer}.selfmod.hook_alpha") as cache:
                scored = subject.run(torch.from_numpy(batch.tokens), torch.from_numpy(batch.lengths)).scored
            logs += [math.log(a) for a in cache[f"blocks.{layer}.selfmod.hook_alpha"][scored].tolist()]
        assert len(logs) == windows_of(FEW, context=72).n_tokens
        expected = math.log(2) / -math.fsum(logs) * len(logs)
        assert found[place("half_life", "selfmod", None, layer)] == pytest.approx(expected, rel=1e-12)


def test_drift_in_float32_is_known_to_the_resolution_of_the_weights():
    """Fast weights are shown rounded: the drift is off by no more than that, also where it is small."""
    for rate in (0.1, 1e-4, 1e-6):
        config = dataclasses.replace(
            CONFIG, cms_levels=(CMSLevel("fast", 8, rate), CMSLevel("slow", 32, rate))
        )
        single, double = (
            values_of(accumulated(make(config, dtype=d))) for d in (torch.float32, torch.float64)
        )
        for component in ("cms.fast", "cms.slow"):
            where = place("relative_drift", component)
            assert 0 < double[where] < 10 * rate
            assert single[where] == pytest.approx(double[where], rel=1e-4, abs=6e-8)


@pytest.mark.parametrize("gamma", [1.0, 1 - 1e-9, 0.9, 0.3, 1e-9])
@pytest.mark.parametrize("size", [1e-3, 1e-9, 0.0])
def test_small_writes_keep_their_digits_beside_any_decay(gamma, size):
    """Up to what rounding does to the sums: 1e-16 of ‖θ_meta‖² where little was lost, and of ‖Γ θ_meta‖² elsewhere."""
    rng = np.random.default_rng(0)
    meta, write = rng.normal(size=(2, 50, 40))
    write *= size * np.linalg.norm(meta) / np.linalg.norm(write)
    fast = gamma * meta + write
    sums = products(torch.from_numpy(meta), torch.from_numpy(fast)[None]).numpy()
    found = ratios(sums, float((meta**2).sum()), "zero", np.array([gamma]), np.array([False]))
    lost = min(gamma, math.sqrt(1 - gamma)) if gamma < 1 else 0.0
    assert found["write_part"][0] == pytest.approx(size, rel=1e-6, abs=3e-8 * lost + 1e-16)
    assert found["decay_part"][0] == pytest.approx(1 - gamma, rel=1e-6)


# -- known answers -----------------------------------------------------------------------------------------------------


def test_retention_of_one_half_towards_zero_is_a_collapse_and_no_adaptation(tmp_path):
    subject = silence_alpha(make(ZERO), 0.0)
    results, rows = rows_of(subject, tmp_path)
    assert missing_from(results) == []
    assert rows[place("half_life", "selfmod", None)].value == pytest.approx(1.0, abs=1e-6)
    assert rows[place("retention", "selfmod", 32)].value == pytest.approx(2.0**-32, rel=1e-4)
    for component in ("selfmod.alpha", "selfmod.memory", "selfmod.k"):
        assert rows[place("decay_part", component)].value == pytest.approx(1.0, abs=1e-6)
        assert rows[place("norm_ratio", component)].ci_high < 0.5
    gone = {
        r.verdict for p, r in rows.items() if p.component.startswith("selfmod") or p.statistic == "logit_kl"
    }
    assert gone == {"collapsed"}
    assert rows[place("relative_drift", "selfmod.k")].value == pytest.approx(1.0, abs=0.5)
    assert "no adaptation" in rows[place("relative_drift")].note
    assert "selfmod.memory of layer 0: " in rows[place("output_divergence", "selfmod")].note
    assert {rows[place(n, "cms.fast")].verdict for n in ("relative_drift", "output_divergence")} == {
        "at-init"
    }


def test_the_same_retention_towards_meta_weights_is_none():
    found = values_of(accumulated(silence_alpha(make(), 0.0)))
    for component in ("selfmod.alpha", "selfmod.memory", "selfmod.k"):
        assert 0.8 < found[place("norm_ratio", component)] < 1.2
        assert found[place("decay_part", component)] == 0
        drift = found[place("relative_drift", component)]
        assert found[place("write_part", component)] == pytest.approx(drift, rel=1e-9)
    assert found[place("half_life", "selfmod", None)] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("bias", [6.0, -2.0])
def test_half_life_and_retention_of_a_constant(bias):
    alpha = 1 / (1 + math.exp(-bias))
    found = values_of(accumulated(silence_alpha(make(dtype=torch.float64), bias)))
    assert found[place("half_life", "selfmod", None)] == pytest.approx(
        -math.log(2) / math.log(alpha), rel=1e-9
    )
    assert found[place("retention", "selfmod")] == pytest.approx(alpha**32, rel=1e-9)


def test_nothing_decays_where_retention_is_exactly_one():
    rows = {row.place: row for row in accumulated(silence_alpha(make(ZERO), 40.0)).measurements()}
    row = rows[place("half_life", "selfmod", None)]
    assert math.isnan(row.estimate.value)
    assert (row.override, "infinite" in row.note) == ("n/a", True)
    assert rows[place("retention", "selfmod")].estimate.value == 1
    assert rows[place("decay_part")].estimate.value == 0


def test_the_published_rule_keeps_2e5_of_the_norm_after_16_tokens(tmp_path):
    """And drifts by 1.000: what the study takes for adaptation."""
    small = ModelConfig(vocab_size=VOCAB, dim=64, layers=1, context=24)
    config = dataclasses.replace(published(small), chunk_memory=8, cms_levels=(CMSLevel("fast", 8),))
    _, rows = rows_of(make(config), tmp_path, data=text([24] * 36), fresh=0)
    for name in ("memory", "k", "v", "eta", "alpha"):
        component = f"selfmod.{name}"
        assert rows[place("norm_ratio", component, 16)].value == pytest.approx(2e-5, rel=0.9)
        assert rows[place("norm_ratio", component, 8)].value == pytest.approx(4e-3, rel=0.9)
        assert rows[place("relative_drift", component, 16)].value == pytest.approx(1.0, abs=1e-3)
        assert rows[place("decay_part", component, 16)].value == pytest.approx(1.0, abs=1e-3)
        assert rows[place("relative_drift", component, 16)].verdict == "collapsed"


def test_a_level_that_is_never_written_is_no_signal(tmp_path):
    config = dataclasses.replace(CONFIG, cms_levels=(CMSLevel("fast", 8), CMSLevel("slow", 32, 0.0)))
    _, rows = rows_of(make(config), tmp_path)
    for name, value in (("relative_drift", 0), ("fast_meta_cosine", 1), ("norm_ratio", 1)):
        row = rows[place(name, "cms.slow")]
        assert (row.value, row.verdict) == (pytest.approx(value, abs=1e-12), "no-signal"), name
        assert "never written" in row.note
    assert rows[place("output_divergence", "cms.slow", 32)].verdict == "no-signal"
    others = [r for p, r in rows.items() if p.component != "cms.slow" and p.layer is not None]
    assert rows[place("logit_kl", "", 32, None)].verdict == "at-init"
    assert {r.verdict for r in others} == {"at-init"}, "an untrained model is its own initial model"


def test_drift_under_the_resolution_of_the_weights_is_no_signal(tmp_path):
    config = dataclasses.replace(CONFIG, cms_levels=(CMSLevel("fast", 8), CMSLevel("slow", 32, 1e-7)))
    _, rows = rows_of(make(config), tmp_path, fresh=0)
    row = rows[place("relative_drift", "cms.slow")]
    assert 0 < row.value < 6e-8
    assert (row.verdict, "rounded" in row.note) == ("no-signal", True)
    wide = HopeSubject(HopeModel(config, 0, torch.float64))
    _, rows = rows_of(wide, tmp_path, fresh=0)
    assert rows[place("relative_drift", "cms.slow")].verdict == "at-init"


# -- planted defects ---------------------------------------------------------------------------------------------------


class Edited(HopeSubject):
    """A model with a defect: hooks that are always on."""

    edits = ()

    def run(self, tokens, lengths=None, state=None):
        with self.module.hooks(self.edits, allow_unfired=True):
            return super().run(tokens, lengths, state)

    def own_init(self):
        return HopeSubject(self.module)

    def replica(self):
        return None


def edited(*edits, config=CONFIG):
    subject = Edited(HopeModel(config, 0))
    subject.edits = edits
    return subject


def test_weights_that_grow_have_diverged(tmp_path):
    subject = edited(("blocks.1.selfmod.v.hook_fast_*", lambda w, hook: 1.5 * w))
    _, rows = rows_of(subject, tmp_path, fresh=0)
    assert rows[place("norm_ratio", "selfmod.v", 32, 1)].value > 2
    verdicts = {r.verdict for p, r in rows.items() if p[1:3] == (1, "selfmod.v")}
    assert verdicts == {"diverged"}
    assert rows[place("retention", "selfmod", 32, 1)].verdict == "diverged"
    assert "selfmod.v of layer 1" in rows[place("retention", "selfmod", 32, 1)].note
    assert rows[place("relative_drift", "selfmod.v", 32, 0)].verdict != "diverged"


def test_weights_that_are_not_finite_in_some_windows_have_diverged_and_others_are_measured():
    def spoil(w, hook):
        return torch.where(torch.arange(len(w))[:, None, None] % 8 == 1, torch.inf, w)

    one = ("blocks.0.cms.slow.hook_fast_in", spoil)
    found = accumulated(edited(one), windows_of(text([40] * 40), batch=8))
    rows = {row.place: row for row in found.measurements()}
    bad = rows[place("norm_ratio", "cms.slow", 32)]
    assert bad.override == "diverged"
    assert "not finite in 5 of 40 windows" in bad.note
    assert (bad.estimate.n, math.isfinite(bad.estimate.value)) == (35, True)
    well = rows[place("norm_ratio", "cms.fast", 32)]
    assert (well.override, well.estimate.n) == (None, 40)


def test_a_model_that_diverges_in_all_windows_has_no_number_but_that_verdict(tmp_path):
    """Once the losses are no numbers no gate opens, and weights are shown no more."""

    class Late(Edited):
        def run(self, tokens, lengths=None, state=None):
            seen = [0]

            def spoil(x, hook):
                seen[0] += x.shape[1]
                return x * (torch.nan if seen[0] > 40 else 1.0)

            with self.module.hooks([("hook_embed", spoil)]):
                return super().run(tokens, lengths, state)

        def logits(self, state, tokens):
            return super().logits(state, tokens) * torch.nan

    results, rows = rows_of(Late(HopeModel(LONG, 0)), tmp_path, data=text([72] * 36), fresh=0)
    for component in ("selfmod.k", "cms.fast"):
        row = rows[place("relative_drift", component, 64)]
        assert (math.isnan(row.value), row.verdict) == (True, "diverged")
        assert "not finite in 36 of 36 windows" in row.note
        assert rows[place("relative_drift", component, 32)].verdict == "diverged"
        assert math.isfinite(rows[place("relative_drift", component, 32)].value)
    assert "the logits: not finite" in " ".join(missing_from(results))


def test_a_model_that_diverges_at_once_says_so_of_every_memory(tmp_path):
    subject = edited(("blocks.*.selfmod.k.hook_fast_w1", lambda w, hook: w * torch.nan))
    results, rows = rows_of(subject, tmp_path, fresh=0)
    assert {row.verdict for row in rows.values()} == {"diverged", "n/a"}
    assert {where.statistic for where, row in rows.items() if row.verdict == "n/a"} == {"retention"}
    assert "no window is finite" in rows[Place("retention")].note
    # That no gate opens for a loss that is no number leaves the level where it was, and says nothing of it.
    for row in (rows[place("relative_drift", "cms.slow")], rows[place("norm_ratio", "selfmod.q", layer=1)]):
        assert (math.isnan(row.value), "36 of 36 windows" in row.note) == (True, True)
    assert any("the model diverged" in message for message in missing_from(results))


def test_fast_weights_shared_by_a_batch_are_no_measurement():
    def share(w, hook):
        return w.mean(0, keepdim=True).expand_as(w).clone()

    for point in ("blocks.1.selfmod.q.hook_fast_*", "blocks.0.cms.fast.hook_fast_*"):
        failed = run_pass(edited((point, share)), windows_of(), [PROBE], LIVE).failed
        assert "state is shared between sequences" in failed[PROBE.name]
    # What does the same to every text is decay: windows may well agree on that.
    still = edited(("blocks.*.selfmod.hook_eta", lambda eta, hook: eta * 0), config=ZERO)
    found = values_of(accumulated(silence_alpha(still, 1.0)))
    assert found[place("write_part")] < 1e-6
    twins = TokenData.from_documents([np.arange(41) % VOCAB] * 40, name="x", vocab_size=VOCAB, end_of_text=0)
    assert accumulated(make(), windows_of(twins)).moments, "one text gives one state"


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_windows_that_begin_alike_and_are_written_nowhere_else_are_alike(batch):
    """Their fast weights rightly agree to the last bit, whatever text comes behind the last open gate."""
    head = np.random.default_rng(0).integers(0, VOCAB, 9)
    documents = [np.concatenate([head, np.random.default_rng(i).integers(0, VOCAB, 32)]) for i in range(1, 5)]

    seen = {}

    def only_the_first_tick(gate, hook):
        opened = seen.get(hook.name, 0) % 5 == 0  # 40 tokens, 5 ticks
        seen[hook.name] = seen.get(hook.name, 0) + 1
        return gate * float(opened)

    subject = edited()  # of which there is no replica, on which this hook would not be
    subject.module.add_hook("blocks.*.hook_write_gate", only_the_first_tick)
    data = TokenData.from_documents(documents, name="x", vocab_size=VOCAB, end_of_text=0)
    found = values_of(accumulated(subject, windows_of(data, batch)))
    assert found[place("relative_drift")] > 1e-6
    assert found[place("relative_drift", "cms.slow")] > 1e-6


def test_text_that_was_written_counts_up_to_its_target():
    """What is written of a token hangs on the next one too: windows that differ there alone must not be alike."""
    tokens = np.arange(33)[None].repeat(2, axis=0)
    memory = memories_of(make())[0]
    for last, differs_at, different in (
        (8, 9, True),
        (8, 8, True),
        (8, 10, False),
        (31, 32, True),
        (None, 0, False),
    ):
        gate = torch.zeros(2, 32)
        if last is not None:
            gate[:, last] = 1.0
        text = tokens.copy()
        text[1, differs_at] = 36
        seen = _text_written({memory.gate: gate}, memory, text, np.array([True, True]), 32)
        assert (seen[0] != seen[1]).any() == different, (last, differs_at)


def test_gates_that_never_open_write_nothing_and_that_is_no_signal(tmp_path):
    closed = make(dataclasses.replace(CONFIG, surprise_threshold=1e9))
    results, rows = rows_of(closed, tmp_path, fresh=0)
    assert not missing_from(results)
    assert {row.verdict for row in rows.values()} <= {"no-signal", "n/a"}
    for component in ("selfmod.k", "cms.slow"):
        for name in ("relative_drift", "fast_meta_cosine", "norm_ratio"):
            row = rows[place(name, component, 32)]
            value = pytest.approx(float(name != "relative_drift"), abs=1e-12)
            assert (row.value, row.verdict) == (value, "no-signal")
            assert "never written: at every position" in row.note


def test_a_mechanism_that_is_never_written_leaves_the_others_theirs(tmp_path):
    subject = edited(("blocks.*.selfmod.hook_write_gate", lambda gate, hook: gate * 0))
    _, rows = rows_of(subject, tmp_path, fresh=0)
    for name in ("relative_drift", "norm_ratio", "write_part"):
        assert rows[place(name, "selfmod.k")].verdict == "no-signal"
    assert rows[place("relative_drift", "selfmod.k")].value == 0
    assert rows[place("relative_drift", "cms.slow")].value > 0
    assert rows[place("relative_drift", "cms.slow")].verdict == "at-init"


def test_outputs_that_are_those_of_meta_weights_are_no_signal(tmp_path):
    closed = make(dataclasses.replace(CONFIG, surprise_threshold=1e9))
    _, rows = rows_of(closed, tmp_path, fresh=0)
    outputs = [row for place, row in rows.items() if place.statistic in ("output_divergence", "logit_kl")]
    assert len(outputs) == 2 * 3 + 1
    assert {(r.value, r.verdict) for r in outputs} == {(0, "no-signal")}


def test_a_memory_whose_points_never_fire_is_missing(tmp_path):
    class Deaf(HopeSubject):
        def replica(self):
            return None

        def run(self, tokens, lengths=None, state=None):
            other = HopeSubject(HopeModel(self.module.config, 0))
            return other.run(tokens, lengths, state)

    results, _ = rows_of(Deaf(HopeModel(CONFIG, 0)), tmp_path, fresh=0)
    assert any("never fired" in message for message in missing_from(results))
    assert not {row.statistic for row in results.rows} & {"relative_drift", "retention"}


def test_a_window_is_seen_at_every_position_whatever_the_gates_of_those_beside_it():
    """By hand, window by window: what a closed gate leaves is still there, whether or not others of a batch wrote."""
    rule = dataclasses.replace(LONG.gate, rule="random", budget=0.05)
    subject = make(dataclasses.replace(LONG, gate=rule), dtype=torch.float64)
    metas = subject.meta_weights()
    component = "blocks.0.selfmod.k.hook_fast_"
    drifts, closed = [], 0
    for batch in windows_of(FEW, 1, 72):
        with torch.no_grad(), subject.module.caching("*", allow_unfired=True) as cache:
            subject.run(*as_tensors(batch))
        if batch.lengths[0] < 64:
            continue
        parts = [(cache[name][0, 7].double(), meta) for name, meta in metas.items() if component in name]
        moved = sum(float((fast - meta).square().sum()) for fast, meta in parts)
        drifts.append(math.sqrt(moved / sum(float(meta.square().sum()) for _, meta in parts)))
        closed += not cache["blocks.0.selfmod.hook_write_gate"][0, 56:64].any()
    assert 0 < closed < len(drifts) == 5
    assert min(drifts) > 0
    for batch in (1, 3, 16):
        rows = {row.place: row for row in accumulated(subject, windows_of(FEW, batch, 72)).measurements()}
        found = rows[place("relative_drift", "selfmod.k", 64)].estimate
        assert (found.n, found.plug_in) == (5, pytest.approx(np.mean(drifts), rel=1e-9))


def test_fast_weights_that_are_not_shown_when_they_are_due_are_no_measurement():
    """A model that shows them only when something was written would leave out windows by those beside them."""
    name = "blocks.1.selfmod.q.hook_fast_w1"

    class Shy(HopeSubject):
        def run(self, tokens, lengths=None, state=None):
            point, fire = self.module.hook_dict[name], HookPoint._fire

            def sometimes(one, tensor):
                return tensor if one is point and len(tokens) < 16 else fire(one, tensor)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(HookPoint, "_fire", sometimes)
                return super().run(tokens, lengths, state)

        def replica(self):
            return None

    failed = run_pass(Shy(HopeModel(CONFIG, 0)), windows_of(), [PROBE], LIVE).failed[PROBE.name]
    assert f"{name} was not shown after 32 tokens, where its write period ends" in failed


def test_what_is_no_retention_is_refused():
    for edit in (lambda a, hook: a + 1, lambda a, hook: -a):
        subject = make()
        subject.module.add_hook("blocks.0.selfmod.hook_alpha", edit)
        assert "no retention" in run_pass(subject, windows_of(), [PROBE], LIVE).failed[PROBE.name]


def test_weights_that_do_not_belong_together_are_refused():
    class Mixed(HopeSubject):
        def meta_weights(self):
            found = dict(super().meta_weights())
            found["blocks.0.cms.fast.hook_fast_in"] = found["blocks.0.cms.fast.hook_fast_out"]
            return found

    failed = run_pass(Mixed(HopeModel(CONFIG, 0)), windows_of(), [PROBE], LIVE).failed
    assert "not the same matrix" in failed[PROBE.name]


# -- what a model need not have ----------------------------------------------------------------------------------------


def lacking(*names, config=CONFIG):
    """A subject without these capabilities."""
    kind = type("Lacking", (HopeSubject,), {name: getattr(Subject, name) for name in names})
    return kind(HopeModel(config, 0))


def test_what_the_model_does_not_tell_is_not_applicable(tmp_path):
    _, rows = rows_of(lacking("decay_target", "logits"), tmp_path, fresh=0)
    for name, why in (
        ("decay_part", "what its fast weights decay towards"),
        ("write_part", "what its fast weights decay towards"),
        ("output_divergence", "no logits"),
        ("logit_kl", "no logits"),
    ):
        assert (rows[Place(name)].verdict, why in rows[Place(name)].note) == ("n/a", True)
        assert [p for p in rows if p.statistic == name] == [Place(name)]
    assert rows[place("relative_drift")].verdict == "at-init"
    assert rows[place("retention", "selfmod")].verdict == "at-init"


def test_what_was_not_measured_is_not_applicable_in_a_collapsed_model_too(tmp_path):
    _, rows = rows_of(silence_alpha(lacking("logits", config=ZERO), 0.0), tmp_path, fresh=0)
    assert rows[place("relative_drift")].verdict == "collapsed"
    assert rows[Place("logit_kl")].verdict == rows[Place("output_divergence")].verdict == "n/a"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"variant": "transformer"}, "nothing in this model writes"),
        ({"context": 24}, "written only every 32 tokens"),
    ],
)
def test_a_model_without_such_writes_is_not_applicable(tmp_path, change, why):
    _, rows = rows_of(make(dataclasses.replace(CONFIG, **change)), tmp_path, fresh=0)
    assert set(rows) == {Place(name) for name in PROBE.statistics}
    assert {(r.verdict, why in r.note) for r in rows.values()} == {("n/a", True)}


def test_without_a_tick_behind_a_position_outputs_are_not_compared(tmp_path):
    _, rows = rows_of(make(), tmp_path, data=text([33] * 40), fresh=0)
    assert rows[place("relative_drift", position=32)].verdict == "at-init"
    assert rows[Place("logit_kl")].verdict == rows[Place("output_divergence")].verdict == "n/a"
    assert "no window has a tick" in rows[Place("logit_kl")].note


def test_meta_weights_of_zero_have_no_drift():
    subject = make()
    with torch.no_grad():
        for parameter in (
            subject.module.blocks[0].cms.levels["slow"].w_in,
            subject.module.blocks[0].cms.levels["slow"].w_out,
        ):
            parameter.zero_()
    rows = {row.place: row for row in accumulated(subject).measurements()}
    row = rows[place("norm_ratio", "cms.slow", None)]
    assert (row.override, "all meta weights are zero" in row.note) == ("n/a", True)
    assert place("norm_ratio", "cms.slow") not in rows
    assert place("norm_ratio", "cms.slow", 32, 1) in rows


def test_memories_are_found_by_name():
    found = memories_of(make(ZERO))
    assert [m.component for m in found if m.layer == 1] == [f"selfmod.{n}" for n in MEMORIES] + [
        "cms.fast",
        "cms.slow",
    ]
    assert {(m.component.split(".")[0], m.target, m.mechanism) for m in found if m.layer == 0} == {
        ("selfmod", "zero", "blocks.0.selfmod"),
        ("cms", "", ""),
    }
    assert {m.target for m in memories_of(lacking("decay_target"))} == {None, ""}


# -- the accumulator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7])
def test_neither_batch_size_nor_merging_changes_a_value(batch):
    subject = make(LONG_ZERO, dtype=torch.float64)
    whole = values_of(accumulated(subject, windows_of(FEW, 64, 72)))
    parts = values_of(accumulated(subject, windows_of(FEW, batch, 72)))
    assert whole.keys() == parts.keys()
    for where, value in whole.items():
        assert parts[where] == pytest.approx(value, rel=1e-9, abs=1e-12), where


def test_merged_accumulators_hold_what_one_would():
    subject, lengths = make(LONG, dtype=torch.float64), [72, 33, 64, 5, 40, 72]
    documents = [np.random.default_rng(i).integers(0, VOCAB, n + 1) for i, n in enumerate(lengths)]

    def over(these):
        data = TokenData.from_documents(these, name="x", vocab_size=VOCAB, end_of_text=0)
        return accumulated(subject, windows_of(data, context=72))

    whole, first = over(documents), over(documents[:2])
    first.merge(over(documents[2:]))
    merged = values_of(first)
    for where, value in values_of(whole).items():
        assert merged[where] == pytest.approx(value, rel=1e-9), where


def test_learned_retention_is_found_and_drift_stays_beside_its_nulls(tmp_path):
    class Trained(HopeSubject):
        def own_init(self):
            return make()

    trained = Trained(HopeModel(CONFIG, 0))
    with torch.no_grad():
        for block in trained.module.blocks:
            block.selfmod.alpha_bias.fill_(2.0)
    results, rows = rows_of(trained, tmp_path, fresh=3)
    half = rows[place("half_life", "selfmod", None)]
    assert (half.verdict, half.unit) == ("learned", "tokens")
    assert rows[place("retention", "selfmod")].verdict == "learned"
    nulls = {n.null_kind: n.value for n in results.null_rows if n.statistic == "half_life" and n.layer == 0}
    assert nulls["own-init"] == pytest.approx(280, rel=0.1)
    assert half.value == pytest.approx(5.46, rel=0.1)
    kinds = {(n.statistic, n.null_kind) for n in results.null_rows}
    assert {(s, k) for s in PROBE.statistics for k in ("own-init", "fresh-init")} <= kinds
