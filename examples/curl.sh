#!/usr/bin/env bash
# Every route of the server with curl: bash examples/curl.sh [URL]. Writes apple.png and blue.png
# into the current folder. With a key: export JANUSFLOW_API_KEY.
set -euo pipefail
url="${1:-http://127.0.0.1:8000}"
post() {
  curl -sS --fail-with-body -H "Authorization: Bearer ${JANUSFLOW_API_KEY:-none}" "$@"
}
# The image of an answer, from base64 to a file.
save() {
  python3 -c 'import base64, json, sys
answer = json.load(sys.stdin)
print("seed", answer["data"][0]["seed"])
open(sys.argv[1], "wb").write(base64.b64decode(answer["data"][0]["b64_json"]))' "$1"
}

echo "the model, and what may be asked of it"
post "$url/v1/models"
echo

echo "an image"
post "$url/v1/images/generations" -H "Content-Type: application/json" \
  -d '{"prompt": "a red apple", "seed": 1, "num_inference_steps": 10, "guidance_scale": 2}' | save apple.png

echo "the same, streamed with two previews"
post -N "$url/v1/images/generations" -H "Content-Type: application/json" \
  -d '{"prompt": "a red apple", "seed": 1, "num_inference_steps": 10, "stream": true, "partial_images": 2}' |
  grep '^event: '

echo "the apple, half of its path generated again"
post "$url/v1/images/edits" -F prompt="a blue apple" -F image=@apple.png -F strength=0.5 \
  -F num_inference_steps=10 | save blue.png

echo "a question about it"
python3 - > question.json <<'PYTHON'
import base64
import json

image = base64.b64encode(open("apple.png", "rb").read()).decode()
parts = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    {"type": "text", "text": "Describe the picture."},
]
print(json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 16}))
PYTHON
post "$url/v1/chat/completions" -H "Content-Type: application/json" -d @question.json
rm question.json
echo

echo "for operators"
curl -sS "$url/health" "$url/ready"
echo
