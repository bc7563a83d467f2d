# What the jobs of this folder share. SLURM runs a copy of a job's script, so they find this file through SDTRAIN_HOME.

# The repository and its environment; the same paths on every node.
: "${SDTRAIN_HOME:=$SLURM_SUBMIT_DIR}"
: "${SDTRAIN_BIN:=$SDTRAIN_HOME/.venv/bin}"
export SDTRAIN_HOME SDTRAIN_BIN PATH="$SDTRAIN_BIN:$PATH"
# Python would buffer its lines, and nobody could follow the job's log.
export PYTHONUNBUFFERED=1

# Ranks on each node: its GPUs; on nodes without, SDTRAIN_RANKS_PER_NODE.
ranks_per_node=${SLURM_GPUS_ON_NODE:-0}
if [ "$ranks_per_node" -eq 0 ]; then ranks_per_node=${SDTRAIN_RANKS_PER_NODE:-1}; fi

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The address by which the others reach the first node; its name is enough where names resolve.
first_address=${SDTRAIN_FIRST_ADDRESS:-$(scontrol show node "$first_node" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)}
# Another one for each job, because several may share a node.
port=$((20000 + SLURM_JOB_ID % 20000))

# Runs a step to its end. Shortly before the time limit (USR1, see --signal) the step is asked to end, for which
# training writes a checkpoint, and the job goes back into the queue. TERM, from scancel or preemption, reaches the
# step by itself: all that is left to do is to wait.
run_step() {
  local requeue=0 code=0
  trap 'requeue=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  trap : TERM
  "$@" &
  local step=$!
  while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
  done
  if [ "$requeue" -eq 1 ]; then
    echo "The time limit is near: job $SLURM_JOB_ID goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}
