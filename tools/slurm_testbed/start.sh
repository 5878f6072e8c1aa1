#!/bin/bash
# Starts a throwaway SLURM cluster on this host. `start.sh --help` says how; README.md says what it can show.
set -Eeuo pipefail
umask 022
unset CDPATH
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
PACKAGES=(slurmctld slurmd slurm-client munge)
COMMANDS=(slurmctld slurmd sbatch munged)
ACCOUNTING_PACKAGES=(slurmdbd mariadb-server)
ACCOUNTING_COMMANDS=(slurmdbd mariadbd)

usage() {
    cat <<'TEXT'
Usage: tools/slurm_testbed/start.sh [DIR]       start a cluster, its state in DIR (default /tmp/ddpm-slurm-testbed)
       tools/slurm_testbed/start.sh --install   only install the packages it needs, where they are missing
Then:  . DIR/env.sh; sinfo; sbatch …            as any user
       tools/slurm_testbed/stop.sh [DIR] [--purge]

Needs root on Debian. Missing packages are installed with apt-get. Partitions: gpu (default, pre-emptible) and urgent.

Settings, by environment variable (default):
  NODES (4)             CPUS (4), GPUS (2, fake), MEM (16000 MB)    of each node
  GRACE (10)            seconds between a pre-emption's SIGTERM and the rest of the ladder
  KILLWAIT (5)          seconds between SIGTERM and SIGKILL
  CRED_EXPIRE (5)       seconds that a requeued job is held back, at least 5
  SLURMD_TIMEOUT (20)   seconds until a silent node is DOWN
  BASE_PORT (free one)  first of NODES + 3 ports in a row
  GPU_TYPE (none)       type of the GPUs, e.g. a100: nodes then have gpu:a100:2
  SUBMIT_LUA (none)     a job_submit.lua: the site's plugin, which may refuse
  ACCOUNTING (0)        1: slurmdbd, with the account `lab` for the user games, and limits that hold
  CLUSTER (testbed)     its name
  BESIDE (none)         DIR of a running testbed with ACCOUNTING=1, whose slurmdbd knows this cluster too: sbatch -M
  EXTRA_CONF            a file whose lines end slurm.conf

Exit codes: 0 ready, 1 the daemons did not come up, 2 the request was wrong, 3 the machine lacks something.
TEXT
}

die() { local rc=$1; shift; echo "start.sh: $*" >&2; exit "$rc"; }

missing_commands() {
    local c
    for c in "${COMMANDS[@]}"; do command -v "$c" >/dev/null || echo "$c"; done
}

install_packages() {
    local missing log
    missing=$(missing_commands | paste -sd ' ')
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || die 3 "$missing missing; as root: apt-get install ${PACKAGES[*]}"
    command -v apt-get >/dev/null || die 3 "$missing missing and no apt-get here: the testbed needs Debian's packages"
    echo "start.sh: installing ${PACKAGES[*]} ($missing missing)"
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # The second try is for a machine whose package lists are empty or old.
    local install=(apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends "${PACKAGES[@]}")
    "${install[@]}" >"$log" 2>&1 </dev/null || { apt-get update && "${install[@]}"; } >>"$log" 2>&1 </dev/null ||
        { tail -n 20 "$log" >&2; rm -f "$log"; die 3 "apt-get could not install ${PACKAGES[*]}"; }
    rm -f "$log"
}

DIR=
case ${1:-} in
    -h | --help) usage; exit 0 ;;
    --install)
        install_packages
        PACKAGES=("${ACCOUNTING_PACKAGES[@]}") COMMANDS=("${ACCOUNTING_COMMANDS[@]}")
        install_packages
        exit 0 ;;
    -*) usage >&2; die 2 "unknown option $1" ;;
esac
[ $# -le 1 ] || { usage >&2; die 2 "one DIR at most, got: $*"; }
DIR=$(realpath -m "${1:-/tmp/ddpm-slurm-testbed}")
NODES=${NODES:-4} CPUS=${CPUS:-4} GPUS=${GPUS:-2} MEM=${MEM:-16000} GRACE=${GRACE:-10} KILLWAIT=${KILLWAIT:-5}
CRED_EXPIRE=${CRED_EXPIRE:-5} SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-20} BASE_PORT=${BASE_PORT:-} EXTRA_CONF=${EXTRA_CONF:-}
GPU_TYPE=${GPU_TYPE:-} SUBMIT_LUA=${SUBMIT_LUA:-} ACCOUNTING=${ACCOUNTING:-0} CLUSTER=${CLUSTER:-testbed}
BESIDE=${BESIDE:+$(realpath -m "$BESIDE")}

