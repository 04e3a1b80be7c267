#!/usr/bin/env python3
"""Ask a served model through its OpenAI-compatible endpoint: `pip install openai`, then

python openai_client.py --url http://127.0.0.1:8080/v1 --model oarlock "What is the opposite of big?"
"""

from __future__ import annotations

import argparse
import os
import sys

import openai


def main() -> int:
    """Ask, print the answer; the exit code."""
    parser = argparse.ArgumentParser(description="Ask a served model as OpenAI's are asked.")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="oarlock", help="or the name of a LoRA adapter served beside it")
    parser.add_argument(
        "--api-key", default=os.environ.get("OARLOCK_API_KEY") or os.environ.get("OPENAI_API_KEY", "none")
    )
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: what the context leaves)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url, api_key=arguments.api_key)
    try:
        answer = client.chat.completions.create(
            model=arguments.model,
            messages=[{"role": "user", "content": arguments.question}],
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            stream=arguments.stream,
        )
        if not arguments.stream:
            print(answer.choices[0].message.content)
            return 0
        for chunk in answer:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    except openai.OpenAIError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
