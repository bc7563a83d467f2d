"""The page that a run ends with: funnel, scores, examples, loss curve, samples."""