# What is wrong with the request itself comes first.
for knob in NODES CPUS GPUS MEM GRACE KILLWAIT CRED_EXPIRE SLURMD_TIMEOUT ACCOUNTING; do
    [[ ${!knob} =~ ^[0-9]+$ ]] || die 2 "$knob=${!knob}: a whole number is needed"
done
((NODES >= 1 && CPUS >= 1)) || die 2 "NODES=$NODES CPUS=$CPUS: both must be at least 1"
# Below 5 SLURM logs "cred_expire invalid" and takes its default, 120 s.
((CRED_EXPIRE >= 5)) || die 2 "CRED_EXPIRE=$CRED_EXPIRE: SLURM takes no less than 5"
[[ $BASE_PORT =~ ^[0-9]*$ ]] || die 2 "BASE_PORT=$BASE_PORT: a whole number is needed"
# slurm.conf cannot quote a path, and munge's socket has to fit into a sockaddr_un (108 bytes).
[[ $DIR =~ ^/[A-Za-z0-9._/-]+$ && ${#DIR} -le 80 ]] || die 2 "DIR=$DIR: at most 80 of A-Z a-z 0-9 . _ / -"
[[ $GPU_TYPE =~ ^[A-Za-z0-9_.-]*$ ]] || die 2 "GPU_TYPE=$GPU_TYPE: letters, digits and _.- only"
[[ $CLUSTER =~ ^[a-z][a-z0-9_]*$ ]] || die 2 "CLUSTER=$CLUSTER: small letters, digits and _ only"
[ -z "$BESIDE" ] || [ -s "$BESIDE/slurmdbd.pid" ] || die 2 "BESIDE=$BESIDE: no testbed with ACCOUNTING=1 runs there"
[ -z "$SUBMIT_LUA" ] || [ -r "$SUBMIT_LUA" ] || die 2 "SUBMIT_LUA=$SUBMIT_LUA cannot be read"
[ -z "$EXTRA_CONF" ] || [ -r "$EXTRA_CONF" ] || die 2 "EXTRA_CONF=$EXTRA_CONF cannot be read"
if [ -e "$DIR/slurm.conf" ]; then
    grep -q '^# ddpm-hpc SLURM testbed' "$DIR/slurm.conf" || die 2 "$DIR holds a slurm.conf that is not a testbed's"
elif [ -e "$DIR" ]; then
    [ -d "$DIR" ] || die 2 "$DIR is not a directory"
    [ -z "$(ls -A "$DIR")" ] || die 2 "$DIR is neither empty nor a testbed"
fi
# A zombie whose parent does not reap it counts as gone.
alive() { grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$1/status"; }
if [ -s "$DIR/slurmctld.pid" ] && alive "$(cat "$DIR/slurmctld.pid")"; then
    die 2 "already running in $DIR (stop.sh $DIR ends it)"
fi
[ "$(id -u)" = 0 ] || die 3 "must be root: slurmd starts jobs as their users"
[ ! -e "$DIR" ] || [ "$(stat -c %u "$DIR")" = 0 ] || die 2 "$DIR does not belong to root"
if [ "$ACCOUNTING" != 0 ]; then
    PACKAGES+=("${ACCOUNTING_PACKAGES[@]}") COMMANDS+=("${ACCOUNTING_COMMANDS[@]}")
fi
install_packages

# First of `$1` ports in a row on which nobody listens, below the range that the kernel hands out itself.
free_ports() {
    local base port
    for _ in $(seq 100); do
        base=$((20000 + RANDOM % 9000))
        for ((port = base; port < base + $1; port++)); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo "$base"
        return
    done
    return 1
}

mkdir -p "$DIR"/{munge,state,log,dev,spool}
chmod 755 "$DIR"
chmod 700 "$DIR/state"
chmod 711 "$DIR/munge"
for ((i = 1; i <= NODES; i++)); do mkdir -p "$DIR/spool/n$i"; done
CTLD_PORT=${BASE_PORT:-$(free_ports $((NODES + 3)))} || die 1 "no $((NODES + 3)) free ports in a row"
DBD_PORT=$((CTLD_PORT + NODES + 1)) SQL_PORT=$((CTLD_PORT + NODES + 2)) SOCKET=$DIR/munge/socket
if [ -n "$BESIDE" ]; then
    DBD_PORT=$(sed -n 's/^DbdPort=//p' "$BESIDE/slurmdbd.conf") SOCKET=$BESIDE/munge/socket
fi
HOST=$(hostname -s)

sed -e "s|@DIR@|$DIR|g; s|@HOST@|$HOST|g; s|@CTLD_PORT@|$CTLD_PORT|g; s|@CRED_EXPIRE@|$CRED_EXPIRE|g" \
    -e "s|@CLUSTER@|$CLUSTER|g; s|@SOCKET@|$SOCKET|g" \
    -e "s|@KILLWAIT@|$KILLWAIT|g; s|@SLURMD_TIMEOUT@|$SLURMD_TIMEOUT|g" "$HERE/slurm.conf.in" >"$DIR/slurm.conf"
GRES=
[ "$GPUS" = 0 ] || GRES="Gres=gpu:${GPU_TYPE:+$GPU_TYPE:}$GPUS"
cat >>"$DIR/slurm.conf" <<CONF
GresTypes=gpu
NodeName=n[1-$NODES] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=[$((CTLD_PORT + 1))-$((CTLD_PORT + NODES))] \
CPUs=$CPUS RealMemory=$MEM $GRES State=UNKNOWN
PartitionName=DEFAULT Nodes=n[1-$NODES] MaxTime=INFINITE DefaultTime=60 OverSubscribe=NO
PartitionName=gpu Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=urgent Default=NO PriorityTier=10 PreemptMode=OFF
CONF
if [ -n "$SUBMIT_LUA" ]; then
    cp "$SUBMIT_LUA" "$DIR/job_submit.lua"   # SLURM looks for it beside slurm.conf
    echo "JobSubmitPlugins=lua" >>"$DIR/slurm.conf"
fi
[ "$ACCOUNTING$BESIDE" = 0 ] || cat >>"$DIR/slurm.conf" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$DBD_PORT
AccountingStoragePass=$SOCKET
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
CONF
[ -z "$EXTRA_CONF" ] || cat "$EXTRA_CONF" >>"$DIR/slurm.conf"

# SLURM sets CUDA_VISIBLE_DEVICES only where a GPU's File= is a character device: these are twins of /dev/null.
echo "AutoDetect=off" >"$DIR/gres.conf"
if [ "$GPUS" -gt 0 ]; then
    for ((i = 0; i < GPUS; i++)); do
        [ -e "$DIR/dev/nvidia$i" ] || mknod -m 666 "$DIR/dev/nvidia$i" c 1 3 2>/dev/null || {
            : >"$DIR/dev/nvidia$i"
            echo "start.sh: mknod is forbidden here: jobs will see no CUDA_VISIBLE_DEVICES" >&2
        }
    done
    echo "NodeName=n[1-$NODES] Name=gpu ${GPU_TYPE:+Type=$GPU_TYPE }File=$DIR/dev/nvidia[0-$((GPUS - 1))]" >>"$DIR/gres.conf"
fi
# From 23.11 on SLURM looks for cgroups unless told not to; older ones refuse the word.
VERSION=$(slurmctld -V | awk '{print $2}')
if [ "$(printf '%s\n' 23.11 "$VERSION" | sort -V | head -n 1)" = 23.11 ]; then
    echo "CgroupPlugin=disabled" >"$DIR/cgroup.conf"
fi
echo "export SLURM_CONF=$DIR/slurm.conf" >"$DIR/env.sh"
export SLURM_CONF=$DIR/slurm.conf

# From here on daemons run: whatever goes wrong, leave none behind.
give_up() {
    trap - ERR INT TERM
    echo "start.sh: $1; the logs are in $DIR/log" >&2
    "$HERE/stop.sh" "$DIR" >&2 || true
    exit 1
}
trap 'give_up "failed at line $LINENO"' ERR
trap 'give_up interrupted' INT TERM

# The daemons are started without our file descriptors: a caller that reads our output through a pipe must see its end.
start_daemon() {
    "$@" </dev/null >"$DIR/log/start.log" 2>&1 || { cat "$DIR/log/start.log" >&2; give_up "$1 did not start"; }
}

# A database and slurmdbd, which keeps in it whom clusters serve and with which limits.
start_accounting() {
    mkdir -p "$DIR/sql"
    [ -d "$DIR/sql/mysql" ] || mariadb-install-db --user=root --datadir="$DIR/sql" --skip-test-db \
        --auth-root-authentication-method=normal >"$DIR/log/sql-install.log" 2>&1 || give_up "no database could be made"
    mariadbd --no-defaults --user=root --datadir="$DIR/sql" --socket="$DIR/sql.sock" --pid-file="$DIR/mariadbd.pid" \
        --bind-address=127.0.0.1 --port="$SQL_PORT" --innodb-buffer-pool-size=16M --log-error="$DIR/log/sql.log" \
        </dev/null >/dev/null 2>&1 &
    disown
    local end=$((SECONDS + 40))
    until mariadb --no-defaults --socket="$DIR/sql.sock" -e "CREATE DATABASE IF NOT EXISTS slurm_acct;
        CREATE USER IF NOT EXISTS slurm@'%' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct.* TO slurm@'%';" \
        >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || give_up "the database did not come up in 40 s"
        sleep 0.2
    done
    (umask 077; cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
DbdHost=localhost
DbdPort=$DBD_PORT
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$SQL_PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CONF
    )
    start_daemon slurmdbd
}

# This cluster in that database.
join_accounting() {
    local end=$((SECONDS + 40))
    until sacctmgr -i -Q add cluster "$CLUSTER" >"$DIR/log/sacctmgr.log" 2>&1 || sacctmgr -n show cluster 2>/dev/null | grep -qw "$CLUSTER"; do
        [ $SECONDS -lt $end ] || give_up "slurmdbd did not answer in 40 s"
        sleep 0.2
    done
    # which a testbed that is started again has already
    sacctmgr -i -Q add account lab Cluster="$CLUSTER" Description=lab Organization=lab >/dev/null ||
        sacctmgr -n show assoc account=lab cluster="$CLUSTER" | grep -q lab
    # not nobody, for whom SLURM has a uid of its own from 25.11 on
    sacctmgr -i -Q add user games Account=lab Cluster="$CLUSTER" DefaultAccount=lab >/dev/null ||
        sacctmgr -n show assoc user=games cluster="$CLUSTER" | grep -q lab
    sacctmgr -i -Q add user root Account=root AdminLevel=Admin >/dev/null 2>&1 || true
}

if [ -z "$BESIDE" ]; then
    [ -s "$DIR/munge/key" ] || { head -c 1024 /dev/urandom >"$DIR/munge/key"; chmod 400 "$DIR/munge/key"; }
    start_daemon munged --key-file="$DIR/munge/key" --socket="$SOCKET" --pid-file="$DIR/munge/pid" \
        --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" --num-threads=2
    for _ in $(seq 50); do
        munge -S "$SOCKET" -n >/dev/null 2>&1 && break
        sleep 0.1
    done
    [ "$ACCOUNTING" = 0 ] || start_accounting
fi
[ "$ACCOUNTING$BESIDE" = 0 ] || join_accounting
# Before 21.08 slurmctld looks for job_submit.lua in /etc/slurm alone: it is shown DIR in the place of that.
if [ -n "$SUBMIT_LUA" ] && [ "$(printf '%s\n' 21.08 "$VERSION" | sort -V | head -n 1)" != 21.08 ]; then
    SEEN=(unshare --mount sh -c 'mount --bind "$0" /etc/slurm && exec "$@"' "$DIR")
fi
start_daemon ${SEEN[@]+"${SEEN[@]}"} slurmctld -f "$SLURM_CONF"
for ((i = 1; i <= NODES; i++)); do start_daemon slurmd -f "$SLURM_CONF" -N "n$i"; done

END=$((SECONDS + 40))
while [ "$(timeout 5 sinfo -h -N -p gpu -t idle -o %N 2>/dev/null | sort -u | wc -l)" != "$NODES" ]; do
    [ $SECONDS -lt $END ] || { timeout 5 sinfo -N -l >&2 || true; give_up "the nodes did not come up in 40 s"; }
    sleep 0.1
done
trap - ERR INT TERM
if ! setpriv --reuid=65534 --regid=65534 --clear-groups env test -r "$SLURM_CONF" 2>/dev/null; then
    echo "start.sh: ordinary users cannot reach $DIR, only root can use this testbed" >&2
fi
echo "ready: . $DIR/env.sh   ($NODES nodes, $CPUS CPUs and $GPUS fake GPUs each, SLURM $VERSION, port $CTLD_PORT)"
