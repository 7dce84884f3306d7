"""titans-pytorch under the map `titans-pytorch`: what points show is what the package computes."""

import copy
import warnings

import pytest
import torch
from peer_toys import VOCAB, chain

import hopeprobe
from hopeprobe.errors import BadInputError
from hopeprobe.mapping import TITANS_PYTORCH, load_mapped, read_map, subject_of

pytestmark = pytest.mark.peers
CONFIG = {"num_tokens": VOCAB, "dim": 16, "depth": 2, "segment_len": 4, "heads": 2, "dim_head": 8}


@pytest.fixture(scope="module")
def mac():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script in a package that it needs
        from titans_pytorch import MemoryAsContextTransformer
    torch.manual_seed(0)
    return MemoryAsContextTransformer(**CONFIG).eval()


@pytest.fixture(scope="module")
def document():
    made = copy.deepcopy(dict(read_map(TITANS_PYTORCH).document))
    made["model"]["context"], made["memory"]["titans"]["period"] = 16, 4
    return made


def test_fast_weights_are_those_of_the_package(mac, document):
    subject = subject_of(mac, document)
    tokens = torch.from_numpy(chain(2, 17, seed=4))
    with torch.no_grad():
        logits, cache = mac(tokens[:, :-1], return_cache=True)
    out, seen = subject.module.run_with_cache(tokens)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(out.losses, expected)
    for layer, state in enumerate(cache[2]):
        for name, theirs in (("w1", "model.weights.0"), ("w2", "model.weights.1")):
            shown = seen[f"blocks.{layer}.titans.hook_fast_{name}"]
            assert shown.shape[:3] == (2, 4, 1)
            torch.testing.assert_close(shown[:, :, 0], state.updates[theirs][:, 1:])
            # The state that goes on is the last write; a head a row.
            torch.testing.assert_close(shown[:, -1, 0], state.states[0][theirs])
    assert (shown[:, 0] - shown[:, 1]).abs().max() > 0


def test_a_frozen_memory_is_read_as_it_began(mac, document):
    """Closed by the map, against the package told by `store_mask` and a forgetting of nothing."""
    subject = subject_of(mac, document)
    tokens = torch.from_numpy(chain(2, 17, seed=5))
    frozen = subject.module.run_with_hooks(tokens, fwd_hooks=subject.freeze_hooks())
    still = copy.deepcopy(mac)
    with torch.no_grad():
        for layer in still.layers:
            for gate in (layer[4].to_adaptive_step, layer[4].to_decay_factor):
                gate[0].weight.zero_()
                gate[0].bias.fill_(-1e9)
        logits = still(tokens[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(frozen.losses, expected)
    assert (frozen.losses - subject.run(tokens).losses).abs().max() > 1e-4


def test_a_period_that_is_not_the_models_is_found(mac, document):
    wrong = copy.deepcopy(document)
    wrong["memory"]["titans"]["period"] = 8
    with pytest.raises(BadInputError, match="4 writes of 16 tokens, and a period of 8 makes 2"):
        subject_of(mac, wrong)


def test_from_a_file_to_verdicts(mac, document, toy_text, tmp_path):
    file = tmp_path / "step-0.pt"
    torch.save({"model": mac.state_dict(), "config": CONFIG, "step": 0}, file)
    subject = load_mapped(file, document)
    found = hopeprobe.analyze(
        subject,
        ["meta-fast", "adaptation", "integrity"],
        data=toy_text,
        split="all",
        tokens=640,
        fresh=0,
        cache_dir=tmp_path,
    )
    assert found.missing == []
    table = found.table
    assert "learned" not in set(table.verdict)
    drift = table[table.statistic == "relative_drift"]
    assert set(drift.position) == {"4", "8", "12", "16"}
    assert (drift.value > 0).all()
    change = table[(table.statistic == "loss_change") & (table.component == "titans")]
    assert change.value.notna().all()
