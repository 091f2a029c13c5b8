#!/usr/bin/env bash
# Installs the S3 server of the tests, Ceph's RADOS Gateway, and the proxy that disturbs it, from Debian's packages.
set -euo pipefail
exec 9>"/tmp/weaksam-install-$UID.lock" && flock 9  # several test processes may need packages at once
needed=(ceph-mon ceph-osd radosgw ceph-authtool monmaptool radosgw-admin haproxy)
missing=()
for program in "${needed[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
((${#missing[@]})) || exit 0
command -v apt-get >/dev/null || { echo "no ${missing[*]}, and no apt-get to install them"; exit 1; }
export DEBIAN_FRONTEND=noninteractive
# Nothing of it is to run by itself: the tests start their own.
policy=/usr/sbin/policy-rc.d
[[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap 'rm -f "$policy"' EXIT; }
apt-get update -qq
apt-get install -y -qq --no-install-recommends ceph-mon ceph-osd radosgw ceph-common haproxy
