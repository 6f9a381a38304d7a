#!/usr/bin/env bash
# From raw data to embeddings: fMRIPrep, then parcel series as soon as a participant is ready, then
# one GPU job for all:
#
#   ./chain.sh [options of bids_brainfm]
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source-path=SCRIPTDIR
source ./settings.sh

[ -s "$participants" ] || { echo "$participants is not there or empty: a line a task" >&2; exit 1; }
tasks=1-$(grep -c '' "$participants")
prepared=$(sbatch --parsable --array="$tasks" fmriprep.sbatch)
# aftercorr: task 7 waits for task 7; where that fails, it is cancelled and does not wait for ever
series=$(sbatch --parsable --array="$tasks" --dependency="aftercorr:$prepared" \
  --kill-on-invalid-dep=yes participants.sbatch --stop-after timeseries "$@")
# afterany: one participant who failed does not keep the others from being encoded
sbatch --dependency="afterany:$series" encode.sbatch "$@"
