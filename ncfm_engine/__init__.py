"""The offline engine: distils a real dataset into a few synthetic images with NCFM (arXiv 2502.20653).

Each stage is a module with a function of its name: `pretrain.pretrain`, `distill.distill`, `label.label`,
`evaluate.evaluate`; `pipeline.run` is all of them in order, `origin` finds again what a set was made of.
"""
