"""One token's forward in few launches: parts of a model that run on kernels of ours for as long as a ``with`` lasts."""
