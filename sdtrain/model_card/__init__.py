"""The model card of a run, RUN/README.md, written from what the run and its datasets recorded."""

from sdtrain.model_card.write import measure_representation, write_card, write_training_summary

__all__ = ["measure_representation", "write_card", "write_training_summary"]
