#!/usr/bin/env python3
"""Ask a served model over REST: `pip install requests`, then

python rest.py --url http://127.0.0.1:8000 --model oarlock "What is the opposite of big?"

A key that the server asks for is taken from the variable OARLOCK_API_KEY: in arguments all users of the machine see it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import requests


def main() -> int:
    """Ask, print the answer; the exit code."""
    parser = argparse.ArgumentParser(description="Ask a served model over REST (Triton's generate extension).")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="oarlock")
    parser.add_argument("--adapter", default="", help="a LoRA adapter that is served beside the model")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: what the context leaves)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    arguments = parser.parse_args()
    body = {
        "text_input": arguments.question,
        "chat": True,  # put into the model's chat template
        "temperature": arguments.temperature,
        "stream": arguments.stream,
    }
    if arguments.max_tokens is not None:
        body["max_tokens"] = arguments.max_tokens
    if arguments.adapter:
        body["adapter"] = arguments.adapter
    way = "generate_stream" if arguments.stream else "generate"
    address = f"{arguments.url.rstrip('/')}/v2/models/{arguments.model}/{way}"
    key = os.environ.get("OARLOCK_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with requests.post(address, json=body, headers=headers, stream=arguments.stream, timeout=600) as response:
        if response.status_code != 200:
            print(f"{response.status_code}: {response.text}", file=sys.stderr)
            return 1
        if not arguments.stream:
            print(response.json()["text_output"])
            return 0
        for line in response.iter_lines():
            if line.startswith(b"data:"):
                piece = json.loads(line[len(b"data:") :])
                if "error" in piece:
                    print(f"\n{piece['error']}", file=sys.stderr)
                    return 1
                print(piece["text_output"], end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
