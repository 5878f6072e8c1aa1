#!/bin/bash
# Brings a real apptainer for tests of containers, beside the system. `apptainer.sh --help` says how.
set -euo pipefail
umask 022
PACKAGES=(apptainer libc6 libseccomp2 libsqlite3-0)

usage() {
    cat <<'TEXT'
Usage: tools/slurm_testbed/apptainer.sh [ROOT]      e.g. tools/slurm_testbed/apptainer.sh /tmp/apptainer

Unpacks Debian unstable's apptainer, with the libraries that it needs, into ROOT (default /var/tmp/ddpm-apptainer),
unless it is there, and makes ROOT/image: a container without programs of its own, in which this machine's /usr is to
be mounted, and a Python environment as /opt/python. Nothing is installed on the system but patchelf, where it lacks.
To delete: rm -rf ROOT. A profile that uses it:

  setup: ["export PATH=ROOT/usr/bin:$PATH"]
  container: {image: ROOT/image, mounts: [/usr, /…/.venv:/opt/python:ro]}

Needs root on Debian, the mirror of its packages, and a kernel on which users may make namespaces.

Exit codes: 0 it is there and runs, 1 it could not be made or does not run, 2 the request was wrong, 3 the machine
lacks something.
TEXT
}

die() { local rc=$1; shift; echo "apptainer.sh: $*" >&2; exit "$rc"; }

# apt's own tools, with lists and caches of their own: what this system installs stays as it is.
fetch() {
    local mirror private=(-o "Dir::State=$ROOT/apt" -o "Dir::Cache=$ROOT/apt"
        -o "Dir::Etc::SourceList=$ROOT/apt/sources"
        -o Dir::Etc::SourceParts=- -o Dir::Etc::Preferences=- -o Dir::Etc::PreferencesParts=-
        -o Dir::State::Status=/dev/null -o APT::Sandbox::User=root
        -o Acquire::Languages=none -o Acquire::Check-Valid-Until=false)
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' 2>/dev/null | head -n 1)
    mkdir -p "$ROOT/apt/lists/partial" "$ROOT/apt/archives/partial"
    echo "deb ${mirror:-http://deb.debian.org/debian} sid main" >"$ROOT/apt/sources"
    apt-get "${private[@]}" update
    (cd "$ROOT/apt" && apt-get "${private[@]}" download "${PACKAGES[@]}")
    command -v patchelf || apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends patchelf ||
        { apt-get update && apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends patchelf; }
}

unpack() {
    local file libs=$ROOT/usr/lib/x86_64-linux-gnu
    for file in "$ROOT"/apt/*.deb; do dpkg -x "$file" "$ROOT"; done
    # It looks for its settings and its folders beside itself, and its C library is newer than this system's.
    mv "$ROOT/etc" "$ROOT/var" "$ROOT/usr"
    ln -s ../etc ../var "$ROOT/usr/lib"
    for file in "$ROOT/usr/bin/apptainer" "$libs/apptainer/bin/starter"; do
        patchelf --set-interpreter "$libs/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$libs" "$file"
    done
    rm -rf "$ROOT/apt"
}

make_image() {
    local image=$ROOT/image name
    mkdir -p "$image"/{usr,etc,proc,sys,dev,tmp,var/tmp,root,home,run,opt/{python,bin},.singularity.d/env}
    for name in bin sbin lib lib64; do ln -s "usr/$name" "$image/$name"; done
    ln -s /usr/bin/{env,true} "$image/opt/bin" # what ranks are started with; but none of SLURM's commands
    touch "$image"/etc/{passwd,group,hosts,resolv.conf,localtime}
    echo "export PATH=/opt/python/bin:/opt/bin" >"$image/.singularity.d/env/90-environment.sh"
}

make_all() {
    fetch
    unpack
    make_image
}

ROOT=/var/tmp/ddpm-apptainer
case ${1:-} in
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; die 2 "unknown option $1" ;;
    ?*) ROOT=$1 ;;
esac
[ $# -le 1 ] || { usage >&2; die 2 "one ROOT at most, got: $*"; }
ROOT=$(realpath -m "$ROOT")
[[ $ROOT =~ ^/[A-Za-z0-9._/-]+$ ]] || die 2 "ROOT=$ROOT: A-Z a-z 0-9 . _ / - only"
[ "$(id -u)" = 0 ] || die 3 "must be root: the container is tried as another user"
command -v apt-get >/dev/null || die 3 "no apt-get here: the package is Debian's"
[ "$(dpkg --print-architecture)" = amd64 ] || die 3 "this machine is no amd64"
MARK=$ROOT/.ddpm-apptainer # the proof that ROOT is ours; its text says whether it is complete
if [ -e "$ROOT" ] && [ ! -e "$MARK" ]; then
    [ -d "$ROOT" ] && [ -z "$(ls -A "$ROOT")" ] || die 2 "$ROOT exists and was not made by apptainer.sh"
fi
mkdir -p "$ROOT"
exec 9>>"$MARK"
flock 9
if ! grep -q '^made' "$MARK"; then
    find "$ROOT" -mindepth 1 ! -path "$MARK" -delete
    log=$(mktemp)
    make_all >"$log" 2>&1 </dev/null & # not in a condition, where set -e would not hold
    wait $! || { tail -n 20 "$log" >&2; rm -f "$log"; die 1 "apptainer could not be had"; }
    rm -f "$log"
    echo "made $(date -u +%FT%TZ)" >"$MARK"
fi
setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/ PATH="$ROOT/usr/bin:/usr/bin:/bin" \
    apptainer -q exec --bind /usr "$ROOT/image" /usr/bin/true || die 1 "users of this machine cannot run containers"
