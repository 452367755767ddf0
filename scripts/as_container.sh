#!/usr/bin/env bash
# Run a command as our images do, without a container engine: user 10001, no privileges, and nothing that can be written
# but /tmp, /dev/shm and /var/cache/slos-serve, which are empty. Needs root, unshare and setpriv.
# Usage: scripts/as_container.sh COMMAND...
set -euo pipefail
if [ "${1:-}" != "--inside" ]; then
    exec unshare --mount --propagation private -- "$0" --inside "$(cd "$(dirname "$0")/.." && pwd)" "$@"
fi
project=$2
shift 2
# Python may be root's own; the rest of root's home stays out of sight, as in an image.
python=$(cd "$(dirname "$(readlink -f "$(command -v python3)")")/.." && pwd)
# What is kept is bound aside, the empty file systems come, and it is bound back: project and Python may lie below them.
keep=/mnt
mount -t tmpfs -o mode=755 tmpfs "$keep"
mkdir "$keep/python" "$keep/project"
mount --bind "$python" "$keep/python"
mount --bind "$project" "$keep/project"
mount -t tmpfs -o mode=755 tmpfs /root
mkdir -p /var/cache/slos-serve
for point in /tmp /dev/shm /var/cache/slos-serve; do
    mount -t tmpfs -o mode=1777,exec tmpfs "$point"
done
for pair in "$python:$keep/python" "$project:$keep/project"; do
    mkdir -p "${pair%%:*}"
    mount --bind "${pair#*:}" "${pair%%:*}"
done
umount -l "$keep"
for point in / "$python" "$project" /root; do
    mount -o remount,bind,ro "$point"
done
cd /tmp
export HOME=/var/cache/slos-serve/home XDG_CACHE_HOME=/var/cache/slos-serve/home/.cache TMPDIR=/tmp
export SLOS_SERVE_CACHE=/var/cache/slos-serve PYTHONDONTWRITEBYTECODE=1
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
