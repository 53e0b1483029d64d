#!/bin/sh
# Takes the right to read this board's counters from everyone but root; `lock.sh u+r` gives it back.
cd "$(dirname "$0")" || exit 1
chmod "${1:-000}" sys/class/powercap/*/energy_uj sys/class/power_supply/BAT0/*_now
