#!/usr/bin/env bash
# Installs the browser that the tests look at reports with, from Debian's packages.
set -euo pipefail
exec 9>"/tmp/weaksam-install-$UID.lock" && flock 9  # several test processes may need packages at once
command -v chromium >/dev/null && exit 0
command -v apt-get >/dev/null || { echo "no chromium, and no apt-get to install it"; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium
