"""What a dataset holds and how far it is: views, queries, status, metrics, the report."""
