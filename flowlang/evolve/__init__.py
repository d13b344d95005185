"""The search for normalisation-activation layers of Liu et al. 2020 (EvoNorm, arXiv 2004.02967), over layers in this language."""
