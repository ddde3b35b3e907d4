#!/usr/bin/env bash
# Runs a command beside a Slurm of its own, munge and all, of this one machine as a node of 2 CPUs:
#
#   bash tests/slurm_cluster.sh COMMAND...     sbatch, squeue, scancel in it are those of this Slurm
#
# All of it lies in a temporary folder and ends with the command, whose status is returned. It asks
# for Debian's packages (apt-get install munge slurm-wlm); 77 says that they are missing.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null ||
    { echo "slurm_cluster.sh: no $program here: apt-get install munge slurm-wlm" >&2 && exit 77; }
done

folder=$(mktemp -d)
started=()
end() {
  for ((i = ${#started[@]} - 1; i >= 0; i--)); do
    kill "${started[i]}" 2>/dev/null || true
    wait "${started[i]}" 2>/dev/null || true
  done
  rm -rf "$folder"
}
trap end EXIT

umask 022
chmod 755 "$folder"
mkdir "$folder/state" "$folder/spool"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
  --seed-file="$folder/munge.seed" >/dev/null 2>&1 &
started+=($!)

# Two ports that nobody has now. cred_expire is also how long a requeued job waits.
read -r port other < <(python3 -c "
import socket
found = [socket.create_server(('', 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in found))")
user=$(id -un) host=$(hostname -s)
cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$other
SlurmUser=$user
SlurmdUser=$user
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
ReturnToService=2
KillWait=120
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$folder/slurm.conf
slurmctld -D -L "$folder/slurmctld.log" >/dev/null 2>&1 &
started+=($!)
slurmd -D -L "$folder/slurmd.log" >/dev/null 2>&1 &
started+=($!)

for ((i = 0; i < 60; i++)); do
  [ "$(sinfo --noheader --format=%T 2>/dev/null)" != idle ] || break
  sleep 1
done
if [ "$i" = 60 ]; then
  tail -n 20 "$folder"/*.log >&2
  echo "slurm_cluster.sh: the node did not come up within a minute" >&2
  exit 1
fi

status=0
"$@" || status=$?
[ "$status" = 0 ] || tail -n 20 "$folder"/slurm*.log >&2
exit "$status"
