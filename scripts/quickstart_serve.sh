#!/usr/bin/env bash
# Export a model for Triton, serve it, ask it once over gRPC and once over REST, and stop the server.
#
#   bash scripts/quickstart_serve.sh PYTHON MODEL OUTPUT     OUTPUT: the repository, which is replaced
set -euo pipefail

python=$1 model=$2 output=$3
log=$output.log

rm -rf "$output"
"$python" -m oarlock export --model "$model" --target triton --output "$output"

# Any free ports. A permanent server uses 8080, 8000, 8001 and 8002.
read -r openai rest grpc metrics < <("$python" -c 'import socket
probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
print(*(probe.getsockname()[1] for probe in probes))')
"$python" -m oarlock serve "$output" --port "$openai" --rest-port "$rest" --grpc-port "$grpc" --metrics-port "$metrics" \
  >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
until grep -qs "oarlock: ready after" "$log"; do
  kill -0 "$server" 2>/dev/null || {
    cat "$log" >&2
    exit 1
  }
  sleep 0.2
done
grep "oarlock: ready after" "$log"

echo "Q over gRPC: Translate to Chinese. / mountain"
echo "A: $("$python" deploy/clients/grpc_client.py --url "127.0.0.1:$grpc" $'Translate to Chinese.\nmountain')"
echo "Q over REST: Repeat the words. / river window"
echo "A: $("$python" deploy/clients/rest.py --url "http://127.0.0.1:$rest" $'Repeat the words.\nriver window')"

trap - EXIT
kill "$server"
wait "$server"
