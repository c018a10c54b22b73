# Shared by head.sbatch, workers.sbatch and one.sbatch. Settings come from the environment of sbatch:
#
#   LRAG_CLUSTER         folder that all nodes share, private to you: address, token, state  (~/lrag-cluster)
#   LRAG_PORT_BASE       first of the ports; another value for a second cluster on the same nodes  (20000)
#   LRAG_DASHBOARD_PORT  port of dashboard and job server on the head  (8265)
#   LRAG_PREFIX          put before every command, such as: apptainer exec --nv --bind /scratch lrag-ray.sif
#   LRAG_DRAIN_S         seconds that a leaving worker may use to store its blocks  (90)

set -euo pipefail
umask 077

cluster=${LRAG_CLUSTER:-$HOME/lrag-cluster}
port_base=${LRAG_PORT_BASE:-20000}
dashboard_port=${LRAG_DASHBOARD_PORT:-8265}
drain_s=${LRAG_DRAIN_S:-90}
read -r -a prefix <<< "${LRAG_PREFIX:-}"

mkdir -p "$cluster"
# Slurm nodes have other users: the cluster asks for a token.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$cluster/token"
unset RAY_ADDRESS RAY_AUTH_TOKEN
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$drain_s
export RAY_USAGE_STATS_ENABLED=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0

say() { echo "$(date -u +%FT%TZ) ${SLURM_JOB_ID:-}: $*"; }

# An address of this node that the others reach.
node_ip=${LRAG_NODE_IP:-$(hostname -I | cut -d' ' -f1)}

# Options of `ray start` for everything that listens: slot N owns the ports base + 100 N to base + 100 N + 99. Two
# workers on a node, or a worker beside the head, have different slots.
ports_of() {
  local first=$((port_base + 100 * $1))
  echo "--node-manager-port=$((first + 1)) --object-manager-port=$((first + 2))" \
    "--runtime-env-agent-port=$((first + 3)) --dashboard-agent-listen-port=$((first + 4))" \
    "--dashboard-agent-grpc-port=$((first + 5)) --metrics-export-port=$((first + 6))" \
    "--min-worker-port=$((first + 10)) --max-worker-port=$((first + 99))"
}

listens() { timeout 2 bash -c "< /dev/tcp/$node_ip/$1" 2> /dev/null; }

# Start the head (slot 0, without CPUs and GPUs: drivers live there, actors do not) and publish its address.
start_head() {
  rm -f "$cluster/address" "$cluster/ended" "$cluster/leave"
  [[ -s $cluster/token ]] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$cluster/token"
  local port=$((port_base + 7)) options taken_s=0
  read -r -a options <<< "$(ports_of 0)"
  # What ended a moment ago, such as the head before a requeue, may need some seconds to go. Whatever else answers there
  # must not be taken for our head.
  while listens "$port" || listens "$dashboard_port"; do
    if ((taken_s++ >= 60)); then
      say "port $port or $dashboard_port is taken, by another cluster perhaps: set LRAG_PORT_BASE, LRAG_DASHBOARD_PORT"
      exit 3
    fi
    sleep 1
  done
  # Ray gives a node half a minute to start, which a busy machine may exceed; and it refuses to start while a worker on
  # this node has not noticed that the head before is gone, which takes a minute.
  local until_s=$((SECONDS + 300))
  while ((SECONDS < until_s)); do
    "${prefix[@]}" ray start --head --block --disable-usage-stats --num-cpus=0 --num-gpus=0 \
      --node-ip-address="$node_ip" --port="$port" --ray-client-server-port=$((port_base + 8)) \
      --dashboard-host="$node_ip" --dashboard-port="$dashboard_port" "${options[@]}" &
    head_pid=$!
    while kill -0 "$head_pid" 2> /dev/null; do
      # The dashboard and its agent come last.
      if listens "$port" && listens "$dashboard_port" && listens $((port_base + 4)); then
        echo "$node_ip:$port" > "$cluster/address.new" && mv "$cluster/address.new" "$cluster/address"
        say "head at $node_ip:$port; submit to http://$node_ip:$dashboard_port"
        return
      fi
      sleep 1
    done
    sleep 5
  done
  say "the head did not start"
  exit 3
}

# Mark the regular end, so that workers do not wait for another head, and end the head.
end_head() {
  touch "$cluster/ended"
  stop_head
}

# End the head; workers wait for the next one.
stop_head() {
  rm -f "$cluster/address"
  kill -TERM "$head_pid" 2> /dev/null || true
  wait "$head_pid" || true
}

# Wait for a child through signals, whose traps run meanwhile. Sets `code`.
wait_for() {
  while kill -0 "$1" 2> /dev/null; do
    # A signal ends this wait, not the child.
    wait "$1" || true
  done
  code=0
  wait "$1" || code=$?
}

# Be a worker in slot $1 until told to leave: by the variable `leaving` (see the traps of the job script), the file
# $cluster/leave, or the end of the head. A head that is restarted elsewhere is joined again.
run_worker() {
  local address options
  read -r -a options <<< "$(ports_of "$1")"
  while [[ -z $leaving && ! -e $cluster/leave && ! -e $cluster/ended ]]; do
    if ! address=$(cat "$cluster/address" 2> /dev/null); then
      sleep 2
      continue
    fi
    say "joining $address"
    "${prefix[@]}" ray start --block --disable-usage-stats --address="$address" --node-ip-address="$node_ip" \
      --num-cpus="${SLURM_CPUS_PER_TASK:-1}" ${LRAG_GPUS:+--num-gpus="$LRAG_GPUS"} "${options[@]}" &
    ray_pid=$!
    while kill -0 "$ray_pid" 2> /dev/null; do
      if [[ -n $leaving || -e $cluster/leave || -e $cluster/ended ]]; then
        # `ray start` then drains the node: actors store their blocks and hand their rollouts on.
        say "leaving; up to $drain_s s to store"
        kill -TERM "$ray_pid" 2> /dev/null || true
        break
      fi
      sleep 1 & wait $! || true
    done
    wait_for "$ray_pid"
    say "ray start ended with $code"
    # Not in step with the others, which may have the same problem.
    sleep $((2 + RANDOM % 10))
  done
}
