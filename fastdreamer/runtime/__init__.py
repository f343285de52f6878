"""All machinery between the method and the machine: devices, precision, compilation, captured graphs, streams, staging,
batches copied ahead, metrics read late. It knows nothing of the method: it runs the callables it is given.
"""
