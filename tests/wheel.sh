#!/usr/bin/env bash
# Law: the wheel alone, in an empty environment and outside the checkout, carries everything a run needs,
# and adds one name to site-packages.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip="$work/venv/bin/pip"
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# build from a copy, so that the checkout stays clean
mkdir -p "$work/source" && (cd "$checkout" && git ls-files -z | tar --null -cf - -T -) | tar -xf - -C "$work/source"
"$pip" install --quiet ${PIP_FLAGS:-} -c "$checkout/constraints.txt" "$work/source"
"$pip" show -f glmctl | sed -n 's/^  //p' | cut -d/ -f1 | grep -v '^\.\.$' | sort -u >"$work/names"
grep -qx 'glmctl' "$work/names"
others=$(grep -vx -e 'glmctl' -e 'glmctl-[0-9.]*\.dist-info' "$work/names" || true)
[ -z "$others" ] || { echo "the wheel adds more than glmctl to site-packages: $others" >&2; exit 1; }
mkdir "$work/elsewhere" && cd "$work/elsewhere"
"$work/venv/bin/glmctl" run smoke
"$work/venv/bin/glmctl" run smoke --quiet
test -s runs/smoke/report.html
echo "wheel: installed alone, ran a whole life outside the checkout"
