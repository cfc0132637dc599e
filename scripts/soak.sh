#!/usr/bin/env bash
# What is too long for every change: a process that prints a gigabyte of random bytes, followed by a
# client that is cut off at least a thousand times, in three protocols, over pipes and over a terminal.
#
#   scripts/soak.sh [BYTES [CUTS]]
#
# BYTES are those of each pipe; a terminal gets twice as many. The output on disk is below TMPDIR.
set -euo pipefail
cd "$(dirname "$0")/.."

ENVD_RESUME_BYTES=${1:-$((512 * 1024 * 1024))} ENVD_RESUME_CUTS=${2:-1200} \
  exec cargo test --locked --release --test resume -- --nocapture cut_off_again_and_again
