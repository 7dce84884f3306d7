"""What the package itself does with a row of tokens, by the calls its training loop makes, and its fast weights."""

from __future__ import annotations

from typing import NamedTuple

from peer_toys import changed

MEMORIES = ("k", "v", "q", "eta", "alpha", "memory")
VARIANTS = ("hope_selfmod", "hope_attention", "hope_hybrid", "transformer", "titan")


def of_variant(variant):
    """What of the configuration's `model` makes it this variant."""
    return {"type": "titan"} if variant == "titan" else {"block_variant": variant}


def make(seed=0, **parts):
    from nested_learning_subject import NestedLearningSubject

    return NestedLearningSubject(changed(**parts), seed=seed)


class Streamed(NamedTuple):
    """losses: (n,). state: the fast state. signals: by call and block, the teach signals that the package was given.

    surprises: by call, what metrics but `l2` say, else None.
    """

    losses: object
    state: object
    signals: list
    surprises: list


def package_stream(model, row, tick, per_layer=False, metric=None, carry=False, through=False):
    """One row as `run_training_loop` streams it (boundary targets, fast state, no outer step).

    through: as its mode `boundary_state_grad_through_write` does, gradients accumulating in the model.
    """
    import torch
    from nested_learning.training import (
        _compute_layer_teach_signals,
        _compute_surprise_override,
        _iter_online_boundary_chunks,
        compute_teach_signal,
    )

    state, losses, signals, surprises = model.init_fast_state(), [], [], []
    cache = model.init_attention_cache() if carry else None
    for chunk, boundary, _ in _iter_online_boundary_chunks(row, chunk_size=tick):
        if boundary is None:  # the last token of the window is a target alone
            break
        targets = torch.cat([chunk[:, 1:], boundary[:, None]], dim=1)
        given, before = {"fast_state": state}, cache
        if carry:
            logits, _, outputs, cache = model.forward_with_block_outputs(
                chunk, **given, attention_cache=before, return_attention_cache=True
            )
        else:
            logits, _, outputs = model.forward_with_block_outputs(chunk, **given)
        loss = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")
        losses.append(loss.detach())
        surprise = _compute_surprise_override(
            metric or "l2", logits=logits, tokens=chunk, loss=loss.mean(), next_tokens=boundary
        )
        if per_layer:
            layers = _compute_layer_teach_signals(
                loss.mean(), outputs, detach=not through, create_graph=through
            )
            signal = {"teach_signals": layers}
        else:
            layers = [compute_teach_signal(model, logits, chunk, next_tokens=boundary)] * len(outputs)
            signal = {"teach_signal": layers[0]}
        signals.append([layer.detach()[0] for layer in layers])
        surprises.append(surprise)
        if through:
            loss.mean().backward(retain_graph=True)
        with torch.set_grad_enabled(through):
            model(
                chunk, **signal, **given, surprise_value=surprise, finalize_updates=False,
                attention_cache=before, differentiable_updates=through,
            )  # fmt: skip
    return Streamed(torch.cat(losses), state, signals, surprises)


def package_window(model, row, metric="l2"):
    """One row as `run_training_loop` reads it where it is not online, or of `type: titan`: last token and all."""
    import torch
    from nested_learning.training import _compute_surprise_override, compute_teach_signal

    state = model.init_fast_state()
    with torch.no_grad():
        logits = model(row, fast_state=state)
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="none")
        surprise = _compute_surprise_override(metric, logits=logits, tokens=row, loss=losses.mean())
        signal = compute_teach_signal(model, logits, row)
        model(row, teach_signal=signal, surprise_value=surprise, fast_state=state)
    return Streamed(losses, state, [[signal[0]] * len(model.blocks)], [surprise])


def plain(subject, tokens):
    """Losses of the package's forward pass with nothing written, a tick at a time."""
    import torch

    tick, n = subject.tick, tokens.shape[1] - 1
    with torch.no_grad():
        logits = [subject.module.peer(tokens[:, at : min(at + tick, n)]) for at in range(0, n, tick)]
    return torch.nn.functional.cross_entropy(torch.cat(logits, 1).mT, tokens[:, 1:], reduction="none")


def middle_surprise(streams, scale=1.0, clip=0.0, clipped=True):
    """The median surprise of calls, so that a threshold there lets some pass and some not.

    clipped: whether `l2` clips before it asks.
    """
    import statistics

    found = []
    for stream in streams:
        for signals, surprise in zip(stream.signals, stream.surprises, strict=True):
            norms = [(signal * scale).norm(dim=-1) for signal in signals]
            norms = [n.clamp(max=clip) if clip and clipped else n for n in norms]
            found += [float(n.mean()) for n in norms] if surprise is None else [surprise]
    return statistics.median(found)


def tensors(state):
    """Everything that a fast state holds, by name, without a batch; of the package's state or a row of ours."""
    found = {}
    for i, block in enumerate(getattr(state, "fast", state).blocks):
        for name, memory in vars(block.selfmod_state).items() if block.selfmod_state else ():
            weights = {w: t for w, t in vars(memory).items() if t is not None}
            found |= {f"{i}.{name}.{w}": t if t.ndim == 2 else t[0] for w, t in weights.items()}
        found |= {f"{i}.{v}.{p}": t for v, named in block.cms_params.items() for p, t in named.items()}
        found |= {f"{i}.titan.{p}": t for p, t in (block.titan_params or {}).items()}
    return found


def assert_same(state, other, atol=1e-6):
    import torch

    ours, theirs = tensors(state), tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=name)


def updates(state, level):
    """How often the package wrote a level (or `titan`), by block."""
    blocks = getattr(state, "fast", state).blocks
    return [block.level_manager.clock.stats()[level].updates for block in blocks]
