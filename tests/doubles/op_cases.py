"""The small cases of one operator."""

from forcing_kv.plugins.check.cases import CASES, OpCase
from forcing_kv.plugins.op_spec import OpSpec


def cases_of(spec: OpSpec) -> tuple[OpCase, ...]:
    """Those of the operators' cases that are of this one."""
    return tuple(case for case in CASES if case.spec is spec)
