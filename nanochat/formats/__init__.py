"""Models in the formats of other programs: written by `scripts.export`, read by `scripts.import_model`."""
