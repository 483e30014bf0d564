#!/usr/bin/env bash
# Everything that needs a GPU: what the machine is, the tests, the benchmark. `run.sh [check] [tests] [bench]`, default
# all. Logs and a summary go to $OUT (default /tmp/cuda). PYTEST and BENCH hold further arguments of the two.
# Wheels in .whl (of what the machine lacks) are installed aside; the package is used from this checkout.
cd "$(dirname "$0")/../.." || exit
export OUT=${OUT:-/tmp/cuda} SITE=${SITE:-/tmp/site} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" "$SITE"
began=$SECONDS
if ls .whl/*.whl >/dev/null 2>&1; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl || exit
fi
# not the checkout itself: its doors (kernels, model) would shadow packages that transformers asks for
ln -sfn "$PWD/glmctl" "$SITE/glmctl"
export PYTHONPATH=$SITE PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 NO_COLOR=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=4
export GLMCTL_OBSERVED=$OUT/observed.jsonl
: >"$OUT/summary.txt"

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    echo "$name: rc ${PIPESTATUS[0]}, $((SECONDS - start)) s" >>"$OUT/summary.txt"
}

check() {
    nvidia-smi
    nproc --all
    $PYTHON - <<'END'
import importlib.metadata as m, pkgutil, importlib, sys, torch, glmctl
print(sys.version, torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name(), glmctl.__file__)
names = "transformers accelerate tokenizers numpy pyarrow datasets pydantic typer triton pytest pytest-xdist pytest-timeout"
print({n: m.version(n) for n in names.split()})
bad = []
for one in pkgutil.walk_packages(glmctl.__path__, "glmctl."):
    try:
        one.name.endswith("__main__") or importlib.import_module(one.name)
    except Exception as problem:
        bad.append((one.name, repr(problem)))
print("cannot be imported:", bad)
END
    $PYTHON -m glmctl doctor
}
export -f check

wanted=${*:-check tests bench}
for one in $wanted; do
    case $one in
    check) step check 90 bash -c check ;;
    tests) step tests 240 $PYTHON -m pytest -p no:cacheprovider -m cuda -n ${WORKERS:-6} --dist loadgroup --timeout=180 \
        --durations=12 -rfE --tb=short tests/cuda $PYTEST ;;
    bench) TORCHINDUCTOR_CACHE_DIR=/tmp/inductor-bench OMP_NUM_THREADS=8 \
        step bench 170 $PYTHON benchmarks/gpu.py --seconds 130 $BENCH ;;
    esac
done
echo "all: $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
cat "$OUT/summary.txt"
