#!/usr/bin/env bash
# Ask for a class with a header and watch the tokens come; the response headers say what was applied.
#   BASE_URL=http://127.0.0.1:8000 MODEL=smollm2 examples/curl.sh
set -euo pipefail
base_url=${BASE_URL:-http://127.0.0.1:8000}
model=${MODEL:-smollm2}

curl --silent --show-error --fail-with-body --no-buffer --include "$base_url/v1/chat/completions" \
  --header "content-type: application/json" \
  --header "x-slo-class: code" \
  --header "x-slo-tpot-ms: 80" \
  --data @- <<JSON
{
  "model": "$model",
  "messages": [{"role": "user", "content": "Write a line of Python that adds two numbers."}],
  "max_tokens": 16,
  "stream": true
}
JSON
