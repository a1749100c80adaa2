"""From noise to latents: the flow schedule, the first-frame conditioning, and the Euler loop."""
