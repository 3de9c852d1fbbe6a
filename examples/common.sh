# Sourced by every example. It starts verl's own trainer with the array `recipe` (the stock command) and, by the arm that
# is asked for, what is added to it: `elastic` of the example, or `resident` below. Later overrides win, so these may
# replace a value of `recipe`, and the command line one of all.

DATA=${DATA:-$HOME/data}       # where verl's data scripts wrote the Parquet files
PYTHON=${PYTHON:-python3}

resident=(
    # Verl's own replicas stay on the trainer's GPUs; router, dispatcher, shared prefixes and migration are ours.
    +rlhfless=resident
    trainer.v1.trainer_mode=rlhfless_sync
)

run() {
    local arm=${1:-}
    case $arm in
        stock) shift; set -- "${recipe[@]}" "$@" ;;
        elastic) shift; set -- "${recipe[@]}" "${elastic[@]}" "$@" ;;
        resident) shift; set -- "${recipe[@]}" "${resident[@]}" "$@" ;;
        *) echo "usage: $0 stock|elastic|resident [OVERRIDE | --cfg job]..." >&2; exit 2 ;;
    esac
    exec "$PYTHON" -m verl.trainer.main_ppo "$@"
}
