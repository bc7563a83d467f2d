"""One machine that runs everything for months: PostgreSQL, Prefect's server, a worker for each pool."""
