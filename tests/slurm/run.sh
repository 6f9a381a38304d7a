#!/usr/bin/env bash
# Start a Slurm of one node in a scratch folder, run the checks of this folder on it, stop it.
#
#   tests/slurm/run.sh [options of pytest]
#
# PYTHON names the interpreter that has bids_brainfm (default: .venv/bin/python). Where slurm-wlm
# and munge are missing, root gets them from the Debian archive. Nothing listens but on loopback.
# The node claims more than the machine has, a GPU too, so that our scripts run as they are.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}

PATH=$PATH:/usr/sbin
if ! { command -v slurmd && command -v munged; } >/dev/null; then
  [ "$(id -u)" = 0 ] || { echo 'slurm-wlm and munge are not installed' >&2; exit 1; }
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive \
    apt-get install -qq -y --no-install-recommends slurm-wlm munge >/dev/null
fi

scratch=$(mktemp -d)
pids=()
stop() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
  rm -rf "$scratch"
}
trap stop EXIT

host=$(hostname -s)
user=$(id -un)
free='import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in "12"]
print(*(x.getsockname()[1] for x in s))'
read -r control_port node_port < <("$python" -c "$free")
mkdir -p "$scratch"/{spool,state}
(umask 077 && head -c 1024 /dev/urandom >"$scratch/munge.key")
export SLURM_CONF=$scratch/slurm.conf
cat >"$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$control_port
SlurmdPort=$node_port
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket=$scratch/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.pid
SlurmdSpoolDir=$scratch/spool
StateSaveLocation=$scratch/state
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 RealMemory=64000 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
END
echo "NodeName=$host Name=gpu File=/dev/null" >"$scratch/gres.conf"

start() {
  local name=$1
  shift
  "$@" >"$scratch/$name.log" 2>&1 &
  pids=("$!" "${pids[@]}") # the last one started is stopped first
}
wait_for() {
  for _ in $(seq 100); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.1
  done
  echo "Slurm did not start: $*" >&2
  tail -n 20 "$scratch"/*.log >&2
  exit 1
}
node_is_idle() { sinfo --noheader --format=%t | grep -qx idle; }

start munged munged --force --foreground --key-file="$scratch/munge.key" \
  --socket="$scratch/munge.socket" --pid-file="$scratch/munged.pid" \
  --log-file="$scratch/munged-own.log" --seed-file="$scratch/munge.seed"
wait_for test -S "$scratch/munge.socket"
start slurmctld slurmctld -D -f "$SLURM_CONF"
start slurmd slurmd -D -N "$host" -f "$SLURM_CONF"
wait_for node_is_idle

"$python" -m pytest -m slow tests/slurm "$@" || {
  code=$?
  tail -n 40 "$scratch"/slurm*.log
  exit "$code"
}
