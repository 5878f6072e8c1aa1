#!/bin/bash
# Runs a command of this project where two hosts mount one NFS. `nfs.sh --help` says how.
set -euo pipefail
umask 022
unset CDPATH
PACKAGES=(user-mode-linux nfs-common nfs-kernel-server libnfsidmap1 keyutils libwrap0 libevent-core-2.1-7 libtirpc3
    libtirpc-common kmod)

usage() {
    cat <<'TEXT'
Usage: tools/slurm_testbed/nfs.sh [ROOT] -- COMMAND…
e.g.   tools/slurm_testbed/nfs.sh -- python -m pytest -q tests/nfs/two_hosts.py

Boots Linux in a process (User Mode Linux) on this machine's files, read-only, with an NFS 4.2 server in it and two
clients, each with a network and a host name of its own, and runs COMMAND there, in the project's root: DDPM_NFS is
/mnt/n1:/mnt/n2, the one export as each of them sees it. Nothing else can be written but /tmp and /run, which are
empty. It has one CPU; what starts torch takes a minute. Kernel and server are Debian's packages, unpacked into ROOT
(default /var/tmp/ddpm-nfs) unless they are there. To delete: rm -rf ROOT.

Needs root on Debian, and the mirror of its packages the first time.

Exit codes: COMMAND's; or 1 it did not come to its end, 2 the request was wrong, 3 the machine lacks something.
TEXT
}

die() { local rc=$1; shift; echo "nfs.sh: $*" >&2; exit "$rc"; }

