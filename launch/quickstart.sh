#!/usr/bin/env bash
# From nothing to a reanalysis, a forecast, scores and a report. Arguments are those of appa-lite quickstart.
source "$(dirname "$0")/setup.sh"
appa-lite quickstart "$@"
