"""A long-running single-machine deployment: PostgreSQL, Prefect's server, a worker per pool."""
