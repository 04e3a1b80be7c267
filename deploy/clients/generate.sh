#!/usr/bin/env bash
# Print an answer as it comes, with curl and server-sent events: URL=http://127.0.0.1:8000 MODEL=oarlock bash generate.sh "a question"
set -euo pipefail
URL=${URL:-http://127.0.0.1:8000}
MODEL=${MODEL:-oarlock}
MAX_TOKENS=${MAX_TOKENS:-} # of the answer; none: what the context leaves
TEMPERATURE=${TEMPERATURE:-0}
PYTHON=${PYTHON:-python3}
OARLOCK_API_KEY=${OARLOCK_API_KEY:-} # if the server asks for one
question=${1:?"usage: bash generate.sh QUESTION"}

body=$("$PYTHON" -c 'import json, sys
print(json.dumps({"text_input": sys.argv[1], "chat": True, "stream": True, "temperature": float(sys.argv[3])}
                 | ({"max_tokens": int(sys.argv[2])} if sys.argv[2] else {})))' \
  "$question" "$MAX_TOKENS" "$TEMPERATURE")
curl --silent --show-error --fail-with-body --no-buffer --header "Content-Type: application/json" --data-binary "$body" \
  ${OARLOCK_API_KEY:+--header @<(printf 'Authorization: Bearer %s\n' "$OARLOCK_API_KEY")} \
  "$URL/v2/models/$MODEL/generate_stream" | "$PYTHON" -c 'import json, sys
for line in sys.stdin:
    if not line.strip():
        continue
    try:
        piece = json.loads(line.removeprefix("data:"))
        print(piece["text_output"], end="", flush=True)
    except (ValueError, KeyError):
        sys.exit(line)
print()'
