"""The method, read top to bottom like the papers: agent, world_model, rssm, behavior, networks, distributions, optim.

No device, stream, timer, file or process in it: all of that lives in `runtime` and `run`.
"""
