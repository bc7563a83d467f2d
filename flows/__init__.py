"""Thin Prefect flows over the functions of `filters` and `sdtrain`."""

from sdtrain.redaction import hide_secrets_in_logs

# Here, because whatever process runs a flow or a part of one, Prefect's or an engine's, imports this first.
hide_secrets_in_logs()
