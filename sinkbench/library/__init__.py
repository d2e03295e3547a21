"""sinkbench called from programs and notebooks: what the command line does, as functions."""
