#!/bin/bash
# Runs a command of this project on another Debian, with its SLURM and Python, in a chroot. `debian.sh --help` says how.
set -euo pipefail
umask 022
unset CDPATH
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
INSIDE=/srv/ddpm-hpc # the project's copy, as seen in the chroot

usage() {
    cat <<'TEXT'
Usage: tools/slurm_testbed/debian.sh RELEASE [ROOT] -- COMMAND…
e.g.   tools/slurm_testbed/debian.sh trixie -- python -m tools.chaos --reduced --json /tmp/chaos.json

Makes a chroot with Debian's RELEASE (trixie, forky, sid) in ROOT (default /var/tmp/ddpm-RELEASE) unless it is there,
copies the project into it, brings its .venv up to date and runs COMMAND there, in the project's root and with .venv/bin
first on the PATH. What COMMAND writes outside the project stays, in ROOT; the copy of the project is made anew by every
call. Everything that COMMAND leaves running ends with it, and so do the mounts. One call per ROOT at a time; others
wait. Of bullseye only SLURM is taken, the rest from bookworm: its Python is too old for the project.

Needs root, and debootstrap, which is installed with apt-get where it is missing. To delete: rm -rf ROOT.

Exit codes: COMMAND's; or 1 the chroot could not be made, 2 the request was wrong, 3 the machine lacks something.
TEXT
}

die() { local rc=$1; shift; echo "debian.sh: $*" >&2; exit "$rc"; }
say() { echo "debian.sh: $*" >&2; }

# Files and folders of this machine that pip is told about: certificates, wheels, an index made of files.
pip_paths() {
    { cat "${PIP_CONFIGS[@]}" 2>/dev/null; env | grep -E '^(PIP_|SSL_CERT_FILE|REQUESTS_CA_BUNDLE)'; } |
        tr ' =,' '\n' | sed -nE 's|^(file://)?(/.+)|\2|p' | sed -E 's|/simple/?$||' | sort -u
}

