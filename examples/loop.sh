#!/usr/bin/env bash
# One model after the other, without a batch file.
#
#     examples/loop.sh CALIBRATION OUT MODEL...
#
# A model that fails does not stop the rest. After Ctrl-C or a kill, the same command goes on where
# it was: what is done is found done within seconds. Options of `rilq convert` come from OPTIONS.
set -u
calibration=$1 out=$2
shift 2
read -ra options <<<"${OPTIONS:---bits 2 --rank 16}"
failed=()
for model in "$@"; do
    rilq convert "$model" --dataset "$calibration" --output-dir "$out/$(basename "$model")" \
        "${options[@]}"
    case $? in
    0) ;;
    75 | 130 | 143) exit 75 ;; # stopped
    *) failed+=("$model") ;;
    esac
done
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
