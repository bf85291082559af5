"""Kill-and-Revive decided in the cloud, as in the paper: the edge sends norms, the cloud says who is killed or revived.

Rule and state come with the question, so the cloud keeps nothing, and one that was restarted decides alike.
"""

from __future__ import annotations

import json
from typing import Any

from ..kill_revive.rule import KillReviveRule, KillReviveState, Observations
from ..kill_revive.rule import decide as decide_here
from ..wire.messages import WireError


def decide(question: dict[str, Any]) -> dict[str, Any]:
    """Answer a question of `d2ft_peft.dlora.edge.decide_in_cloud`.

    Raises:
        WireError: If it makes no sense.
    """
    try:
        rule = KillReviveRule(**question["rule"])
        state = KillReviveState.from_json(json.dumps(question["state"]))
        seen = Observations(**question["observations"])
        after, killed, revived = decide_here(rule, state, seen)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"no decision can be made from this: {error}"[:500]) from error
    return {"state": json.loads(after.to_json()), "killed": list(killed), "revived": list(revived)}
