"""How a model is trained: one frozen dataclass, written into every checkpoint and compared when a run is resumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hopeprobe.errors import BadInputError
from hopeprobe.model.config import MOST_SEED, check_finite, check_whole
from hopeprobe.model.precision import activation_dtype

EARLY_STEPS = (0, 1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. AdamW, linear warm-up, then a constant rate: any run can be extended."""

    steps: int = 2000
    batch: int = 8
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices; not on gate biases, norms and other vectors
    clip: float = 1.0  # largest norm of the gradient
    warmup: int = 20  # steps
    seed: int = 0
    checkpoint_every: int = 200
    eval_every: int = 100
    eval_tokens: int = 8192
    precision: str = "float32"  # of activations, or bf16; `precision.py` says what stays float32 then

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "learning_rate",
            "clip",
            "checkpoint_every",
            "eval_every",
            "eval_tokens",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInputError(f"{name} is {getattr(self, name)!r}, must be above zero and finite")
        for name in ("warmup", "seed", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise BadInputError(f"{name} is {getattr(self, name)!r}, must not be negative")
        check_whole(
            steps=self.steps, batch=self.batch, warmup=self.warmup, checkpoint_every=self.checkpoint_every,
            eval_every=self.eval_every, eval_tokens=self.eval_tokens,
        )  # fmt: skip
        check_whole(MOST_SEED, seed=self.seed)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)!r}, must be at least 0 and below 1")
        if not self.epsilon > 0:
            raise BadInputError(f"epsilon is {self.epsilon!r}, must be above zero")
        check_finite(self)
        activation_dtype(self.precision)

    def rate(self, step: int) -> float:
        """Learning rate of the update that makes step `step` (1, 2, ...)."""
        return self.learning_rate * min(1.0, step / max(1, self.warmup))

    def checkpoint_steps(self) -> set[int]:
        """Steps after which a checkpoint is written."""
        regular = range(0, self.steps + 1, self.checkpoint_every)
        return {s for s in (*EARLY_STEPS, *regular, self.steps) if s <= self.steps}

    def resumable(self, step: int) -> bool:
        """Does the checkpoint of this step carry the optimiser's state."""
        return step > 0 and (step == self.steps or step % self.checkpoint_every == 0)
