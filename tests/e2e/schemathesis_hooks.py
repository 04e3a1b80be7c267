"""What schemathesis sends is cut to short answers: those of the tests' model may be endless."""

from __future__ import annotations

import schemathesis

SHORT, LIMIT = 4, 120_000


@schemathesis.hook
def before_call(context, case, kwargs):
    """A number of tokens for requests that name none; numbers that are refused stay as they are."""
    if not isinstance(case.body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens"):
        count = case.body.get(name)
        if isinstance(count, (int, float)) and not isinstance(count, bool) and SHORT < count <= LIMIT:
            case.body[name] = SHORT
    if case.body.get("max_completion_tokens") is None and case.body.get("max_tokens") is None:
        case.body["max_tokens"] = SHORT
