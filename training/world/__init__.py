"""The bundled model's world: its words, documents that are written in them, questions on these."""
