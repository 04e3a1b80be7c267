"""Flags of the commands that write the weights of a model."""

from __future__ import annotations

import argparse


def add_weight_flags(parser: argparse.ArgumentParser, as_in: str) -> None:
    """--dtype, --max-shard-size, --no-proof and --allow-pickle-weights.

    Args:
        as_in: where the type of the weights comes from by default.
    """
    types = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=types, help=f"of the weights (default: as in {as_in})")
    add_shard_flag(parser)
    parser.add_argument(
        "--no-proof", "--no_proof", action="store_true", help="do not compare scores of the result with the source's"
    )
    parser.add_argument(
        "--allow-pickle-weights",
        "--allow_pickle_weights",
        action="store_true",
        help="read pytorch_model.bin or *.pdparams where there are no safetensors",
    )


def add_shard_flag(parser: argparse.ArgumentParser) -> None:
    """--max-shard-size, which becomes `shard_bytes`."""
    parser.add_argument(
        "--max-shard-size",
        dest="shard_bytes",
        type=_bytes,
        default=_bytes("5"),
        metavar="GB",
        help="most of a weight file (default: 5)",
    )


def _bytes(gigabytes: str) -> int:
    size = round(float(gigabytes) * 1e9)
    if size < 1:
        raise argparse.ArgumentTypeError(f"{gigabytes} GB is no size of a file")
    return size


def positive(text: str) -> int:
    """A count on the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
