"""One file a family of models: each has ``SPECS``, from a diffusers class name to its :class:`ModelSpec`.

A file that is put here is found by itself (:data:`lrqdit.models.registry.MODELS`).
"""
