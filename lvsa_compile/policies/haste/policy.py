"""HASTE as a policy: heads keep the blocks of a policy until their queries and keys drifted (arXiv 2605.14513)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lvsa_compile.errors import OptionError
from lvsa_compile.policies.block_choice import dynamic_plan
from lvsa_compile.policies.contract import Facts, Geometry, Plan, Policy
from lvsa_compile.policies.given import given_policy
from lvsa_compile.policies.haste.refreshing import check_refreshing
from lvsa_compile.policies.losa.policy import LoSA
from lvsa_compile.policies.xattention.policy import XAttention
from lvsa_compile.reasons import Miss


@dataclass(frozen=True)
class Haste:
    """Heads attend the blocks that ``base`` chose for them, and choose anew where the means of their queries and keys drifted.

    The drift of a head is the L1 distance of both means, over the tokens of the video, from those of its last choice.  Each video, sample,
    guidance branch and layer has its own.  Dense steps, as ``dense_steps`` of the backend asks for them, choose nothing.

    Args:
        base: the policy that chooses, ``XAttention(stride=16)`` if none is given, or ``LoSA()``; its name, or a dict of its name and
            fields, do too.  Over LoSA a head that chooses anew attends everything in that call; LoSA's dense steps hold.
        threshold: up to this drift a head keeps its blocks.  It has the units of queries and keys, so that each model has its own; the
            paper has 30 for XAttention on Wan.
        layer_gate: of two shares of a layer's heads: where fewer than the first would choose anew none does, where more than the second
            all do.  None leaves each head to itself.
        relative: drifts are divided by the L1 norm of the means at the last choice, so that the threshold has no units and
            is a number such as 0.5.

    Raises:
        OptionError: a value that it cannot have, named with its remedy.

    Example:
        >>> compiled = torch.compile(model, backend="lvsa", options={"policy": "haste", "dense_steps": 5})
    """

    name: ClassVar[str] = "haste"
    needs_horizon: ClassVar[bool] = False

    base: Any = XAttention(stride=16)  # noqa: RUF009 - frozen
    threshold: float = 30.0
    layer_gate: tuple[float, float] | None = (0.4, 0.8)
    relative: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.base, (str, Mapping)):
            object.__setattr__(self, "base", given_policy("base", self.base))
        if not isinstance(self.base, (XAttention, LoSA)):
            raise OptionError("base", self.base, "its blocks cannot be kept by heads", "Give 'xattention' or 'losa', or such a policy.")
        check_refreshing(self.threshold, self.layer_gate, self.relative)

    def applies(self, geometry: Geometry, facts: Facts) -> Miss | None:
        """Where its base does."""
        policy: Policy = self.base
        return policy.applies(geometry, facts)

    def plan(self, geometry: Geometry, facts: Facts) -> Plan:
        """That of its base, whose blocks are kept."""
        plan = self.base.plan(geometry, facts)
        return dynamic_plan(
            self, geometry, facts, self.base.name, self.base.numbers, blocks=self.base.blocks, density=plan.density, rows=plan.rows,
            most_drift=self.threshold, layer_gate=self.layer_gate, relative=self.relative,
        )  # fmt: skip


POLICY = Haste
