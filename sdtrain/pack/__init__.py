"""Packs the kept samples into tars of equal size: the stage PACK."""
