"""The study's claims and their answers."""

import dataclasses
import math

import pytest
from study_toys import cell, grid

from hopeprobe.study.claims import claims
from hopeprobe.study.probed import Probed


def row(statistic, value, half=0.01, *, component="", layer=None, position="", probe="p", step=200, own=0.5):
    return Probed(
        "full", probe, statistic, step, layer, component, "live", position, "1", 3, value, value - half, value + half,
        "learned 3", own, math.nan, math.nan, math.nan,
    )  # fmt: skip


def by_claim(found):
    return {claim.claim: claim for claim in found}


def test_claims_about_losses_are_those_of_the_tables(made):
    found = by_claim(claims([made], [], made))
    answers = {text.partition(" (")[0]: claim.answer for text, claim in found.items()}
    assert answers == {
        "removing CMS improves the loss": "does not hold",
        "removing self-modification worsens the loss": "does not hold",
        "the Transformer is better than HOPE": "holds",
    }
    measured = found["removing CMS improves the loss (-0.015)"].measured
    assert measured.startswith("tiny: Δ +0.300")
    assert "resolves" in measured


def test_two_sizes_answer_the_claims_about_growth(made):
    large = grid([dataclasses.replace(c, parameters=2000) for c in made.cells], preset="big")
    found = [claim for claim in claims([made, large], [], large) if claim.where.startswith("4.5")]
    assert {claim.claim.partition(" (")[0]: claim.answer for claim in found} == {
        "removing CMS helps more in the larger model": "does not hold",
        "self-modification matters 4.5 times as much in the larger model": "does not hold",
        "the Transformer falls behind HOPE as models grow": "does not hold",
    }


def test_claims_are_in_the_study_s_order(made):
    large = grid([dataclasses.replace(c, parameters=2000) for c in made.cells], preset="big")
    gates = [cell("full-tau-0.1", s, 7.0, variant="full", threshold=0.1, surprise_min=0.05) for s in range(4)]
    rows = [
        row("mean_loss", 7.2, probe="surprise"),
        row("output_cosine", 0.7, component="fast|slow", layer=0),
    ]
    found = claims([grid([*made.cells, *gates]), large], rows, large)
    assert [claim.where[:3] for claim in found] == ["4.1"] * 6 + ["4.2", "4.4", "4.4"] + ["4.5"] * 3
    assert [claim.measured[:4] for claim in found][:6] == ["tiny"] * 3 + ["big:"] * 3


@pytest.mark.parametrize(("rate", "answer"), [(1.0, "holds"), (0.9999, "does not hold")])
def test_thresholds_that_let_all_pass(made, rate, answer):
    more = [
        cell("full-tau-0.1", s, 7.0, variant="full", threshold=0.1, gate_rate=rate, surprise_min=0.05)
        for s in range(4)
    ]
    closed = [
        cell("full-tau-3", s, 7.0, variant="full", threshold=3.0, gate_rate=0.8) for s in range(4)
    ]  # not the study's
    whole = grid([*made.cells, *more, *closed])
    found = [claim for claim in claims([whole], [], whole) if "Table 2" in claim.where]
    assert [(claim.claim, claim.answer) for claim in found] == [
        ("every token passes a threshold of 0.1", answer)
    ]


@pytest.mark.parametrize(
    ("value", "half", "answer"),
    [
        (0.77, 0.01, "holds"),
        (0.6, 0.01, "does not hold"),
        (0.7, 0.05, "not resolved"),
        (0.3, 1.5, "not resolved"),
        (0.6, math.nan, "not resolved"),
    ],
)
def test_a_quantity_holds_where_its_interval_reaches_the_figure(made, value, half, answer):
    rows = [row("output_cosine", value, half, component="fast|slow", layer=i) for i in (0, 1)]
    (found,) = (c for c in claims([made], rows, made) if "cosine" in c.claim)
    assert (found.answer, found.initial) == (answer, "0.5")


def test_norms_are_compared_with_each_other(made):
    def answer(fast, slow, half):
        rows = [
            row("weight_norm", v, half, component=c, layer=0) for c, v in (("fast", fast), ("slow", slow))
        ]
        (found,) = (c for c in claims([made], rows, made) if "norms" in c.claim)
        return found.answer

    assert answer(13.0, 13.0, 0.001) == "holds"
    assert answer(13.0, 13.5, 0.001) == "does not hold"
    assert answer(13.0, 13.01, 0.1) == "not resolved"
    assert answer(13.0, 13.0, math.nan) == "not resolved"


def test_only_the_last_step_and_the_end_of_the_context_speak(made):
    rows = [
        row("relative_drift", 0.3, component="selfmod.memory", layer=0, position="128"),
        row("relative_drift", 0.2, component="selfmod.memory", layer=0, position="64"),
        row("relative_drift", 1.0, component="selfmod.memory", layer=0, position="128", step=100),
        row("mean_loss", 7.2, probe="surprise"),
        row("pass_rate", 0.24, component="tau=10"),
        dataclasses.replace(row("pass_rate", 1.0, component="tau=20"), name="titans"),
    ]
    found = by_claim(claims([made], rows, made))
    drift = found[
        "fast weights differ from meta weights by about their norm, 1.0 (M_memory after 128 tokens)"
    ]
    assert (drift.measured, drift.answer) == ("tiny: 0.3 [0.29, 0.31]", "does not hold")
    assert found["mean per-token loss is 66.7 nats"].answer == "does not hold"
    assert found["99.97 % of tokens pass a threshold of 10"].answer == "does not hold"
    assert not any("20" in claim for claim in found)


def test_probes_of_an_earlier_step_say_nothing_of_a_longer_run(made):
    assert len(claims([made], [row("mean_loss", 7.2, probe="surprise")], made)) == 4
    assert len(claims([made], [row("mean_loss", 7.2, probe="surprise", step=100)], made)) == 3


def test_one_seed_has_no_interval_and_says_so(made):
    one = grid([c for c in made.cells if c.seed == 0])
    assert all(claim.measured.endswith(", no interval") for claim in claims([one], [], one))
    assert not any("nan" in claim.measured for claim in claims([one], [], one))
