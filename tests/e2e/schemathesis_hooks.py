"""Shortens the answers to requests from schemathesis: those of the test model may be endless."""

from __future__ import annotations

import schemathesis

SHORT, LIMIT = 4, 120_000


@schemathesis.hook
def before_call(context, case, kwargs):
    """Set a number of tokens in requests that name none; invalid numbers are kept."""
    if not isinstance(case.body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens"):
        count = case.body.get(name)
        if isinstance(count, (int, float)) and not isinstance(count, bool) and SHORT < count <= LIMIT:
            case.body[name] = SHORT
    if case.body.get("max_completion_tokens") is None and case.body.get("max_tokens") is None:
        case.body["max_tokens"] = SHORT