fetch() {
    mkdir "$ROOT/debs"
    cd "$ROOT/debs"
    apt-get -o APT::Sandbox::User=root download "${PACKAGES[@]}" ||
        { apt-get update && apt-get -o APT::Sandbox::User=root download "${PACKAGES[@]}"; }
    for file in *.deb; do dpkg -x "$file" "$ROOT"; done
    cd "$ROOT"
    rm -rf debs
    [ -e lib/modules ] || ln -s ../usr/lib/uml/modules lib/modules
    bin/kmod --version
    local version
    version=$(basename "$ROOT"/lib/modules/*)
    ln -sf ../bin/kmod sbin/depmod
    ln -sf ../bin/kmod sbin/modprobe
    sbin/depmod -b "$ROOT" "$version"
}

# Process 1 of the booted Linux: its words are in the environment, as the kernel hands them on.
as_init() {
    local host pid module rc=0 libs
    export PATH=$ROOT/usr/sbin:$ROOT/sbin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
    libs=$ROOT/usr/lib/x86_64-linux-gnu:$ROOT/lib/x86_64-linux-gnu
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs tmpfs /run
    mkdir -p /dev/shm
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /mnt
    mkdir -p /mnt/{n1,n2} /tmp/export /tmp/state
    chmod 777 /tmp/export
    mount -t tmpfs tmpfs /var/lib
    mkdir -p /var/lib/nfs/v4recovery
    touch /var/lib/nfs/{etab,rmtab}
    ip link set lo up
    for module in nfsd nfsv4 veth; do modprobe -d "$ROOT" "$module"; done
    mount -t nfsd nfsd /proc/fs/nfsd
    export LD_LIBRARY_PATH=$libs
    mount -t tmpfs -o mode=777 tmpfs /tmp/export
    exportfs -o rw,no_root_squash,no_subtree_check,insecure,fsid=0,async '*:/tmp/export'
    rpc.mountd --no-nfs-version 3
    rpc.nfsd --no-nfs-version 3 --grace-time 10 --lease-time 10 4
    unset LD_LIBRARY_PATH
    for host in 1 2; do
        unshare --net --uts sleep infinity &
        pid=$!
        until [ "$(readlink "/proc/$pid/ns/net")" != "$(readlink /proc/1/ns/net)" ]; do sleep 0.1; done
        ip link add "v$host" type veth peer name eth0 netns "$pid"
        ip addr add "10.9.$host.1/24" dev "v$host"
        ip link set "v$host" up
        nsenter -t "$pid" --net --uts bash -euc 'hostname "n$1"
            ip link set lo up
            ip addr add "10.9.$1.2/24" dev eth0
            ip link set eth0 up
            mount -i -t nfs4 -o "vers=4.2,addr=10.9.$1.1,clientaddr=10.9.$1.2" "10.9.$1.1:/" "/mnt/n$1"' bash "$host"
    done
    sleep 11 # a server that has just started lets nobody lock or open anything anew
    cd "$DDPM_NFS_PROJECT"
    export DDPM_NFS=/mnt/n1:/mnt/n2 PYTHONDONTWRITEBYTECODE=1
    eval "set -- $(base64 -d <<<"$DDPM_NFS_COMMAND")"
    PATH=$(base64 -d <<<"$DDPM_NFS_PATH") "$@" </dev/null 2>&1 || rc=$?
    echo "nfs.sh: exit code $rc"
}

if [ $$ = 1 ]; then
    ROOT=$DDPM_NFS_ROOT
    (as_init) 2>&1 || true
    echo o >/proc/sysrq-trigger
    sleep 60
fi

ROOT=/var/tmp/ddpm-nfs
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case ${1:-} in
    -h | --help) usage; exit 0 ;;
    --) ;;
    '' | -*) usage >&2; die 2 "a COMMAND after -- is needed" ;;
    *) ROOT=$1; shift ;;
esac
[ "${1:-}" = -- ] && [ $# -ge 2 ] || { usage >&2; die 2 "a COMMAND after -- is needed"; }
shift
ROOT=$(realpath -m "$ROOT")
for path in "$ROOT" "$PROJECT"; do
    [[ $path =~ ^/[A-Za-z0-9._/-]+$ ]] || die 3 "$path: A-Z a-z 0-9 . _ / - only"
    [[ $path/ != /tmp/* ]] || die 3 "$path: /tmp is another one in there"
done
[ "$(id -u)" = 0 ] || die 3 "must be root: mounts and name spaces need it, in the booted Linux too"
command -v apt-get >/dev/null || die 3 "no apt-get here: kernel and server are Debian's packages"
[ "$(dpkg --print-architecture)" = amd64 ] || die 3 "this machine is no amd64"
MARK=$ROOT/.ddpm-nfs # the proof that ROOT is ours; its text says whether it is complete
if [ -e "$ROOT" ] && [ ! -e "$MARK" ]; then
    [ -d "$ROOT" ] && [ -z "$(ls -A "$ROOT")" ] || die 2 "$ROOT exists and was not made by nfs.sh"
fi
mkdir -p "$ROOT"
exec 9>>"$MARK"
flock 9
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! grep -q '^made' "$MARK"; then
    find "$ROOT" -mindepth 1 ! -path "$MARK" -delete
    fetch >"$log" 2>&1 </dev/null & # not in a condition, where set -e would not hold
    wait $! || { tail -n 20 "$log" >&2; die 3 "Debian's packages could not be had"; }
    echo "made $(date -u +%FT%TZ)" >"$MARK"
fi
exec 9>&-
words=$(printf '%q ' "$@" | base64 -w 0)
timeout "${NFS_TIMEOUT:-600}" "$ROOT/usr/bin/linux.uml" mem=2G root=/dev/root rootfstype=hostfs rootflags=/ ro quiet \
    con=null con0=null,fd:1 "init=$PROJECT/tools/slurm_testbed/nfs.sh" "DDPM_NFS_ROOT=$ROOT" \
    "DDPM_NFS_PROJECT=$PROJECT" "DDPM_NFS_COMMAND=$words" "DDPM_NFS_PATH=$(base64 -w 0 <<<"$PATH")" </dev/null 2>&1 |
    tee "$log" | sed -u '/^nfs.sh: exit code/d; s/\r$//'
rc=$(sed -n 's/^nfs.sh: exit code \([0-9]*\)\r*$/\1/p' "$log" | tail -n 1)
[ -n "$rc" ] || die 1 "it did not come to its end"
exit "$rc"
