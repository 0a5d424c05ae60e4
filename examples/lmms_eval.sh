#!/usr/bin/env bash
# lmms-eval through the API: bash examples/lmms_eval.sh [URL] [TASKS]. Needs `pip install lmms-eval`,
# and its data sets. A longer time-out than its 10 s: requests wait in the server's queue.
set -euo pipefail
url="${1:-http://127.0.0.1:8000}"
model="$(curl -sS -H "Authorization: Bearer ${JANUSFLOW_API_KEY:-none}" "$url/v1/models" |
  python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')"
python3 -m lmms_eval --model openai --tasks "${2:-mme}" --batch_size 1 \
  --model_args "model=$model,base_url=$url/v1,api_key=${JANUSFLOW_API_KEY:-none},timeout=600,num_concurrent=16"
