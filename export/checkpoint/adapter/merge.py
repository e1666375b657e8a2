"""Adapters merged into weights: W + strength * scale * B A and its kin.

Every change is of the base model's weights, so several adapters merge to the same whatever their
order: products are made in float32, as PEFT does, and added up in float64. A strength goes from the
base (0) to the adapter (1) in a straight line, DoRA's too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from forcing_kv.export.checkpoint.adapter.adapter import Adapter
from forcing_kv.runtime_trt.errors import InputError

_log = logging.getLogger(__name__)


class Merge:
    """Merges adapters into one parameter after the other.

    Raises:
        InputError: two of them put values of their own in the place of one parameter.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = sorted(adapters, key=lambda adapter: (str(adapter.path), adapter.strength))
        self._idle = {adapter.path for adapter in adapters}
        replaced = [
            name for each in adapters for name, update in each.updates.items() if update.replaces
        ]
        if twice := sorted({name for name in replaced if replaced.count(name) > 1}):
            raise InputError(
                f"several adapters replace {twice[0]} ({len(twice)} parameters in all); merge one "
                "of them"
            )

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """The parameter `name` with every adapter merged; float32 where one changes it.

        Raises:
            InputError: a tensor of an adapter is not finite.
        """
        given = [(each, each.updates[name]) for each in self._adapters if name in each.updates]
        if not given:
            return weight
        base, share = weight.double(), 1.0
        terms = list[Tensor]()
        for adapter, update in given:
            terms.append(adapter.strength * update.change(base).double())
            share -= adapter.strength * update.replaces
            if terms[-1].any():
                self._idle.discard(adapter.path)
        return sum(terms, share * base).float()

    def finish(self) -> None:
        """Warn of adapters that changed nothing."""
        for path in sorted(self._idle):
            _log.warning(
                "warning: %s: changes nothing: its product, its scale or its strength is zero", path
            )
