"""Errors of the `tokenizers` library as Oarlock's: it raises plain Exception, and panics beyond `except Exception`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from oarlock.errors import ModelError, OarlockError, first_line

ON_A_TEXT = "the tokenizer fails on a text"


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Errors of the library in here become a ModelError that begins with `what`.

    A panic of its Rust code arrives as pyo3's PanicException, which is no Exception, so that a thread or a program
    would end by it.
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
    """Whether it is a panic of an extension written in Rust (each of them has a class of its own for it)."""
    return type(error).__name__ == "PanicException"
