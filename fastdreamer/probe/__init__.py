"""What the latents of runs hold: linear probes of the truth behind the frames, and how far the prior can be rolled."""
