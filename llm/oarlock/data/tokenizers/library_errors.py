"""Converting errors of the `tokenizers` library, which raises plain Exception and Rust panics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from oarlock.errors import ModelError, OarlockError, first_line

ON_A_TEXT = "the tokenizer fails on a text"


@contextlib.contextmanager
def convert_errors(what: str) -> Iterator[None]:
    """Convert errors of the library to a ModelError that starts with `what`.

    A panic of its Rust code is a PanicException, which is not an Exception. It would end the thread or the program.
    """
    try:
        yield
    except OarlockError:
        raise
    except BaseException as error:
        if not (is_panic(error) or type(error) is Exception):
            raise
        raise ModelError(f"{what}: {first_line(error)}") from error


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust extension. Each extension has its own class for it."""
    return type(error).__name__ == "PanicException"
