# Sourced by every example. It starts verl's own trainer with the arrays `recipe` (the stock command) and `elastic` (what
# is added to it). Later overrides win, so `elastic` may replace a value of `recipe`, and the command line one of both.

DATA=${DATA:-$HOME/data}       # where verl's data scripts wrote the Parquet files
PYTHON=${PYTHON:-python3}

run() {
    local arm=${1:-}
    case $arm in
        stock) shift; set -- "${recipe[@]}" "$@" ;;
        elastic) shift; set -- "${recipe[@]}" "${elastic[@]}" "$@" ;;
        *) echo "usage: $0 stock|elastic [OVERRIDE | --cfg job]..." >&2; exit 2 ;;
    esac
    exec "$PYTHON" -m verl.trainer.main_ppo "$@"
}
