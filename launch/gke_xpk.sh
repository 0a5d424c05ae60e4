#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster with xpk (pip install xpk).
#
#   launch/gke_xpk.sh --name=jf --cluster=CLUSTER --zone=us-central2-b --type=v5litepod-256 \
#       --image=REGION-docker.pkg.dev/PROJECT/REPO/janusflow:1 --config=configs/pretrain.py \
#       --workdir=gs://BUCKET/runs/pretrain [--slices=2] [--build=1] [--create=1] [--dry-run]
#
# --project   the cloud project; default: gcloud's
# --build     1: first build the image from this checkout (launch/Dockerfile) and push it
# --create    1: first create the cluster
# --spot      1: use spot machines (with --create)
# --restarts  how often GKE restarts a workload that lost its machines; default 100
# --stop      1: delete the workload instead. Checkpoints stay. A workload's name can be used again
#             only after this

set -euo pipefail
SCRIPT="$(realpath "$0")"
cd "$(dirname "$SCRIPT")/.."
source launch/common.sh
read_options "name cluster project zone type slices image config workdir build create spot restarts stop" "$@"
require name cluster zone
place=(--cluster="$CLUSTER" --zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
if [ -n "${STOP:-}" ]; then
  run xpk workload delete --workload="$NAME" "${place[@]}"
  exit 0
fi
require type image config workdir
SLICES="${SLICES:-1}"

if [ -n "${CREATE:-}" ]; then
  kind=(--on-demand)
  [ -z "${SPOT:-}" ] || kind=(--spot)
  run xpk cluster create "${place[@]}" --tpu-type="$TYPE" --num-slices="$SLICES" "${kind[@]}"
fi
if [ -n "${BUILD:-}" ]; then
  run docker build --file=launch/Dockerfile --tag="$IMAGE" .
  run docker push "$IMAGE"
fi
run xpk workload create "${place[@]}" --workload="$NAME" --tpu-type="$TYPE" \
  --num-slices="$SLICES" --docker-image="$IMAGE" --max-restarts="${RESTARTS:-100}" \
  --command="$(remote_train_command)"
