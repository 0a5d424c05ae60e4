#!/usr/bin/env bash
# Trains on Cloud TPU VMs requested as a queued resource.
#
#   launch/tpu_vm.sh --name=jf --zone=us-west4-a --type=v5litepod-256 --config=configs/pretrain.py \
#       --workdir=gs://BUCKET/runs/pretrain [--slices=2] [--spot=1] [--dry-run] [-- --config.mesh.fsdp=8]
#
# --project  the cloud project; default: gcloud's
# --type     accelerator type: v5litepod-16, v5litepod-256, v6e-256, v5p-128, ...
# --runtime  the VM's image; default: depends on the type
# --slices   number of slices of the type, connected by the data center's network
# --spot     1: cheaper machines that can be taken away at any time
# --source   GIT_URL@COMMIT to run; default: this checkout's origin and commit, if all of it is pushed
# --stop     1: delete the machines instead
# The training ends with this script's ssh connections: call it in tmux, on a machine that stays on.
# To resume a run, use the same command again. Machines that still exist are used again, and a training
# that still runs there is ended first.

set -euo pipefail
SCRIPT="$(realpath "$0")"
cd "$(dirname "$SCRIPT")/.."
source launch/common.sh
read_options "name zone project type runtime slices spot source config workdir stop" "$@"
require name zone
place=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")
if [ -n "${STOP:-}" ]; then
  run gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
  exit 0
fi
require type config workdir
whole slices
SLICES="${SLICES:-1}"
case "$TYPE" in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  v4-*) image=tpu-ubuntu2204-base ;;
  *) image="" ;;
esac
RUNTIME="${RUNTIME:-$image}"
[ -n "$RUNTIME" ] || die "--type: expected v5litepod-N, v6e-N, v5p-N or v4-N; got $TYPE: set --runtime=IMAGE"
SOURCE="${SOURCE:-$(checkout_source)}"

create=(gcloud compute tpus queued-resources create "$NAME" "${place[@]}"
  --accelerator-type="$TYPE" --runtime-version="$RUNTIME")
if [ "$SLICES" -gt 1 ]; then
  create+=(--node-prefix="$NAME" --node-count="$SLICES")
  nodes=()
  for ((i = 0; i < SLICES; i++)); do nodes+=("$NAME-$i"); done
else
  create+=(--node-id="$NAME")
  nodes=("$NAME")
fi
[ -z "${SPOT:-}" ] || create+=(--spot)
if [ -n "$DRY_RUN" ] || ! gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" >/dev/null 2>&1; then
  run "${create[@]}"
fi
state() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'
}
if [ -z "$DRY_RUN" ]; then
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in FAILED | SUSPENDED) die "$NAME is $(state): delete it with --stop=1, then run this command again" ;; esac
    echo "waiting for $NAME: $(state)"
    sleep 30
  done
fi

# Every worker of every slice runs the same; jax.distributed finds the others. A training may outlive
# the ssh connection that started it, and would keep the TPU busy: it gets a SIGTERM, on which it saves,
# and is killed after 120 seconds. The pattern starts with Python's name, so it fits no shell, such as
# this command's own. uv installs a Python that is new enough, because the image's own may be too old.
old="-u \$(id -u) -f '^[^ ]*python[0-9.]* -m janusflow_jax[.]train'"
setup="if pkill $old; then for i in \$(seq 60); do pgrep $old >/dev/null || break; sleep 2; done;"
setup+=" pkill -KILL $old; fi; rm -rf ~/src && git clone -q ${SOURCE%@*} ~/src && git -C ~/src checkout -q ${SOURCE##*@}"
setup+=" && python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --allow-existing"
setup+=" --python 3.12 ~/jf && ~/.local/bin/uv pip install -q -p ~/jf -e ~/src[tpu]"
start="cd ~/src && source ~/jf/bin/activate && $(remote_train_command)"
pids=()
for node in "${nodes[@]}"; do
  run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$setup"
done
for node in "${nodes[@]}"; do
  if [ -n "$DRY_RUN" ]; then
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$start"
  else
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$start" &
    pids+=($!)
  fi
done
for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid"; done
