"""The offline engine: distils a real dataset into a few synthetic images with NCFM (arXiv 2502.20653)."""