make_chroot() {
    local mirror log scripts=/usr/share/debootstrap/scripts base=$RELEASE
    log=$(mktemp)
    # The mirror of this machine's own sources is one that it can reach.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 2>/dev/null | head -n 1)
    mirror=${mirror:-http://deb.debian.org/debian}
    [ "$RELEASE" != bullseye ] || base=bookworm # for a Python that is new enough
    say "making Debian's $RELEASE in $ROOT from $mirror"
    find "$ROOT" -xdev -mindepth 1 ! -path "$MARK" -delete
    # A debootstrap older than the release takes that of sid for it.
    debootstrap --variant=minbase --include=python3,python3-venv "$base" "$ROOT" "$mirror" \
        "$([ -e "$scripts/$base" ] && echo "$scripts/$base" || echo "$scripts/sid")" >"$log" 2>&1 </dev/null ||
        { tail -n 20 "$log" >&2; rm -f "$log"; find "$ROOT" -xdev -delete || :; die 1 "debootstrap failed"; }
    rm -f "$log"
    if [ "$base" != "$RELEASE" ]; then
        echo "deb $mirror $RELEASE main" >>"$ROOT/etc/apt/sources.list"
        printf 'Package: src:slurm-wlm\nPin: release n=%s\nPin-Priority: 1001\n' "$RELEASE" \
            >"$ROOT/etc/apt/preferences.d/slurm"
        rm -rf "$ROOT"/var/lib/apt/lists/* # which know one release alone: start.sh then gets those of both
    fi
    # Packages must not start their daemons.
    printf '#!/bin/sh\nexit 101\n' >"$ROOT/usr/sbin/policy-rc.d"
    chmod 755 "$ROOT/usr/sbin/policy-rc.d"
    echo "made $(date -u +%FT%TZ)" >"$MARK"
}

# Runs in namespaces of its own: mounts and processes end with it, however it ends.
inside() {
    local path
    # This machine may trust, and need, more certificates than Debian's.
    export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
    PIP_CONFIGS=(/etc/pip.conf "${PIP_CONFIG_FILE:-${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf}")
    grep -q '^made' "$MARK" || make_chroot
    rm -rf "$ROOT"/tmp/ddpm-* # of a call that was killed
    cp -L /etc/resolv.conf /etc/hosts "$ROOT/etc/"
    cp "${PIP_CONFIGS[0]}" "$ROOT/etc/pip.conf" 2>/dev/null || true
    mkdir -p "$ROOT/root/.config/pip"
    cp "${PIP_CONFIGS[1]}" "$ROOT/root/.config/pip/pip.conf" 2>/dev/null || true

    mount --bind "$ROOT" "$ROOT"
    mount -t proc proc "$ROOT/proc"
    mount --rbind /sys "$ROOT/sys"
    mount --rbind /dev "$ROOT/dev"
    for path in $(pip_paths); do
        [ -f "$path" ] || [ -d "$path" ] || continue
        if [ -d "$path" ]; then mkdir -p "$ROOT$path"; else mkdir -p "$ROOT${path%/*}" && touch "$ROOT$path"; fi
        mount --bind "$path" "$ROOT$path"
        mount -o remount,bind,ro "$ROOT$path"
    done

    # A copy, not a mount: jobs of many minutes should not see the project being edited.
    mkdir -p "$ROOT$INSIDE"
    find "$ROOT$INSIDE" -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
    tar -C "$PROJECT" -c --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data --exclude='./.*_cache' \
        --exclude=__pycache__ --exclude='./*.egg-info' --mode=a+rX --owner=0 --group=0 . | tar -C "$ROOT$INSIDE" -x

    # No chroot, in which users may make no namespaces, as containers need them.
    cd "$ROOT"
    pivot_root . .
    umount -l .
    cd /
    /usr/bin/env -u PYTHON -u VIRTUAL_ENV -u PYTHONPATH -u TMPDIR -u SLURM_CONF -u PIP_CONFIG_FILE \
        -u XDG_CONFIG_HOME -u LC_ALL LANG=C.UTF-8 HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
        bash -euc 'cd "$1"
            shift
            dpkg --configure -a >&2 # a call may have been killed in the midst of an installation
            tools/slurm_testbed/start.sh --install >&2
            tools/env.sh test >&2
            export PATH=$PWD/.venv/bin:$PATH
            exec "$@"' bash "$INSIDE" "$@"
}

outside() {
    local child rc=0
    [ "$(id -u)" = 0 ] || die 3 "must be root: a chroot needs mounts"
    if [ -e "$ROOT" ] && [ ! -e "$MARK" ]; then
        [ -d "$ROOT" ] && [ -z "$(ls -A "$ROOT")" ] || die 2 "$ROOT exists and was not made by debian.sh for $RELEASE"
    fi
    PATH=$PATH:/usr/sbin:/sbin
    command -v debootstrap >/dev/null ||
        { apt-get -o DPkg::Lock::Timeout=60 install -y debootstrap ||
            { apt-get update && apt-get -o DPkg::Lock::Timeout=60 install -y debootstrap; }; } \
            >/dev/null 2>&1 </dev/null || die 3 "debootstrap is missing and apt-get could not install it"
    mkdir -p "$ROOT"
    exec 9>>"$MARK"
    flock -n 9 || { say "waiting for another call with $ROOT"; flock 9; }
    # unshare itself ignores SIGTERM. It dies with this script, and all that runs below it dies with unshare.
    DDPM_DEBIAN_INSIDE=$ROOT setpriv --pdeathsig KILL unshare --mount --pid --mount-proc --kill-child \
        "${BASH_SOURCE[0]}" "$RELEASE" "$ROOT" -- "$@" <&0 &
    child=$!
    trap 'kill -9 "$child" 2>/dev/null; exit 130' INT TERM HUP
    wait "$child" || rc=$?
    return "$rc"
}

case ${1:-} in
    -h | --help) usage; exit 0 ;;
    *[!a-z]* | '') usage >&2; die 2 "a RELEASE of Debian is needed first, such as trixie, not '${1:-}'" ;;
esac
RELEASE=$1 ROOT=/var/tmp/ddpm-$1
shift
case ${1:-} in
    -*) ;;
    ?*) ROOT=$1; shift ;;
esac
[ "${1:-}" = -- ] && [ $# -ge 2 ] || { usage >&2; die 2 "a COMMAND after -- is needed"; }
shift
[ -n "$ROOT" ] && ROOT=$(realpath -m "$ROOT")
[[ $ROOT =~ ^/[A-Za-z0-9._/-]+$ ]] || die 2 "ROOT=$ROOT: A-Z a-z 0-9 . _ / - only"
MARK=$ROOT/.ddpm-$RELEASE # the proof that ROOT is ours; its text says whether it is complete
if [ "${DDPM_DEBIAN_INSIDE:-}" = "$ROOT" ]; then
    unset DDPM_DEBIAN_INSIDE
    inside "$@" # not in a condition, where set -e would not hold
    exit
fi

outside "$@"; exit # on one line, read at once: this file may be edited while it runs
