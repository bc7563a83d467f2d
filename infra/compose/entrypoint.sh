#!/bin/sh
# Runs a command with secrets from files: NAME_FILE=/run/secrets/x becomes NAME with what is in the file.
set -eu
folder=${SDTRAIN_SECRETS:-/run/secrets}
for name in $(env | sed -n "s#^\([A-Z0-9_]*\)_FILE=$folder/.*#\1#p"); do
    eval "path=\$${name}_FILE"
    if [ ! -r "$path" ]; then
        echo "error: $path, which ${name}_FILE names, cannot be read. Run infra/compose/make-secrets first." >&2
        exit 2
    fi
    export "$name=$(cat "$path")"
    unset "${name}_FILE"
done
exec "$@"
