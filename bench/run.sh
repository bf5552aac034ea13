#!/usr/bin/env bash
# What `make bench` runs: fetches the peers that are absent, builds the measured binaries, measures.
# Arguments: `proxy`, `pair` or `webhook` and arguments for that measurement (see `weft-bench --help`); none: all of them.
# PROFILE=release builds faster and measures a little worse code.
set -euo pipefail
cd "$(dirname "$0")/.."

PROFILE=${PROFILE:-dist}
TARGET=${CARGO_TARGET_DIR:-target}/$PROFILE
bench/peers.sh

cargo build --profile "$PROFILE" -p weft-proxy -p weft-control -p weft-bench
bench() {
  case $1 in
    webhook) "$TARGET/weft-bench" webhook --control "$TARGET/weft-control" "${@:2}" ;;
    pair) "$TARGET/weft-bench" pair --weft "$TARGET/weft-proxy" --control "$TARGET/weft-control" "${@:2}" ;;
    *) "$TARGET/weft-bench" "$1" --weft "$TARGET/weft-proxy" "${@:2}" ;;
  esac
}
status=0
if [ $# -gt 0 ]; then
  bench "$@" || status=1
else
  for what in proxy pair webhook; do bench $what || status=1; done
fi
echo "JSON, tables and plots: bench/results/"
exit $status
