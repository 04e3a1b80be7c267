#!/usr/bin/env python3
"""Ask a served model over gRPC, streaming: `pip install tritonclient[grpc]`, then

python grpc_client.py --url 127.0.0.1:8001 --model oarlock "What is the opposite of big?"

A key that the server asks for is taken from the variable OARLOCK_API_KEY: in arguments all users of the machine see it.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys

import numpy as np
import tritonclient.grpc as triton


def tensor(name: str, kind: str, value: object) -> triton.InferInput:
    """An input of one element."""
    types = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}
    found = triton.InferInput(name, [1], kind)
    found.set_data_from_numpy(np.array([value], dtype=types[kind]))
    return found


def main() -> int:
    """Ask, print the answer; the exit code."""
    parser = argparse.ArgumentParser(description="Ask a served model over gRPC.")
    parser.add_argument("question")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--model", default="oarlock")
    parser.add_argument("--adapter", default="", help="a LoRA adapter that is served beside the model")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: what the context leaves)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--tls", action="store_true", help="the port is encrypted")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    arguments = parser.parse_args()
    inputs = [
        tensor("text_input", "BYTES", arguments.question.encode()),
        tensor("chat", "BOOL", True),  # put into the model's chat template
        tensor("stream", "BOOL", arguments.stream),
        tensor("temperature", "FP32", arguments.temperature),
    ]
    if arguments.max_tokens is not None:
        inputs.append(tensor("max_tokens", "INT32", arguments.max_tokens))
    if arguments.adapter:
        inputs.append(tensor("adapter", "BYTES", arguments.adapter.encode()))
    answers: queue.Queue[tuple[triton.InferResult | None, Exception | None]] = queue.Queue()
    key = os.environ.get("OARLOCK_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with triton.InferenceServerClient(arguments.url, ssl=arguments.tls) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
        # The model may send several answers to one request; an empty last one ends them.
        client.async_stream_infer(arguments.model, inputs, enable_empty_final_response=True)
        while True:
            result, error = answers.get(timeout=600)
            if error is not None:
                print(f"\n{error}", file=sys.stderr)
                return 1
            for piece in result.as_numpy("text_output") if result.as_numpy("text_output") is not None else ():
                print(piece.decode(), end="", flush=True)
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream()
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
