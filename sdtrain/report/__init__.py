"""The report page of a run: funnel, scores, examples, loss curve, samples."""
