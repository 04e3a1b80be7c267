#!/usr/bin/env bash
# Ask a served model over Triton's REST with curl: URL=http://127.0.0.1:8000 MODEL=oarlock bash rest.sh "a question"
set -euo pipefail
URL=${URL:-http://127.0.0.1:8000}
MODEL=${MODEL:-oarlock}
MAX_TOKENS=${MAX_TOKENS:-} # of the answer; none: what the context leaves
TEMPERATURE=${TEMPERATURE:-0}
PYTHON=${PYTHON:-python3}
OARLOCK_API_KEY=${OARLOCK_API_KEY:-} # if the server asks for one
question=${1:?"usage: bash rest.sh QUESTION"}

# Python writes and reads the JSON: quotes and line breaks in a question have to be escaped.
body=$("$PYTHON" -c 'import json, sys
print(json.dumps({"text_input": sys.argv[1], "chat": True, "temperature": float(sys.argv[3])}
                 | ({"max_tokens": int(sys.argv[2])} if sys.argv[2] else {})))' \
  "$question" "$MAX_TOKENS" "$TEMPERATURE")
curl --silent --show-error --fail-with-body --header "Content-Type: application/json" --data-binary "$body" \
  ${OARLOCK_API_KEY:+--header @<(printf 'Authorization: Bearer %s\n' "$OARLOCK_API_KEY")} \
  "$URL/v2/models/$MODEL/generate" | "$PYTHON" -c 'import json, sys
text = sys.stdin.read()
try:
    print(json.loads(text)["text_output"])
except (ValueError, KeyError):
    sys.exit(text)'
