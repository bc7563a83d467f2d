"""Thin Prefect flows over the functions of `filters` and `sdtrain`."""

from sdtrain.redaction import hide_secrets_in_logs

# Here, because every process that runs (part of) a flow, Prefect's or an engine's, imports this first.
hide_secrets_in_logs()
