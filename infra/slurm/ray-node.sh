# One node of build.sbatch: the first one starts Ray's head and, on it, the flow; the others join it until the flow ends.
set -euo pipefail

cpus=${SLURM_CPUS_ON_NODE:-1}
quiet=(--disable-usage-stats --num-cpus "$cpus" --node-ip-address)

if [ "$SLURM_NODEID" -ne 0 ]; then
  address=$(ip -4 -o route get "${RAY_HEAD%:*}" | grep -o 'src [^ ]*' | cut -d' ' -f2)
  for _ in $(seq 60); do
    if ray start --address "$RAY_HEAD" "${quiet[@]}" "$address" --block; then exit 0; fi
    sleep 2 # the head is not there yet
  done
  echo "No Ray answers at $RAY_HEAD." >&2
  exit 1
fi

ray start --head --port "${RAY_HEAD#*:}" --include-dashboard=false "${quiet[@]}" "${RAY_HEAD%:*}" --block &
head=$!
trap 'kill "$head" 2>/dev/null || true; wait "$head" || true' EXIT # the flow's exit code, not that of Ray's end
for _ in $(seq 60); do
  if ray health-check --address "$RAY_HEAD" 2>/dev/null; then break; fi
  sleep 1
done

python -c 'import json, sys; from flows.build_dataset import build_dataset; build_dataset(**json.loads(sys.argv[1]))' \
  "$(python -c 'import json, os, sys; print(json.dumps(json.loads(sys.argv[1]) | {"engine": "ray", "engine_address": os.environ["RAY_HEAD"]}))' "$1")"
