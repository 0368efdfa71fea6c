"""Quantizing one decoder layer at a time: what is in memory is one layer, never the model.

`skeleton` makes small transformers models of one layer each, `frame` runs what lies around the layers,
`hidden` keeps the activations between two layers, `walk` takes the layers one by one, `commits` makes
every finished layer survive a killed run, `shards` puts the finished layers together.

No pad token ever enters a layer: windows that a mask shortens are run at their own length
(`batches`), so whatever listens during a forward pass, ModelOpt's own algorithms and the experts of a
router included, sees real tokens only and needs no mask.
"""
